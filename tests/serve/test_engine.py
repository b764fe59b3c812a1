"""The engine deployment as an ordinary class, on a tiny random model: real vLLM, real registry and blob store."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from hypernet.fingerprint import fingerprint_folder
from serve.blobs import BlobStore
from serve.config import ImprintConfig
from serve.deployments.engine import EngineContext, EngineDeployment
from serve.ids import new_id
from serve.registry import Registry, migrate
from serve.registry.records import NewAdapter, NewCentroids
from tests.tiny_models import make_adapter, make_base

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOTS = 2
MESSAGES = [{"role": "user", "content": "How much is the ticket?"}]


@dataclass
class World:
    """A running engine and what it reads from."""

    engine: EngineDeployment
    registry: Registry
    blobs: BlobStore
    config: ImprintConfig
    base: Path
    tenant_id: str
    adapters: list[str]

    def publish(self, folder: Path, base_fingerprint: str | None = None, rank: int = 8) -> str:
        """Publishes a PEFT folder the way the generator does; gives the adapter's ID."""
        adapter_id = new_id("adp")
        prefix = f"adapters/{self.tenant_id}/{adapter_id}"
        stored = self.blobs.put_folder(prefix, folder)
        posted = self.registry.post_document(self.tenant_id, f"Notice {adapter_id}", f"Text of {adapter_id}.")
        # Others may be free too: of documents whose files were lost.
        leased = {leased.job.id for leased in self.registry.lease_jobs("worker", 10, 60)}
        assert posted.job.id in leased
        adapter = NewAdapter(
            id=adapter_id,
            kind="lora",
            rank=rank,
            alpha=float(rank),
            target_modules=("down_proj",),
            blob_path=prefix,
            checksum=stored.checksum,
            size_bytes=stored.size_bytes,
            base_fingerprint=base_fingerprint or fingerprint_folder(self.base),
            generator_fingerprint="test",
        )
        centroids = NewCentroids("test", "1", np.eye(1, 4, dtype=np.float32))
        self.registry.publish(posted.job.id, "worker", [(adapter, centroids)])
        return adapter_id

    async def ask(self, adapter_id: str | None, messages: list[dict[str, str]] = MESSAGES, **fields: Any) -> Any:
        """(head, body) of a chat request; for a stream, body is the whole text."""
        body = {"model": "imprint", "messages": messages, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        items = [item async for item in self.engine.respond("chat", body | fields, self.context(adapter_id))]
        head, rest = items[0], items[1:]
        if head["stream"]:
            return head, "".join(rest)
        (answer,) = rest
        return head, answer

    def context(self, adapter_id: str | None, tenant_id: str | None = None) -> EngineContext:
        return EngineContext(new_id("job"), tenant_id or self.tenant_id, adapter_id, "salt-of-tenant")

    async def idle(self) -> None:
        """Waits until vLLM has nothing to do, which must come soon."""
        for _ in range(100):
            if (await self.engine.health())["unfinished"] == 0:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("requests are still running")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("engine")
    base = make_base(folder / "base")
    config = ImprintConfig(
        data_dir=folder / "data",
        base={"model": str(base)},
        engine={
            "max_loras": SLOTS,
            "max_lora_rank": 8,
            "max_cpu_loras": 4,
            "max_model_len": 256,
            "threads": "nobind",
            "extra": {"worker_extension_cls": "tests.serve.slot_probe.SlotProbe"},
        },
    )
    config.data_dir.mkdir()
    migrate(config.registry.url)
    registry = Registry.open(config.registry.url)
    blobs = BlobStore.open(config.blobs.url)
    engine = EngineDeployment(config.model_dump(mode="json"))
    made = World(engine, registry, blobs, config, base, registry.create_tenant("acme").id, [])
    try:
        for seed in range(4):
            made.adapters.append(made.publish(make_adapter(folder / f"adapter{seed}", base, seed=seed)))
        yield made
    finally:
        await engine.shutdown()
        await engine.shutdown()
        registry.close()


def _text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def test_adapters_change_answers_and_names_stay_the_clients(world: World) -> None:
    head, base_answer = await world.ask(None)
    assert head["status"] == 200 and not head["stream"]
    texts = {_text(base_answer)}
    for adapter_id in world.adapters:
        _, answer = await world.ask(adapter_id)
        assert answer["model"] == "imprint" and answer["object"] == "chat.completion"
        assert adapter_id not in json.dumps(answer)
        texts.add(_text(answer))
    assert len(texts) == len(world.adapters) + 1


async def test_streaming_gives_the_same_text(world: World) -> None:
    _, whole = await world.ask(world.adapters[0], max_tokens=40)
    head, stream = await world.ask(
        world.adapters[0], max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    assert head["stream"]
    events = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["model"] for chunk in chunks} == {"imprint"}
    assert "".join(choice["delta"].get("content") or "" for c in chunks for choice in c["choices"]) == _text(whole)
    assert chunks[-1]["usage"]["completion_tokens"] == 40


async def test_more_adapters_than_slots_at_once(world: World) -> None:
    wanted = {adapter_id: _text((await world.ask(adapter_id))[1]) for adapter_id in world.adapters}
    wanted_base = _text((await world.ask(None))[1])
    requests = [*world.adapters, None] * 6
    answers = await asyncio.gather(*(world.ask(adapter_id) for adapter_id in requests))
    for adapter_id, (_, answer) in zip(requests, answers, strict=True):
        assert _text(answer) == (wanted[adapter_id] if adapter_id else wanted_base)
    slots = await world.engine.slots()
    assert slots["slots"] == SLOTS and slots["waiting"] == 0
    assert {row["adapter_id"] for row in slots["adapters"]} >= set(world.adapters)
    assert all(row["users"] == 0 for row in slots["adapters"])


async def test_completion_with_logprobs_and_several_choices(world: World) -> None:
    body = {"model": "mine", "prompt": "The price is", "max_tokens": 4, "logprobs": 2, "n": 2, "ignore_eos": True}
    items = [item async for item in world.engine.respond("completion", body, world.context(world.adapters[1]))]
    assert items[0]["status"] == 200
    assert items[1]["model"] == "mine" and len(items[1]["choices"]) == 2
    assert len(items[1]["choices"][0]["logprobs"]["tokens"]) == 4


async def test_a_client_that_leaves_stops_its_request(world: World) -> None:
    body = {"model": "imprint", "messages": MESSAGES, "max_tokens": 200, "ignore_eos": True, "stream": True}
    stream = world.engine.respond("chat", body, world.context(world.adapters[0]))
    assert (await anext(stream))["status"] == 200
    await anext(stream)
    await stream.aclose()
    await world.idle()

    waiting = asyncio.create_task(world.ask(world.adapters[0], max_tokens=200))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await world.idle()
    assert all(row["users"] == 0 for row in (await world.engine.slots())["adapters"])


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"messages": "no list"}, 400),
        ({"temperature": -1}, 400),
        ({"max_tokens": 100_000}, 400),
        ({"messages": [{"role": "user", "content": "long " * 400}]}, 400),
        ({"tool_choice": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}, 400),
        ({"chat_template": "{{ messages }}"}, 400),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests_are_refused_before_they_start(
    world: World, fields: dict[str, Any], status: int, stream: bool
) -> None:
    head, answer = await world.ask(world.adapters[0], **({"stream": stream} | fields))
    assert (head["status"], head["stream"]) == (status, False)
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]
    assert (await world.engine.health())["unfinished"] == 0


