"""From an adapter ID to files on this node: looked up, checked against the loaded base, fetched and verified."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anyio import to_thread

from serve.blobs import BlobCorrupt, BlobMissing, BlobStore, verify_folder
from serve.deployments.engine_context import EngineRefusal
from serve.deployments.engine_loader import LocalAdapter, unavailable
from serve.deployments.engine_metrics import EngineMetrics
from serve.registry import Registry
from serve.registry.records import Adapter

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _OnDisk:
    """A folder of the cache. Once its files were verified by this process: the adapter, without its manifest, and what
    tells whether they were changed since."""

    size_bytes: int
    adapter: Adapter | None = None
    stamp: frozenset[tuple[str, int, int]] = frozenset()


class AdapterCache:
    """Adapter folders on this node, named by adapter ID, which is never reused. For one event loop.

    They lie in a folder of this engine's own: it may delete one as soon as none of its own requests needs it, whatever
    other engines on the machine are doing.

    Above its size in bytes the adapters used longest ago go first, however large: fetching one again costs about as
    much as the room that it takes, so size alone speaks neither for nor against it. What is needed now stays, even
    above that size.
    """

    def __init__(
        self,
        registry: Registry,
        blobs: BlobStore,
        parent: Path,
        base_fingerprint: str,
        max_rank: int,
        max_bytes: int,
        may_go: Callable[[str], bool],
        metrics: EngineMetrics,
    ) -> None:
        """Takes the first of ``parent``/0, ``parent``/1, … that no living engine holds, with what an earlier one has
        fetched into it. ``may_go`` says whether nothing needs an adapter's files now. Raises PermissionError when
        ``parent`` is another user's."""
        self._registry = registry
        self._blobs = blobs
        _make_private(parent)
        self._folder, self._lock = take_folder(parent)
        for leftover in self._folder.glob(".*"):  # of a fetch or a removal that was cut short
            shutil.rmtree(leftover, ignore_errors=True)
        clear_abandoned(parent)
        self._base_fingerprint = base_fingerprint
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._may_go = may_go
        self._metrics = metrics
        self._preparing: dict[str, asyncio.Task[LocalAdapter]] = {}
        found = sorted(self._folder.glob("adp_*"), key=lambda folder: folder.stat().st_mtime)
        # Last used last.
        self._on_disk = OrderedDict((folder.name, _OnDisk(_size(_stamp(folder)))) for folder in found)
        self.size_bytes = sum(entry.size_bytes for entry in self._on_disk.values())

    def __len__(self) -> int:
        return len(self._on_disk)

    def sizes(self) -> dict[str, int]:
        """Bytes by adapter ID, last used first."""
        return {adapter_id: entry.size_bytes for adapter_id, entry in reversed(self._on_disk.items())}

    def fits(self, size_bytes: int) -> bool:
        """Whether another adapter of this size would push out none."""
        return self.size_bytes + size_bytes <= self._max_bytes

    def touch(self, adapter_id: str) -> None:
        """Notes a use of the adapter."""
        if adapter_id in self._on_disk:
            self._on_disk.move_to_end(adapter_id)

    async def find(self, tenant_id: str, adapter_id: str) -> Adapter:
        """The tenant's adapter, from the registry. Raises EngineRefusal as `find_all` does."""
        return (await self.find_all(tenant_id, [adapter_id]))[0]

    async def find_all(self, tenant_id: str, adapter_ids: Sequence[str]) -> list[Adapter]:
        """The tenant's adapters, from the registry, in this order.

        Raises EngineRefusal: 404 when the tenant has not all of them, 409 when one does not fit the loaded base.
        """
        look_up = self._registry.get_adapter
        # In one thread: changing threads takes longer than a look-up.
        found = await to_thread.run_sync(lambda: [look_up(tenant_id, adapter_id) for adapter_id in adapter_ids])
        adapters = []
        for adapter_id, adapter in zip(adapter_ids, found, strict=True):
            if adapter is None:
                message = f"adapter {adapter_id} does not exist"
                raise EngineRefusal(404, message, "invalid_request_error", "model_not_found")
            self.check(adapter)
            adapters.append(adapter)
        return adapters

    async def get(self, tenant_id: str, adapter_id: str) -> LocalAdapter:
        """The tenant's adapter, ready for vLLM to load. Raises EngineRefusal as `find` and `prepare` do."""
        entry = self._on_disk.get(adapter_id)
        self._metrics.hits.labels("disk" if entry else "blobs").inc()
        adapter = entry.adapter if entry else None
        if adapter is None or adapter.tenant_id != tenant_id:
            adapter = await self.find(tenant_id, adapter_id)
        return await self.prepare(adapter)

    async def prepare(self, adapter: Adapter) -> LocalAdapter:
        """The adapter's files on this node, fetched if need be, and verified unless this process has done that and
        nothing has written to them since.

        Whoever asks for one that is being prepared waits for the same. Damaged files are fetched once more; where the
        blob store's are damaged or gone too, they are set aside and the document is generated again. Raises
        EngineRefusal 503 when there are no files to be had.
        """
        task = self._preparing.get(adapter.id)
        if task is None:
            # A task of its own: it outlives the request that began it.
            task = asyncio.create_task(self._prepare(adapter))
            self._preparing[adapter.id] = task
            task.add_done_callback(lambda done: self._prepared(adapter.id, done))
        return await asyncio.shield(task)

    async def unneeded(self, adapter_ids: Iterable[str] = ()) -> list[str]:
        """Adapters in this cache, or among these, that are deleted or replaced by a newer version."""
        asked = set(adapter_ids) | set(self._on_disk)

        def ask() -> list[str]:
            return sorted(asked - self._registry.current_adapters(asked))

        return await to_thread.run_sync(ask)

    async def discard(self, adapter_id: str) -> None:
        """Deletes the local copy. Only for adapters that no request needs now; one that comes later fetches anew.

        The copy loses its name before the first await, so that nobody finds half of it.
        """
        entry = self._on_disk.pop(adapter_id, None)
        self.size_bytes -= entry.size_bytes if entry else 0
        trash = self._folder / f".{adapter_id}.{secrets.token_hex(8)}.trash"
        try:
            (self._folder / adapter_id).rename(trash)
        except FileNotFoundError:
            return
        await to_thread.run_sync(lambda: shutil.rmtree(trash, ignore_errors=True))

    async def shrink(self, incoming_bytes: int = 0) -> None:
        """Deletes what was used longest ago and nothing needs, until ``incoming_bytes`` more would fit."""
        for adapter_id in list(self._on_disk):
            if self.fits(incoming_bytes):
                return
            if adapter_id in self._on_disk and adapter_id not in self._preparing and self._may_go(adapter_id):
                self._metrics.evictions.labels("disk").inc()
                await self.discard(adapter_id)

    def close(self) -> None:
        """Leaves the folder, as it is, to the next engine."""
        os.close(self._lock)

    async def _prepare(self, adapter: Adapter) -> LocalAdapter:
        folder = self._folder / adapter.id
        if not await self._verified(adapter, folder):
            await self.shrink(adapter.size_bytes)
            try:
                await self._fetch(adapter, folder)
            except (BlobCorrupt, BlobMissing) as error:
                logger.exception("the stored files of adapter %s are damaged or lost", adapter.id)
                await self._quarantine(adapter)
                raise unavailable(f"the stored files of adapter {adapter.id} are damaged or lost") from error
            except Exception as error:
                logger.exception("adapter %s could not be fetched from %s", adapter.id, adapter.blob_path)
                raise unavailable(f"the files of adapter {adapter.id} cannot be read now") from error
            self._note(adapter, await to_thread.run_sync(_stamp, folder))
        self.touch(adapter.id)
        return LocalAdapter(adapter.id, adapter.tenant_id, folder, adapter.size_bytes)

    async def _verified(self, adapter: Adapter, folder: Path) -> bool:
        """Whether this node has the adapter's files as they should be; else it has none of them afterwards."""
        try:
            stamp = await to_thread.run_sync(_stamp, folder)
            entry = self._on_disk.get(adapter.id)
            if not stamp and entry is None:
                return False
            if entry is not None and entry.adapter is not None and entry.stamp == stamp:
                return True
            with self._metrics.load_seconds.labels("verify").time():
                await to_thread.run_sync(verify_folder, folder, adapter.checksum)
        except (BlobCorrupt, OSError) as error:
            logger.error("the local copy of adapter %s is fetched again: %s", adapter.id, error)
            self._metrics.damaged.labels("disk").inc()
            await self.discard(adapter.id)
            return False
        self._note(adapter, stamp)
        return True

    def _note(self, adapter: Adapter, stamp: frozenset[tuple[str, int, int]]) -> None:
        """Notes that the adapter's files are here and as they should be."""
        old = self._on_disk.pop(adapter.id, None)
        entry = _OnDisk(_size(stamp), replace(adapter, manifest={}), stamp)
        self.size_bytes += entry.size_bytes - (old.size_bytes if old else 0)
        self._on_disk[adapter.id] = entry

    async def _fetch(self, adapter: Adapter, folder: Path) -> None:
        fetch = self._blobs.fetch_folder
        with self._metrics.load_seconds.labels("fetch").time():
            try:
                await to_thread.run_sync(fetch, adapter.blob_path, folder, adapter.checksum)
            except BlobCorrupt:  # perhaps only on the way
                await to_thread.run_sync(fetch, adapter.blob_path, folder, adapter.checksum)

    async def _quarantine(self, adapter: Adapter) -> None:
        self._metrics.damaged.labels("blobs").inc()

        def quarantine() -> None:
            self._registry.quarantine_adapter(adapter.tenant_id, adapter.id)
            self._blobs.quarantine(adapter.blob_path)

        try:
            await to_thread.run_sync(quarantine)
        except Exception:
            # The request fails in any case; the next one for this adapter tries again.
            logger.exception("adapter %s could not be set aside", adapter.id)

    def _prepared(self, adapter_id: str, task: asyncio.Task[LocalAdapter]) -> None:
        del self._preparing[adapter_id]
        if not task.cancelled():
            task.exception()  # seen, also when all who waited have gone

    def check(self, adapter: Adapter) -> None:
        """Raises EngineRefusal 409 for an adapter that does not fit the loaded base."""
        if adapter.kind != "lora":
            reason = f"is of kind {adapter.kind}, which this engine cannot attach"
        elif adapter.base_fingerprint != self._base_fingerprint:
            reason = "was made for another base model than the one loaded; its document must be generated again"
        elif adapter.rank > self._max_rank:
            reason = f"has rank {adapter.rank}, more than engine.max_lora_rank = {self._max_rank}"
        else:
            return
        raise EngineRefusal(409, f"adapter {adapter.id} {reason}", "invalid_request_error", "adapter_mismatch")


