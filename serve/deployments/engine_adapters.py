"""From an adapter ID to files on this node: looked up, checked against the loaded base, fetched once."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from anyio import to_thread

from serve.blobs import BlobStore
from serve.deployments.engine_context import EngineRefusal
from serve.registry import Registry
from serve.registry.records import Adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """A published adapter and its PEFT folder on this node."""

    adapter: Adapter
    folder: Path


class AdapterCache:
    """Adapter folders on this node, named by adapter ID, which is never reused. For one event loop.

    They lie in a folder of this engine's own: it may delete one as soon as none of its own requests needs it, whatever
    other engines on the machine are doing.
    """

    def __init__(
        self, registry: Registry, blobs: BlobStore, parent: Path, base_fingerprint: str, max_rank: int
    ) -> None:
        """Takes the first of ``parent``/0, ``parent``/1, … that no living engine holds, with what an earlier one has
        fetched into it."""
        self._registry = registry
        self._blobs = blobs
        self._folder, self._lock = _take_folder(parent)
        for leftover in self._folder.glob(".*"):  # of a fetch or a removal that was cut short
            shutil.rmtree(leftover, ignore_errors=True)
        _clear_abandoned(parent)
        self._base_fingerprint = base_fingerprint
        self._max_rank = max_rank
        self._fetching: dict[str, asyncio.Task[None]] = {}

    async def get(self, tenant_id: str, adapter_id: str) -> LocalAdapter:
        """The tenant's adapter, ready for vLLM to load.

        Raises EngineRefusal: 404 when the tenant has no such adapter, 409 when it does not fit the loaded base, 503
        when its files cannot be fetched.
        """
        adapter = await to_thread.run_sync(self._registry.get_adapter, tenant_id, adapter_id)
        if adapter is None or adapter.state == "deleted":
            raise EngineRefusal(404, f"adapter {adapter_id} does not exist", "invalid_request_error", "model_not_found")
        self._check(adapter)
        folder = self._folder / adapter_id
        if not folder.is_dir():
            # One fetch for all who ask; it outlives the request that began it.
            task = self._fetching.get(adapter_id)
            if task is None:
                task = asyncio.create_task(self._fetch(adapter, folder))
                self._fetching[adapter_id] = task
                task.add_done_callback(lambda _: self._fetching.pop(adapter_id, None))
            try:
                await asyncio.shield(task)
            except Exception as error:
                logger.exception("adapter %s could not be fetched from %s", adapter_id, adapter.blob_path)
                raise EngineRefusal(
                    503, f"the files of adapter {adapter_id} cannot be read now", "server_error", "adapter_unavailable"
                ) from error
        return LocalAdapter(adapter, folder)

    async def unneeded(self, adapter_ids: Iterable[str] = ()) -> list[str]:
        """Adapters in this cache, or among these, that are deleted or replaced by a newer version."""
        asked = set(adapter_ids)

        def ask() -> list[str]:
            held = asked | {path.name for path in self._folder.glob("adp_*")}
            return sorted(held - self._registry.current_adapters(held))

        return await to_thread.run_sync(ask)

    async def discard(self, adapter_id: str) -> None:
        """Deletes the local copy. Only for adapters that no request needs now; one that comes later fetches anew.

        The copy loses its name before the first await, so that nobody finds half of it.
        """
        trash = self._folder / f".{adapter_id}.{secrets.token_hex(8)}.trash"
        try:
            (self._folder / adapter_id).rename(trash)
        except FileNotFoundError:
            return
        await to_thread.run_sync(lambda: shutil.rmtree(trash, ignore_errors=True))

    def close(self) -> None:
        """Leaves the folder, as it is, to the next engine."""
        os.close(self._lock)

    async def _fetch(self, adapter: Adapter, folder: Path) -> None:
        await to_thread.run_sync(self._blobs.fetch_folder, adapter.blob_path, folder, adapter.checksum)

    def _check(self, adapter: Adapter) -> None:
        if adapter.kind != "lora":
            reason = f"is of kind {adapter.kind}, which this engine cannot attach"
        elif adapter.base_fingerprint != self._base_fingerprint:
            reason = "was made for another base model than the one loaded; its document must be generated again"
        elif adapter.rank > self._max_rank:
            reason = f"has rank {adapter.rank}, more than engine.max_lora_rank = {self._max_rank}"
        else:
            return
        raise EngineRefusal(409, f"adapter {adapter.id} {reason}", "invalid_request_error", "adapter_mismatch")


def _take_folder(parent: Path) -> tuple[Path, int]:
    """A folder that no other process uses, and the open file that holds it until it is closed or the process ends."""
    for number in itertools.count():
        folder = parent / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder)
        if handle is not None:
            return folder, handle
    raise AssertionError("unreachable")


def _clear_abandoned(parent: Path) -> None:
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
