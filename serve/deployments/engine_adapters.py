"""From an adapter ID to files on this node: looked up, checked against the loaded base, fetched once."""

from __future__ import annotations

import asyncio
import logging
import shutil
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
    """Adapter folders under ``folder``, named by adapter ID, which is never reused. For one event loop."""

    def __init__(
        self, registry: Registry, blobs: BlobStore, folder: Path, base_fingerprint: str, max_rank: int
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._folder = folder
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

    async def discard(self, adapter_id: str) -> None:
        """Deletes the local copy. Only for adapters that no request can name any more."""
        await to_thread.run_sync(lambda: shutil.rmtree(self._folder / adapter_id, ignore_errors=True))

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