def _make_private(parent: Path) -> None:
    """Makes the folder for its owner only; one in a place like /dev/shm may have been made by somebody else before."""
    parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    parent.mkdir(mode=0o700, exist_ok=True)
    for folder in (parent.parent, parent):
        if folder.stat().st_uid not in (0, os.getuid()):
            raise PermissionError(f"{folder} belongs to another user; set engine.cache_dir to a folder of this one's")


def _stamp(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Path, size in bytes and time of the last write (ns) of each file; empty where there is no such folder."""
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return frozenset((str(path), status.st_size, status.st_mtime_ns) for path, status in found)


def _size(stamp: frozenset[tuple[str, int, int]]) -> int:
    """Bytes of all files."""
    return sum(size for _, size, _ in stamp)


def take_folder(parent: Path) -> tuple[Path, int]:
    """A folder that no other process uses, and the open file that holds it until it is closed or the process ends."""
    for number in itertools.count():
        folder = parent / str(number)
        folder.mkdir(mode=0o700, exist_ok=True)
        handle = _lock(folder)
        if handle is not None:
            return folder, handle
    raise AssertionError("unreachable")


def clear_abandoned(parent: Path) -> None:
    """Empties the folders of engines that ended and that none has taken over: nobody else would drop what is in them.

    The folders themselves stay, since an engine that is just starting may be about to lock one.
    """
    for folder in parent.iterdir():
        handle = _lock(folder)
        if handle is not None:
            for entry in folder.iterdir():
                shutil.rmtree(entry, ignore_errors=True)
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """An open file that locks the folder; None when another one does."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return handle
