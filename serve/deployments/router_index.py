"""Indexes of all tenants, kept in step with the registry's change log."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypernet.names import context
from router.embed import Encoder
from router.index import AdapterEntry, IndexDamaged, State, TenantIndex
from serve.registry import Registry
from serve.registry.records import RoutableAdapter

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 30
_CHANGES_AT_ONCE = 1000
_LOADED_AT_ONCE = 2000
_NICENESS = 10
"""Of threads that merge segments: on Linux each thread has its own."""


@dataclass(eq=False)
class _Followed:
    """One tenant's index; `nbytes` as they were counted last."""

    index: TenantIndex
    lock: threading.Lock = field(default_factory=threading.Lock)
    nbytes: int = 0
    compacting: bool = False


class TenantIndexes:
    """Gives each tenant's index as new as the registry. May be shared by threads.

    Indexes in memory take about `max_bytes` together. Those that were not asked for longest are dropped, and come back
    from the registry, or from `folder` where they were large enough to be written there, without what has changed
    since, which the registry's change log tells.
    """

    def __init__(
        self, registry: Registry, encoder: Encoder, folder: Path | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        self._registry = registry
        self._encoder = encoder
        self._folder = folder
        self._max_bytes = max_bytes
        self._tenants: OrderedDict[str, _Followed] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()
        self._one_compaction = threading.Lock()

    def current(self, tenant_id: str) -> TenantIndex:
        """The tenant's index with every change that was committed before this call. Reads the head once."""
        followed = self._followed(tenant_id)
        index = followed.index
        head = self._registry.head(tenant_id)
        try:
            index.check_files()
        except IndexDamaged as error:
            logger.error("the index of %s is built anew: %s", tenant_id, error)
            self._drop(tenant_id, followed)
            return self.current(tenant_id)
        if index.seq < head or index.seq < 0:
            with followed.lock:
                if index.seq < 0:
                    self._load(index)
                if index.seq < head:  # else another thread has caught up meanwhile
                    self._catch_up(index)
            self._count(tenant_id, followed)
            self._compact_later(tenant_id, followed)
        return index

    def seq(self, tenant_id: str) -> int:
        """The change up to which `current` has brought the tenant's index; no earlier than the head that it read."""
        return self._followed(tenant_id).index.seq

    @property
    def nbytes(self) -> int:
        """Bytes of all indexes in memory."""
        return self._nbytes

    def __len__(self) -> int:
        """How many tenants' indexes are in memory."""
        return len(self._tenants)

    def _followed(self, tenant_id: str) -> _Followed:
        with self._lock:
            if tenant_id not in self._tenants:
                folder = self._folder / tenant_id if self._folder is not None else None
                encoder = f"{self._encoder.id} {self._encoder.version}"
                self._tenants[tenant_id] = _Followed(
                    TenantIndex(tenant_id, self._encoder.dimension, folder, encoder)
                )
            self._tenants.move_to_end(tenant_id)
            return self._tenants[tenant_id]

    def _drop(self, tenant_id: str, followed: _Followed) -> None:
        """Forget an index and its files."""
        with self._lock:
            if self._tenants.get(tenant_id) is followed:
                del self._tenants[tenant_id]
                self._nbytes -= followed.nbytes
                followed.index.remove_files()

    def _count(self, tenant_id: str, followed: _Followed) -> None:
        """Count an index's bytes anew, and drop what was not asked for longest where they are too many."""
        nbytes = followed.index.nbytes
        with self._lock:
            if self._tenants.get(tenant_id) is not followed:
                return
            self._nbytes += nbytes - followed.nbytes
            followed.nbytes = nbytes
            while self._nbytes > self._max_bytes and len(self._tenants) > 1:
                _, dropped = self._tenants.popitem(last=False)
                self._nbytes -= dropped.nbytes

    def _compact_later(self, tenant_id: str, followed: _Followed) -> None:
        with self._lock:
            if followed.compacting or not followed.index.wants_compaction:
                return
            followed.compacting = True
        threading.Thread(target=self._compact, args=(tenant_id, followed), name="router-index", daemon=True).start()

    def _compact(self, tenant_id: str, followed: _Followed) -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
        try:
            with self._one_compaction:
                while followed.index.wants_compaction:
                    followed.index.compact()
                    self._count(tenant_id, followed)
        except (OSError, IndexDamaged):
            # A full disk: searches stay right and get slower, and the next change tries again.
            logger.exception("segments of %s could not be merged", tenant_id)
        finally:
            followed.compacting = False

    def _load(self, index: TenantIndex) -> None:
        try:
            # What is newer than the registry belongs to one that is no more, as after a restore from a backup.
            if index.open() and index.seq <= self._registry.head(index.tenant_id):
                return
        except IndexDamaged as error:
            logger.error("the index of %s is built anew: %s", index.tenant_id, error)
        index.remove_files()
        snapshot = self._registry.routable_snapshot(index.tenant_id)
        index.load(map(self._entries, _batches(snapshot.adapters)), snapshot.seq)

    def _catch_up(self, index: TenantIndex) -> None:
        tenant_id, seq = index.tenant_id, index.seq
        touched: dict[str, None] = {}
        while changes := self._registry.changes_since(tenant_id, seq, _CHANGES_AT_ONCE):
            touched.update((change.document_id, None) for change in changes)
            seq = changes[-1].seq
        # What was touched is read anew as it is now, all parts of it: a stale adapter stays in but may not answer, a
        # retired one drops out, and no search sees parts of two versions.
        documents = list(touched)
        adapters = self._registry.routable(tenant_id, document_ids=documents)
        index.update(self._entries(adapters), documents=documents, seq=seq)

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


def _batches(adapters: Sequence[RoutableAdapter]) -> Iterator[list[RoutableAdapter]]:
    """All adapters, ordered by document, in lists that cut no document in two."""
    batch: list[RoutableAdapter] = []
    for adapter in adapters:
        if len(batch) >= _LOADED_AT_ONCE and adapter.document_id != batch[-1].document_id:
            yield batch
            batch = []
        batch.append(adapter)
    if batch:
        yield batch


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
