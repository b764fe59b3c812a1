"""Indexes of all tenants, kept in step with the registry's change log."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypernet.names import context
from router.embed import Encoder
from router.index import AdapterEntry, State, TenantIndex
from serve.registry import Registry
from serve.registry.records import RoutableAdapter

logger = logging.getLogger(__name__)

MAX_TENANTS = 1000
_CHANGES_AT_ONCE = 1000


@dataclass
class _Followed:
    """One tenant's index as of change `seq`; -1 before the first load."""

    index: TenantIndex
    seq: int = -1
    lock: threading.Lock = field(default_factory=threading.Lock)


class TenantIndexes:
    """Gives each tenant's index as new as the registry. May be shared by threads."""

    def __init__(self, registry: Registry, encoder: Encoder) -> None:
        self._registry = registry
        self._encoder = encoder
        self._tenants: OrderedDict[str, _Followed] = OrderedDict()
        self._lock = threading.Lock()

    def current(self, tenant_id: str) -> TenantIndex:
        """The tenant's index with every change that was committed before this call. Reads the head once."""
        followed = self._followed(tenant_id)
        head = self._registry.head(tenant_id)
        if followed.seq < head or followed.seq < 0:
            with followed.lock:
                if followed.seq < 0:
                    self._load(followed)
                elif followed.seq < head:  # else another thread has caught up meanwhile
                    self._catch_up(followed)
        return followed.index

    def _followed(self, tenant_id: str) -> _Followed:
        with self._lock:
            if tenant_id not in self._tenants:
                self._tenants[tenant_id] = _Followed(TenantIndex(tenant_id, self._encoder.dimension))
                while len(self._tenants) > MAX_TENANTS:
                    self._tenants.popitem(last=False)
            self._tenants.move_to_end(tenant_id)
            return self._tenants[tenant_id]

    def _load(self, followed: _Followed) -> None:
        snapshot = self._registry.routable_snapshot(followed.index.tenant_id)
        followed.index.update(self._entries(snapshot.adapters))
        followed.seq = snapshot.seq

    def _catch_up(self, followed: _Followed) -> None:
        tenant_id, seq = followed.index.tenant_id, followed.seq
        touched: dict[str, None] = {}
        while changes := self._registry.changes_since(tenant_id, seq, _CHANGES_AT_ONCE):
            touched.update((change.document_id, None) for change in changes)
            seq = changes[-1].seq
        # What was touched is read anew as it is now, all parts of it: a stale adapter stays in but may not answer, a
        # retired one drops out, and no search sees parts of two versions.
        documents = list(touched)
        adapters = self._registry.routable(tenant_id, document_ids=documents)
        followed.index.update(self._entries(adapters), documents=documents)
        followed.seq = seq

    def _entries(self, adapters: Iterable[RoutableAdapter]) -> list[AdapterEntry]:
        """Entries of those adapters that take part in routing."""
        texts: dict[tuple[str, int], str] = {}
        entries = []
        for adapter in adapters:
            if not self._is_routed(adapter):
                continue
            version = (adapter.document_id, adapter.version)
            if version not in texts:  # once for all parts
                texts[version] = self._text(adapter)
            entries.append(_entry(adapter, texts[version]))
        return entries

    def _is_routed(self, adapter: RoutableAdapter) -> bool:
        if adapter.state not in tuple(State):
            return False
        if (adapter.encoder, adapter.encoder_version) != (self._encoder.id, self._encoder.version):
            # Vectors of different encoders cannot be compared.
            logger.warning("%s has centroids of another encoder and is not routed to", adapter.adapter_id)
            return False
        return True

    def _text(self, adapter: RoutableAdapter) -> str:
        """The text that the adapter was made from; empty when it was deleted meanwhile."""
        version = self._registry.get_version(adapter.tenant_id, adapter.document_id, adapter.version)
        return version.text if version else ""


def _entry(adapter: RoutableAdapter, text: str) -> AdapterEntry:
    return AdapterEntry.of_document(
        adapter_id=adapter.adapter_id,
        tenant_id=adapter.tenant_id,
        document_id=adapter.document_id,
        title=adapter.document_title,
        text=text,
        centroids=adapter.centroids,
        collection_id=adapter.collection_id,
        state=State(adapter.state),
        spans=adapter.spans,
        part=adapter.part,
        parts=adapter.parts,
        contexts=[context(text, start) for start, _ in adapter.spans] if adapter.parts > 1 else (),
    )