async def test_unfit_adapters_are_refused_and_the_engine_lives(world: World, tmp_path: Path) -> None:
    foreign = world.publish(make_adapter(tmp_path / "foreign", world.base, seed=9), base_fingerprint="of another base")
    large = world.publish(make_adapter(tmp_path / "large", world.base, seed=9, rank=16), rank=16)
    lying = world.publish(tmp_path / "large", rank=8)
    gone = world.publish(make_adapter(tmp_path / "gone", world.base, seed=9))
    world.blobs.delete_folder(f"adapters/{world.tenant_id}/{gone}")
    other_tenant = world.registry.create_tenant("other").id
    for adapter_id, tenant_id, status in [
        (foreign, None, 409),
        (large, None, 409),
        (lying, None, 503),
        (gone, None, 503),
        (new_id("adp"), None, 404),
        (world.adapters[0], other_tenant, 404),
    ]:
        body = {"model": "x", "messages": MESSAGES, "max_tokens": 4}
        items = [item async for item in world.engine.respond("chat", body, world.context(adapter_id, tenant_id))]
        assert items[0]["status"] == status, adapter_id
        assert "message" in items[1]["error"]
    head, _ = await world.ask(world.adapters[0])
    assert head["status"] == 200
    assert (await world.engine.slots())["waiting"] == 0


