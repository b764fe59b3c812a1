"""Indexes of all tenants, kept in step with the registry's change log."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from router.embed import Encoder
from router.index import AdapterEntry, TenantIndex
from serve.registry import Registry
from serve.registry.records import RoutableAdapter

logger = logging.getLogger(__name__)

MAX_TENANTS = 1000
_CHANGES_AT_ONCE = 1000
_ADAPTERS_AT_ONCE = 500  # databases bound the number of parameters of a query


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
            for change in changes:
                touched.update(dict.fromkeys(change.retired_adapter_ids))
                if change.adapter_id is not None:
                    touched[change.adapter_id] = None
            seq = changes[-1].seq
        # What was touched is read anew as it is now: a stale adapter stays in as unavailable, a retired one drops out.
        names = list(touched)
        adapters: list[RoutableAdapter] = []
        for start in range(0, len(names), _ADAPTERS_AT_ONCE):
            adapters += self._registry.routable(tenant_id, names[start : start + _ADAPTERS_AT_ONCE])
        followed.index.update(self._entries(adapters), remove=names)
        followed.seq = seq

    def _entries(self, adapters: Iterable[RoutableAdapter]) -> Sequence[AdapterEntry]:
        return [entry for adapter in adapters if (entry := self._entry(adapter)) is not None]

    def _entry(self, adapter: RoutableAdapter) -> AdapterEntry | None:
        """None for an adapter that routing must leave out."""
        if adapter.state not in ("ready", "stale"):
            return None
        if (adapter.encoder, adapter.encoder_version) != (self._encoder.id, self._encoder.version):
            # Vectors of different encoders cannot be compared.
            logger.warning("%s has centroids of another encoder and is not routed to", adapter.adapter_id)
            return None
        return AdapterEntry.of_document(
            adapter_id=adapter.adapter_id,
            tenant_id=adapter.tenant_id,
            document_id=adapter.document_id,
            title=adapter.document_title,
            text=self._text(adapter),
            centroids=adapter.centroids,
            collection_id=adapter.collection_id,
            available=adapter.state == "ready",
        )

    def _text(self, adapter: RoutableAdapter) -> str:
        """The text that the adapter was made from; empty when it was deleted meanwhile."""
        stored = self._registry.get_adapter(adapter.tenant_id, adapter.adapter_id)
        if stored is None:
            return ""
        version = self._registry.get_version(adapter.tenant_id, adapter.document_id, stored.version)
        return version.text if version else ""
