"""Indexes of all tenants, kept in step with the registry's change log.

While `router.previous_encoder` is set, a tenant some of whose documents have no vectors of the present encoder yet is
served by an index of the previous one. When its last document has them, the index of the present encoder is built in
the background and takes the other's place between two requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypernet.names import context
from router.embed import Encoder
from router.index import AdapterEntry, IndexDamaged, State, TenantIndex
from serve.deployments.router_encoders import PreviousEncoder, key_of, name_of
from serve.niceness import step_back
from serve.registry import Registry
from serve.registry.records import RoutableAdapter

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 30
_CHANGES_AT_ONCE = 1000
_LOADED_AT_ONCE = 2000


@dataclass(eq=False)
class _Followed:
    """One tenant's index; `nbytes` as they were counted last."""

    index: TenantIndex
    lock: threading.Lock = field(default_factory=threading.Lock)
    nbytes: int = 0
    compacting: bool = False
    switching: bool = False


class TenantIndexes:
    """Gives each tenant's index as new as the registry. May be shared by threads.

    Indexes in memory take about `max_bytes` together. Those that were not asked for longest are dropped, and come back
    from the registry, or from `folder` where they were large enough to be written there, without what has changed
    since, which the registry's change log tells.
    """

    def __init__(
        self,
        registry: Registry,
        encoder: Encoder,
        folder: Path | None = None,
        max_bytes: int = MAX_BYTES,
        previous: PreviousEncoder | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`previous` serves tenants that lack vectors of `encoder`. `clock` gives seconds since the epoch."""
        self._registry = registry
        self._encoder = encoder
        self._previous = previous
        self._previous_needed = True
        self._names = {key_of(name): name for name in [name_of(encoder), *([previous.name] if previous else [])]}
        self._present = key_of(name_of(encoder))
        self._folder = folder
        self._max_bytes = max_bytes
        self._clock = clock
        self._tenants: OrderedDict[str, _Followed] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()
        self._one_compaction = threading.Lock()

    def current(self, tenant_id: str) -> TenantIndex:
        """The tenant's index with every change that was committed before this call. Reads the head once.

        `index.encoder` says with which encoder it is to be searched.
        """
        followed = self._followed(tenant_id)
        head = self._registry.head(tenant_id)
        index = followed.index
        try:
            index.check_files()
        except IndexDamaged as error:
            logger.error("the index of %s is built anew: %s", tenant_id, error)
            self._drop(tenant_id, followed)
            return self.current(tenant_id)
        if index.seq < head or index.seq < 0:
            index = self._brought_up(followed, head)
            self._count(tenant_id, followed)
            self._compact_later(tenant_id, followed)
            self._switch_later(tenant_id, followed)
        return index

    def seq(self, tenant_id: str) -> int:
        """The change up to which `current` has brought the tenant's index; no earlier than the head that it read."""
        return self._followed(tenant_id).index.seq

    def in_memory(self, tenant_id: str) -> TenantIndex | None:
        """The tenant's index as it is, which may be behind or empty still; None where it is not in memory."""
        with self._lock:
            followed = self._tenants.get(tenant_id)
        return followed.index if followed is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all indexes in memory."""
        return self._nbytes

    def __len__(self) -> int:
        """How many tenants' indexes are in memory."""
        return len(self._tenants)

    def followed_on(self, tenant_id: str) -> TenantIndex | None:
        """The tenant's index as new as the registry; None where it is not in memory. Does not count as asked for."""
        with self._lock:
            followed = self._tenants.get(tenant_id)
        if followed is None or followed.index.seq < 0:
            return None
        head = self._registry.head(tenant_id)
        if followed.index.seq < head:
            self._brought_up(followed, head)
            self._count(tenant_id, followed)
            self._compact_later(tenant_id, followed)
        return followed.index

    def purge(self, tenant_id: str, before: float) -> None:
        """Begin to write segments anew that hold what went before this time (seconds since the epoch), of an index
        that is in memory."""
        with self._lock:
            followed = self._tenants.get(tenant_id)
        if followed is not None and followed.index.holds_gone(before):
            self._compact_later(tenant_id, followed, before)

    def leave_previous(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Give tenants that have vectors of the present encoder by now an index of it, one after the other until
        `stop`, and let the previous encoder go when nobody needs it any more."""
        if self._previous is None:
            return
        with self._lock:
            waiting = [(name, one) for name, one in self._tenants.items() if one.index.encoder != self._present]
        if waiting:
            self._previous_needed = True
        for tenant_id, followed in waiting:
            if stop():
                return
            self._switch_later(tenant_id, followed, wait=True)
        with self._lock:
            in_use = any(one.index.encoder != self._present for one in self._tenants.values())
        if self._previous_needed and not in_use and not self._registry.lacks_any(self._names[self._present]):
            logger.info("no tenant needs router.previous_encoder any more: it can be taken out of the configuration")
            self._previous_needed = False
            self._previous.let_go()

    def _followed(self, tenant_id: str) -> _Followed:
        with self._lock:
            followed = self._tenants.get(tenant_id)
        made = followed or _Followed(self._new_index(tenant_id, self._encoder_for(tenant_id)))
        with self._lock:
            followed = self._tenants.setdefault(tenant_id, made)
            self._tenants.move_to_end(tenant_id)
            return followed

    def _encoder_for(self, tenant_id: str) -> Encoder:
        if self._previous is None or not self._registry.lacks_any(self._names[self._present], tenant_id):
            return self._encoder
        return self._previous.get()

    def _new_index(self, tenant_id: str, encoder: Encoder) -> TenantIndex:
        folder = self._folder / tenant_id if self._folder is not None else None
        return TenantIndex(tenant_id, encoder.dimension, folder, key_of(name_of(encoder)), self._clock)

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

    def _compact_later(self, tenant_id: str, followed: _Followed, gone_before: float | None = None) -> None:
        with self._lock:
            if followed.compacting or not (gone_before or followed.index.wants_compaction):
                return
            followed.compacting = True
        threading.Thread(
            target=self._compact, args=(tenant_id, followed, gone_before), name="router-index", daemon=True
        ).start()

    def _compact(self, tenant_id: str, followed: _Followed, gone_before: float | None) -> None:
        step_back()
        try:
            with self._one_compaction:
                if gone_before is not None:
                    followed.index.compact(gone_before)
                while followed.index.wants_compaction:
                    followed.index.compact()
                self._count(tenant_id, followed)
        except (OSError, IndexDamaged):
            # A full disk: searches stay right and get slower, and the next change tries again.
            logger.exception("segments of %s could not be merged", tenant_id)
        finally:
            followed.compacting = False

    def _switch_later(self, tenant_id: str, followed: _Followed, wait: bool = False) -> None:
        """Off the request path, leave the previous encoder where that can be; `wait` until it is done."""
        with self._lock:
            if followed.switching or followed.index.encoder == self._present:
                return
            followed.switching = True
        switching = threading.Thread(target=self._switch, args=(tenant_id, followed), name="router-switch", daemon=True)
        switching.start()
        if wait:
            switching.join()

    def _switch(self, tenant_id: str, followed: _Followed) -> None:
        step_back()
        present = self._names[self._present]
        try:
            if self._registry.lacks_any(present, tenant_id):
                return
            index = self._new_index(tenant_id, self._encoder)
            self._read_all(index)
            with self._one_compaction, followed.lock:
                self._catch_up(index)
                if self._registry.lacks_any(present, tenant_id):
                    return  # a document of a generator that does not know the present encoder came meanwhile
                followed.index.remove_files()
                followed.index = index
            logger.info("%s is served with the encoder %s %s from now on", tenant_id, *present)
            self._count(tenant_id, followed)
            self._compact_later(tenant_id, followed)
        except Exception:
            # The index of the previous encoder serves on; the next change, or the next round of upkeep, tries again.
            logger.exception("%s stays with the previous encoder for now", tenant_id)
        finally:
            followed.switching = False

    def _brought_up(self, followed: _Followed, head: int) -> TenantIndex:
        """The tenant's index with the changes up to `head`."""
        with followed.lock:
            index = followed.index  # another one by now where the tenant has left the previous encoder
            if index.seq < 0:
                self._load(index)
            if index.seq < head:  # else another thread has caught up meanwhile
                self._catch_up(index)
            return index

    def _load(self, index: TenantIndex) -> None:
        try:
            # What is newer than the registry belongs to one that is no more, as after a restore from a backup.
            if index.open() and index.seq <= self._registry.head(index.tenant_id):
                return
        except IndexDamaged as error:
            logger.error("the index of %s is built anew: %s", index.tenant_id, error)
        index.remove_files()
        self._read_all(index)

    def _read_all(self, index: TenantIndex) -> None:
        """Fill an index from the registry."""
        name = self._names[index.encoder]
        snapshot = self._registry.routable_snapshot(index.tenant_id, name)
        index.load(map(self._entries, _batches(snapshot.adapters)), snapshot.seq)
        if lacking := self._registry.count_lacking(name, index.tenant_id):
            logger.warning("%d adapters of %s have no centroids of the encoder %s %s and are not routed to until they "
                           "are embedded anew", lacking, index.tenant_id, *name)

    def _catch_up(self, index: TenantIndex) -> None:
        tenant_id, seq = index.tenant_id, index.seq
        touched: dict[str, None] = {}
        while changes := self._registry.changes_since(tenant_id, seq, _CHANGES_AT_ONCE):
            # Vectors of the present encoder are nothing to an index of the previous one.
            kept = [one for one in changes if one.kind != "centroids_added" or index.encoder == self._present]
            touched.update((change.document_id, None) for change in kept)
            seq = changes[-1].seq
        # What was touched is read anew as it is now, all parts of it: a stale adapter stays in but may not answer, a
        # retired one drops out, and no search sees parts of two versions.
        documents = list(touched)
        adapters = self._registry.routable(tenant_id, documents, self._names[index.encoder]) if documents else []
        index.update(self._entries(adapters), documents=documents, seq=seq)

    def _entries(self, adapters: Iterable[RoutableAdapter]) -> list[AdapterEntry]:
        """Entries of those adapters that take part in routing."""
        texts: dict[tuple[str, int], str] = {}
        entries = []
        for adapter in adapters:
            if adapter.state not in tuple(State):
                continue
            version = (adapter.document_id, adapter.version)
            if version not in texts:  # once for all parts
                texts[version] = self._text(adapter)
            entries.append(_entry(adapter, texts[version]))
        return entries

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