async def test_a_deleted_adapter_is_forgotten(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter_id = world.publish(make_adapter(tmp_path / "adapter", world.base, seed=11))
    assert (await world.ask(adapter_id))[0]["status"] == 200
    assert list(world.config.cache_dir.rglob(adapter_id))
    adapter = world.registry.get_adapter(world.tenant_id, adapter_id)
    assert adapter is not None
    world.registry.delete_document(world.tenant_id, adapter.document_id)
    monkeypatch.setattr("serve.deployments.engine.DROP_IDLE_S", 0.0)
    assert adapter_id in await world.engine.drop_unneeded()
    assert (await world.ask(adapter_id))[0]["status"] == 404
    assert not list(world.config.cache_dir.rglob(adapter_id))
    assert world.engine._runtime is not None
    assert adapter_id not in world.engine._runtime.models.lora_requests
    assert adapter_id not in {row["adapter_id"] for row in (await world.engine.slots())["adapters"]}


async def test_evicted_adapters_come_back(world: World, tmp_path: Path) -> None:
    """More adapters than vLLM's memory holds (max_cpu_loras 4), in turn, and a lost node cache."""
    first = _text((await world.ask(world.adapters[0]))[1])
    for seed in range(5):
        await world.ask(world.publish(make_adapter(tmp_path / str(seed), world.base, seed=20 + seed)))
    shutil.rmtree(world.config.cache_dir)
    assert _text((await world.ask(world.adapters[0]))[1]) == first


async def test_the_table_says_what_vllm_holds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After mixed traffic; and what vLLM holds is used without a call."""
    runtime = world.engine._runtime
    assert runtime is not None
    calls = 0
    add_lora = runtime.engine.add_lora

    async def counted(lora: Any) -> bool:
        nonlocal calls
        calls += 1
        return await add_lora(lora)

    monkeypatch.setattr(runtime.engine, "add_lora", counted)
    await asyncio.gather(*(world.ask(adapter_id) for adapter_id in world.adapters * 3))
    for adapter_id in [world.adapters[0], world.adapters[2], world.adapters[0]]:
        await world.ask(adapter_id, max_tokens=4)
    await world.idle()
    rows = (await world.engine.slots())["adapters"]
    numbers = {lora.lora_int_id: name for name, lora in runtime.models.lora_requests.items()}
    ((in_slots, in_memory),) = await runtime.engine.collective_rpc("slot_numbers")
    assert {numbers[number] for number in in_memory} == {row["adapter_id"] for row in rows if row["tier"] != "disk"}
    slots = {row["adapter_id"] for row in rows if row["tier"] == "slot"}
    assert {numbers[number] for number in in_slots} == slots == {world.adapters[0], world.adapters[2]}
    calls = 0
    await asyncio.gather(*(world.ask(adapter_id) for adapter_id in world.adapters * 2))
    assert calls == 0
    text = await world.engine.metrics()
    assert 'imprint_adapter_hits_total{tier="slot"}' in text and "vllm:generation_tokens_total" in text


async def test_damaged_files_never_reach_vllm(world: World, tmp_path: Path) -> None:
    """A damaged local copy is fetched again; a damaged blob is set aside, and the base may answer in its place."""
    adapter_id = world.publish(make_adapter(tmp_path / "adapter", world.base, seed=31))
    first = _text((await world.ask(adapter_id))[1])
    await world.engine._loader.drop(adapter_id)
    (local,) = world.config.cache_dir.rglob(f"{adapter_id}/adapter_model.safetensors")
    damaged = bytearray(local.read_bytes())
    damaged[-1] ^= 255
    local.write_bytes(damaged)
    assert _text((await world.ask(adapter_id))[1]) == first

    await world.engine.forget(adapter_id)
    (blob,) = (world.config.data_dir / "blobs").rglob(f"{adapter_id}/adapter_model.safetensors")
    blob.write_bytes(damaged)
    context = replace(world.context(adapter_id), on_missing_adapter="base")
    body = {"model": "imprint", "messages": MESSAGES, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    head, answer = [item async for item in world.engine.respond("chat", body, context)]
    assert head["status"] == 200 and head["unavailable"]
    assert _text(answer) == _text((await world.ask(None))[1]) != first
    assert (await world.ask(adapter_id))[0]["status"] == 503
    adapter = world.registry.get_adapter(world.tenant_id, adapter_id)
    assert adapter is not None and adapter.state == "stale"
    assert (await world.ask(world.adapters[0]))[0]["status"] == 200


async def test_prefix_cache_is_the_tenants_own(world: World) -> None:
    """The same long prompt hits the cache for the same salt and adapter only."""
    messages = [{"role": "user", "content": "word " * 25 + str(time.time_ns())}]

    async def cached(adapter_id: str | None, salt: str) -> int:
        body = {"model": "x", "messages": messages, "max_tokens": 1}
        context = EngineContext(new_id("job"), world.tenant_id, adapter_id, salt)
        items = [item async for item in world.engine.respond("chat", body, context)]
        details = items[1]["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"] or 0) if details else 0

    adapter_id = world.adapters[0]
    assert await cached(adapter_id, "one") == 0
    assert await cached(adapter_id, "one") > 0
    assert await cached(adapter_id, "two") == 0
    assert await cached(None, "one") == 0
    assert await cached(world.adapters[1], "one") == 0


async def test_metrics_are_vllms_without_adapter_names(world: World) -> None:
    await world.ask(world.adapters[0])
    text = await world.engine.metrics()
    assert "vllm:generation_tokens_total" in text
    assert "adp_" not in text


async def test_an_engine_without_the_plugin_does_not_serve(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.engine._runtime is not None
    monkeypatch.setattr("serve.lora_cpu.WRAPPER_PATH", "another.Wrapper")
    with pytest.raises(RuntimeError, match="imprint_lora_cpu was not loaded"):
        await world.engine._runtime.verify()
