"""An engine deployment over a real registry, blob store and node cache, with vLLM's own adapter lists and no model."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import pytest_asyncio
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from serve.blobs import BlobStore
from serve.config import EngineConfig, ImprintConfig
from serve.deployments import engine as engine_module
from serve.deployments.engine import EngineContext, EngineDeployment
from serve.deployments.engine_adapters import AdapterCache
from serve.deployments.engine_metrics import EngineMetrics
from serve.ids import new_id
from serve.registry import Registry, migrate
from serve.registry.records import NewAdapter, NewCentroids


class _ModellessManager(LRUCacheLoRAModelManager):
    """vLLM's two lists of adapters, of which no weights go anywhere."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.lora_config = SimpleNamespace(max_loras=slots, max_cpu_loras=capacity)
        self.lora_index_to_id: list[int | None] = [None] * slots
        self.modules: dict[str, Any] = {}
        self.punica_wrapper_mapping: dict[str, Any] = {}
        self._registered_adapters = AdapterLRUCache(capacity, self.deactivate_adapter)
        self._active_adapters = AdapterLRUCache(slots, self._deactivate_adapter)

    def _add_adapter(self, lora: Any) -> None:
        self._registered_adapters[lora.id] = lora


class ModellessWorker(LRUCacheWorkerLoRAManager):
    """vLLM's own rules for what it holds, over folders that it only looks at, or with `look` False not even that.
    Notes the names that it was given."""

    def __init__(self, slots: int, capacity: int, look: bool = True) -> None:
        self._look = look
        self._adapter_manager = _ModellessManager(slots, capacity)
        self.names: dict[int, str] = {}

    def _load_adapter(self, lora_request: LoRARequest) -> Any:
        if self._look and not (Path(lora_request.lora_path) / "adapter_model.safetensors").is_file():
            raise ValueError(f"no adapter at {lora_request.lora_path}")
        self.names[lora_request.lora_int_id] = lora_request.lora_name
        return SimpleNamespace(id=lora_request.lora_int_id)

    def held(self) -> set[str]:
        """Names of all that it holds."""
        return {self.names[number] for number in self.list_adapters()}

    def in_slots(self) -> set[str]:
        """Names of those in a slot."""
        return {self.names[number] for number in self._adapter_manager.lora_index_to_id if number is not None}

    def step(self, requests: list[LoRARequest]) -> None:
        """Takes what a step of the engine runs, in this order."""
        for request in requests:
            self.add_adapter(request)


class ScriptedVllm:
    """vLLM's lists of adapters without its model; streams until `finish` is set. Counts the calls about adapters."""

    def __init__(self, _: Any, config: EngineConfig) -> None:
        self.engine = self
        self.models = SimpleNamespace(lora_requests={})
        self.worker = ModellessWorker(config.max_loras, config.max_cpu_loras)
        self.capacity = config.max_cpu_loras
        self.calls: list[str] = []
        self.numbers: list[int] = []
        self.hold = asyncio.Event()  # while it is not set, loads wait
        self.hold.set()
        self.break_load = False  # the next load fails when vLLM already has the adapter
        self.finish = asyncio.Event()
        self.dead = False

    async def verify(self) -> None:
        return

    @property
    def loaded(self) -> set[str]:
        """Names of the adapters that it holds."""
        return self.worker.held()

    async def add_lora(self, lora: LoRARequest) -> bool:
        self.calls.append("add_lora")
        await self.hold.wait()
        assert len(self.worker.list_adapters()) < self.capacity, "vLLM would drop one of its own choice"
        self.numbers.append(lora.lora_int_id)
        self.worker.add_adapter(lora)
        if self.break_load:
            self.break_load = False
            raise ValueError("the size of a tensor must match that of its slot")
        return True

    async def remove_lora(self, number: int) -> bool:
        self.calls.append("remove_lora")
        return self.worker.remove_adapter(number)

    async def list_loras(self) -> set[int]:
        return self.worker.list_adapters()

    async def check_health(self) -> None:
        return

    def get_num_unfinished_requests(self) -> int:
        return 0

    async def create(self, _kind: str, body: dict[str, Any], _context: EngineContext, lora: Any) -> Any:
        if lora is not None:
            self.models.lora_requests[lora.lora_name] = lora
            assert lora.lora_int_id in self.worker.list_adapters(), "vLLM would read the adapter within a step"
            self.worker.step([lora])
        return self._stream() if body.get("stream") else {"object": "chat.completion"}

    async def _stream(self) -> AsyncGenerator[str, None]:
        yield "data: {}\n\n"
        await self.finish.wait()
        yield "data: [DONE]\n\n"

    def shutdown(self) -> None:
        return


