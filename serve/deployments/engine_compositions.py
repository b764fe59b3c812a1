"""Several of a tenant's adapters as one that vLLM can load: composed in memory, kept in shared memory.

vLLM loads adapters from folders only, so a composition is written to one, on `/dev/shm` where that is possible. It is
made in milliseconds, so nothing keeps it beyond this engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from anyio import to_thread
from safetensors import SafetensorError

from serve.deployments.engine_adapters import AdapterCache, clear_abandoned, take_folder
from serve.deployments.engine_context import EngineRefusal, Member, composition_id
from serve.deployments.engine_loader import LocalAdapter, unavailable
from serve.deployments.engine_metrics import EngineMetrics
from serve.registry import Registry
from serve.registry.records import Adapter
from serve.residency import ResidencyTable

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
EVICT_IDLE_S = 5.0  # vLLM may still be ending the last request for a moment after its client has gone


@dataclass(frozen=True, slots=True)
class _Made:
    local: LocalAdapter
    members: frozenset[str]


class Compositions:
    """Compositions on this node, named by `composition_id`. For one event loop.

    Those that no request needs now are dropped, the longest idle ones first, when all together take more than
    ``max_bytes``. Only those in need can take more.
    """

    def __init__(
        self,
        registry: Registry,
        cache: AdapterCache,
        residency: ResidencyTable,
        forget: Callable[[str], Awaitable[bool]],
        parent: Path,
        max_rank: int,
        max_bytes: int,
        metrics: EngineMetrics,
    ) -> None:
        """``forget`` drops an adapter from vLLM's memory, given its ID, unless a request needs it. ``parent`` is of
        `folder_for_compositions`; what earlier engines have left there is deleted."""
        # On import it would load torch, also where the deployment is only described.
        from hypernet.compose import compose
        from hypernet.lora import WEIGHTS, AdapterInvalid, LoraAdapter

        self._compose, self._load, self._weights = compose, LoraAdapter.load, WEIGHTS
        self._errors = (OSError, SafetensorError, AdapterInvalid)
        self._registry = registry
        self._cache = cache
        self._residency = residency
        self._forget = forget
        self._folder, self._lock = take_folder(parent)
        _empty(self._folder)
        clear_abandoned(parent)
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._made: dict[str, _Made] = {}
        self._making: dict[tuple[str, str], asyncio.Task[LocalAdapter]] = {}
        self._shrinking: asyncio.Task[None] | None = None

    async def get(self, tenant_id: str, members: Sequence[Member]) -> LocalAdapter:
        """The composition, ready for vLLM to load. The caller has named its ID in the residency table.

        Raises EngineRefusal: for each member as `AdapterCache.find_all` and `prepare` do; 400 when the ranks add up to
        more than the engine holds; 503 when the composition cannot be made.
        """
        name = composition_id(members)
        adapters = await self._find(tenant_id, members)
        made = self._made.get(name)
        # Systems may clear /dev/shm, as when a user logs out.
        if made is not None and made.local.tenant_id == tenant_id and (made.local.folder / self._weights).is_file():
            return made.local
        # One for all who ask; it outlives the request that began it.
        task = self._making.get((tenant_id, name))
        if task is None:
            task = asyncio.create_task(self._make(name, tenant_id, adapters, dict(members)))
            self._making[tenant_id, name] = task
            task.add_done_callback(lambda done: self._finished(tenant_id, name, done))
        try:
            return await asyncio.shield(task)
        except self._errors as error:
            logger.exception("%s of %s could not be made", name, ", ".join(adapter_id for adapter_id, _ in members))
            raise unavailable("the adapters cannot be composed now") from error

    async def drop_unneeded(self, idle_s: float) -> list[str]:
        """Drops compositions with a member that was deleted or replaced, if no request has needed them for so many
        seconds; gives their IDs."""
        members = set().union(*(made.members for made in self._made.values()))
        if not members:
            return []
        current = await to_thread.run_sync(self._registry.current_adapters, members)
        unneeded = [name for name, made in self._made.items() if not made.members <= current]
        return [name for name in unneeded if await self._drop(name, idle_s)]

    async def shrink(self) -> None:
        """Drops the longest idle ones until the rest is within the budget."""
        idle = {name: self._residency.idle_s(name) for name in self._made}
        for name in sorted(idle, key=lambda name: -(idle[name] or 0.0)):
            if self._bytes() <= self._max_bytes:
                return
            try:
                await self._drop(name, EVICT_IDLE_S)
            except Exception:
                logger.exception("composition %s cannot be dropped", name)

    def close(self) -> None:
        """Deletes everything and leaves the empty folder to the next engine."""
        _empty(self._folder)
        os.close(self._lock)

    async def _find(self, tenant_id: str, members: Sequence[Member]) -> list[Adapter]:
        """By ID."""
        found = await self._cache.find_all(tenant_id, [adapter_id for adapter_id, _ in sorted(members)])
        rank = sum(adapter.rank for adapter in found)
        if rank > self._max_rank:
            message = f"the adapters' ranks add up to {rank}, more than engine.max_lora_rank = {self._max_rank}"
            raise EngineRefusal(400, message, "invalid_request_error", "invalid_value", "adapters")
        return found

    async def _make(
        self, name: str, tenant_id: str, adapters: Sequence[Adapter], weights: Mapping[str, float]
    ) -> LocalAdapter:
        with ExitStack() as stack:
            for adapter in adapters:  # their files must stay until they are read
                stack.enter_context(self._residency.name(adapter.id))
            parts = await asyncio.gather(*(self._cache.prepare(adapter) for adapter in adapters))
            folders = [part.folder for part in parts]
            with self._metrics.load_seconds.labels("compose").time():
                size = await to_thread.run_sync(self._write, name, folders, [weights[part.id] for part in parts])
        local = LocalAdapter(name, tenant_id, self._folder / name, size)
        self._made[name] = _Made(local, frozenset(weights))
        if self._bytes() > self._max_bytes and (self._shrinking is None or self._shrinking.done()):
            self._shrinking = asyncio.create_task(self.shrink())
        return local

    def _write(self, name: str, folders: Sequence[Path], weights: Sequence[float]) -> int:
        """Compose and write a folder, which appears complete or not at all; gives its size in bytes."""
        part = self._folder / f".{name}.{secrets.token_hex(8)}.part"
        try:
            self._compose([self._load(folder) for folder in folders], weights, self._max_rank).save(part)
            size = sum(file.stat().st_size for file in part.iterdir())
            part.rename(self._folder / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return size

    def _finished(self, tenant_id: str, name: str, task: asyncio.Task[LocalAdapter]) -> None:
        del self._making[tenant_id, name]
        if not task.cancelled():
            task.exception()  # seen, also when all who waited have gone

    def _bytes(self) -> int:
        return sum(made.local.size_bytes for made in self._made.values())

    async def _drop(self, name: str, idle_s: float) -> bool:
        """False while a request needs it, or when one did within the last ``idle_s`` seconds."""
        idle = self._residency.idle_s(name)
        if idle is None or idle < idle_s or not await self._forget(name):
            return False
        # Its name goes before anything else can run, so that nobody finds half of it.
        if self._made.pop(name, None) is not None:
            trash = self._folder / f".{name}.{secrets.token_hex(8)}.trash"
            with suppress(FileNotFoundError):
                (self._folder / name).rename(trash)
            await to_thread.run_sync(lambda: shutil.rmtree(trash, ignore_errors=True))
        return True


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry, ignore_errors=True)


def folder_for_compositions(node_cache: Path) -> Path:
    """Makes a folder of this user's own in shared memory, or below ``node_cache`` where there is none to be had."""
    shared = SHARED_MEMORY / f"imprint-compositions-{os.getuid()}"
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        found = shared.lstat()
        # Everybody may write to /dev/shm: somebody else's folder of that name is not trusted.
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return shared
        logger.warning("compositions go to the disk: %s is not a private folder of this user", shared)
    except OSError as error:
        logger.info("compositions go to the disk: %s", error)
    on_disk = node_cache / "compositions"
    on_disk.mkdir(mode=0o700, parents=True, exist_ok=True)
    return on_disk