@dataclass
class World:
    """An engine and what it reads from."""

    config: ImprintConfig
    registry: Registry
    blobs: BlobStore
    source: Path
    tenant_id: str
    engines: list[EngineDeployment] = field(default_factory=list)

    def start(self, **settings: Any) -> EngineDeployment:
        """A new engine, with these settings of its section."""
        for name, value in settings.items():
            setattr(self.config.engine, name, value)
        self.engines.append(EngineDeployment(self.config.model_dump(mode="json")))
        return self.engines[-1]

    def cache(self, parent: Path) -> AdapterCache:
        """A node cache of another engine."""
        return AdapterCache(
            self.registry, self.blobs, parent, "base", 8, 1 << 20, lambda _: True, EngineMetrics()
        )

    def publish(self, external_id: str, text: str = "text") -> str:
        """Publishes what `source` holds as the adapter of a document; gives its ID."""
        adapter_id = new_id("adp")
        prefix = f"adapters/{self.tenant_id}/{adapter_id}"
        stored = self.blobs.put_folder(prefix, self.source)
        posted = self.registry.post_document(self.tenant_id, "Notice", text, external_id)
        self.registry.lease_jobs("w", 1, 60)
        adapter = NewAdapter(
            adapter_id, "lora", 8, 8.0, ("down_proj",), prefix, stored.checksum, stored.size_bytes, "base", "generator"
        )
        centroids = NewCentroids("e", "1", np.ones((1, 2), np.float32))
        self.registry.publish(posted.job.id, "w", [(adapter, centroids)])
        return adapter_id

    def blob(self, adapter_id: str) -> Path:
        """The stored weights of an adapter."""
        folder = self.config.data_dir / "blobs" / "adapters" / self.tenant_id / adapter_id
        return folder / "adapter_model.safetensors"

    def local(self, adapter_id: str) -> Path:
        """The weights in the node's cache."""
        (path,) = self.config.cache_dir.glob(f"adapters/*/{adapter_id}/adapter_model.safetensors")
        return path

    def request(
        self,
        engine: EngineDeployment,
        adapter_id: str,
        *,
        tenant_id: str | None = None,
        on_missing: Literal["base", "refuse"] = "refuse",
        **body: Any,
    ) -> AsyncGenerator[Any, None]:
        """A request as the ingress makes it."""
        context = EngineContext(
            new_id("job"), tenant_id or self.tenant_id, adapter_id, cache_salt="salt", on_missing_adapter=on_missing
        )
        return engine.respond("chat", {"model": "imprint", **body}, context)

    async def ask(self, engine: EngineDeployment, adapter_id: str) -> int:
        """The status of a whole request."""
        return (await self.head(engine, adapter_id))["status"]

    async def head(self, engine: EngineDeployment, adapter_id: str, **options: Any) -> dict[str, Any]:
        """The first item of a whole request."""
        items = [item async for item in self.request(engine, adapter_id, **options)]
        return dict(items[0])

    def on_disk(self) -> set[str]:
        return {path.parent.name for path in self.config.cache_dir.rglob("*.safetensors")}


def vllm(engine: EngineDeployment) -> ScriptedVllm:
    assert isinstance(engine._runtime, ScriptedVllm)
    return engine._runtime


@pytest_asyncio.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    scripted = ModuleType("serve.deployments.engine_vllm")
    scripted.VllmRuntime = ScriptedVllm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, scripted.__name__, scripted)
    monkeypatch.setattr(engine_module, "fingerprint_folder", lambda _: "base")
    monkeypatch.setattr(engine_module, "FOLLOW_S", 3600.0)
    monkeypatch.setattr(engine_module, "DROP_IDLE_S", 0.0)
    config = ImprintConfig(data_dir=tmp_path / "data", base={"model": str(tmp_path)}, engine={"max_loras": 1})
    migrate(config.registry.url)
    registry = Registry.open(config.registry.url)
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_model.safetensors").write_bytes(b"weights")
    tenant_id = registry.create_tenant("acme").id
    made = World(config, registry, BlobStore.open(config.blobs.url), source, tenant_id)
    yield made
    for engine in made.engines:
        await engine.shutdown()
    registry.close()


