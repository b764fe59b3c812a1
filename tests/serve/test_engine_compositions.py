"""Compositions in the engine: made once, of the tenant's own adapters, kept within their budget, dropped with a member.

The engine deployment over a real registry, blob store and node cache, with vLLM's own adapter lists and no model. With
the model: tests/e2e/test_composition.py.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hypernet.compose import compose
from hypernet.lora import WEIGHTS, LoraAdapter
from serve.deployments import engine_compositions
from serve.deployments.engine import EngineContext, EngineDeployment
from serve.deployments.engine_compositions import folder_for_compositions
from serve.deployments.engine_context import Member, composition_id
from serve.ids import new_id
from tests.hypernet.helpers import random_lora
from tests.serve.engine_helpers import World, vllm, world

__all__ = ["world"]

RANK = 8  # as the helper's adapters are registered


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(engine_compositions, "SHARED_MEMORY", folder)
    monkeypatch.setattr(engine_compositions, "EVICT_IDLE_S", 0.0)
    return folder


def publish(world: World, seed: int) -> str:
    """A document with a real adapter; its external ID is the seed."""
    world.source = world.config.data_dir / f"source-{seed}"
    random_lora(seed, rank=RANK, alpha=float(RANK)).save(world.source)
    return world.publish(str(seed), f"text {seed}")


def request(
    world: World, engine: EngineDeployment, members: Sequence[Member], tenant_id: str = "", **body: Any
) -> AsyncGenerator[Any, None]:
    context = EngineContext(
        new_id("job"), tenant_id or world.tenant_id, composition_id(members), "salt", members=tuple(members)
    )
    return engine.respond("chat", {"model": "imprint", **body}, context)


async def ask(world: World, engine: EngineDeployment, members: Sequence[Member], tenant_id: str = "") -> Any:
    """(status, answer)"""
    head, answer = [item async for item in request(world, engine, members, tenant_id)]
    return head["status"], answer


def folders(shared_memory: Path) -> dict[str, Path]:
    """What is there, by name; nothing half-made or half-deleted may be."""
    found = {path.name: path for path in shared_memory.glob("*/*/*")} | {
        path.name: path for path in shared_memory.glob("*/*/.*")
    }
    assert all(name.startswith("cmp_") for name in found), found
    return found


async def test_a_composition_is_made_once(world: World, shared_memory: Path) -> None:
    engine = world.start()
    first, second = publish(world, 1), publish(world, 2)
    members = [(second, 0.5), (first, -1.0)]
    assert (await ask(world, engine, members))[0] == 200
    assert (await ask(world, engine, list(reversed(members))))[0] == 200
    name = composition_id(members)
    assert vllm(engine).loaded == {name} and len(vllm(engine).numbers) == 1
    (folder,) = folders(shared_memory).values()
    assert folder.name == name and folder.parents[1].stat().st_mode & 0o077 == 0
    expected = compose([random_lora(1, RANK, RANK), random_lora(2, RANK, RANK)], [-1.0, 0.5], 2 * RANK)
    found = LoraAdapter.load(folder)
    assert (found.rank, found.alpha) == (2 * RANK, 2 * RANK) and found.tensors.keys() == expected.tensors.keys()
    for path, (a, b) in expected.tensors.items():
        assert torch.equal(found.tensors[path][0], a) and torch.equal(found.tensors[path][1], b)


async def test_other_weights_are_another_adapter_for_vllm(world: World, shared_memory: Path) -> None:
    engine = world.start()
    first, second = publish(world, 1), publish(world, 2)
    several = [[(first, 1.0), (second, weight)] for weight in (1.0, 2.0)] + [[(first, 2.0)]]
    for members in several:
        assert (await ask(world, engine, members))[0] == 200
    assert vllm(engine).loaded == set(folders(shared_memory)) == set(map(composition_id, several))
    assert len(set(vllm(engine).numbers)) == 3


async def test_all_who_ask_at_once_share_one_making(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = world.start()
    members = [(publish(world, seed), 1.0) for seed in range(3)]
    makings = []
    write = engine._compositions._write

    def counted(name: str, *rest: Any) -> int:
        # Their files must not be deleted while they are read.
        assert all(engine._residency.idle_s(adapter_id) is None for adapter_id, _ in members)
        makings.append(name)
        return write(name, *rest)

    monkeypatch.setattr(engine._compositions, "_write", counted)
    answers = await asyncio.gather(*(ask(world, engine, members) for _ in range(5)))
    assert [status for status, _ in answers] == [200] * 5
    assert makings == [composition_id(members)] and len(vllm(engine).numbers) == 1
    assert all(engine._residency.idle_s(adapter_id) is not None for adapter_id, _ in members)


async def test_all_members_must_be_the_tenants_own(world: World, shared_memory: Path) -> None:
    engine = world.start()
    members = [(publish(world, seed), 1.0) for seed in range(2)]
    other = world.registry.create_tenant("globex").id
    for wrong in (members, [(new_id("adp"), 1.0)]):
        status, answer = await ask(world, engine, wrong, other)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert folders(shared_memory) == {}
    assert (await ask(world, engine, members))[0] == 200
    status, answer = await ask(world, engine, members, other)
    assert status == 404, "also when it has been made, and vLLM holds it"


async def test_ranks_past_the_cap_are_refused(world: World, shared_memory: Path) -> None:
    world.config.engine.max_lora_rank = 2 * RANK
    engine = world.start()
    members = [(publish(world, seed), 1.0) for seed in range(3)]
    status, answer = await ask(world, engine, members)
    assert (status, answer["error"]["param"]) == (400, "adapters")
    assert "add up to 24, more than engine.max_lora_rank = 16" in answer["error"]["message"]
    assert (await ask(world, engine, members[:2]))[0] == 200


async def test_the_longest_idle_go_when_there_is_no_room(world: World, shared_memory: Path) -> None:
    world.config.engine.max_loras = 4
    engine = world.start()
    adapters = [publish(world, seed) for seed in range(4)]
    several = [[(adapters[0], 1.0), (one, 1.0)] for one in adapters[1:]]
    assert (await ask(world, engine, several[0]))[0] == 200
    size = sum(file.stat().st_size for folder in folders(shared_memory).values() for file in folder.iterdir())
    engine._compositions._max_bytes = 2 * size
    using = request(world, engine, several[0], stream=True)
    assert (await anext(using))["status"] == 200
    for members in (several[1], several[2]):
        assert (await ask(world, engine, members))[0] == 200
    await asyncio.wait_for(engine._compositions._shrinking, 10)  # type: ignore[arg-type]
    left = {composition_id(several[0]), composition_id(several[2])}
    assert set(folders(shared_memory)) == vllm(engine).loaded == left, "the longest idle, and never one in use"
    vllm(engine).finish.set()
    assert "[DONE]" in "".join([piece async for piece in using])
    assert (await ask(world, engine, several[1]))[0] == 200
    await asyncio.wait_for(engine._compositions._shrinking, 10)  # type: ignore[arg-type]
    assert len(folders(shared_memory)) == 2 and composition_id(several[1]) in folders(shared_memory)
    assert len(set(vllm(engine).numbers)) == len(vllm(engine).numbers), "vLLM never sees a number twice"


async def test_it_goes_with_its_members(world: World, shared_memory: Path) -> None:
    world.config.engine.max_loras = 4
    engine = world.start()
    adapters = [publish(world, seed) for seed in range(3)]
    kept, gone = [(adapters[0], 1.0), (adapters[1], 1.0)], [(adapters[0], 1.0), (adapters[2], 1.0)]
    for members in (kept, gone):
        assert (await ask(world, engine, members))[0] == 200
    assert await engine.drop_unneeded() == []
    world.registry.delete_document(world.tenant_id, "2")
    assert await engine.drop_unneeded() == [adapters[2], composition_id(gone)]
    assert set(folders(shared_memory)) == vllm(engine).loaded == {composition_id(kept)}
    assert (await ask(world, engine, gone))[0] == 404 and (await ask(world, engine, kept))[0] == 200


async def test_nothing_is_taken_from_under_a_request(world: World, shared_memory: Path) -> None:
    engine = world.start()
    members = [(publish(world, seed), 1.0) for seed in range(2)]
    using = request(world, engine, members, stream=True)
    assert (await anext(using))["status"] == 200
    world.registry.delete_document(world.tenant_id, "1")
    assert await engine.drop_unneeded() == [members[1][0]]
    assert set(folders(shared_memory)) == vllm(engine).loaded == {composition_id(members)}
    vllm(engine).finish.set()
    assert "[DONE]" in "".join([piece async for piece in using])
    assert await engine.drop_unneeded() == [composition_id(members)]
    assert folders(shared_memory) == {} and vllm(engine).loaded == set()


async def test_damaged_members(world: World, shared_memory: Path) -> None:
    engine = world.start()
    members = [(publish(world, seed), 1.0) for seed in range(2)]
    adapter = world.registry.get_adapter(world.tenant_id, members[1][0])
    assert adapter is not None
    stored = Path(world.config.blobs.url.removeprefix("file://")) / adapter.blob_path / WEIGHTS
    stored.write_bytes(stored.read_bytes()[:-4])
    status, answer = await ask(world, engine, members)
    assert (status, answer["error"]["code"]) == (503, "adapter_unavailable") and folders(shared_memory) == {}


async def test_files_that_are_no_adapter(world: World, shared_memory: Path) -> None:
    engine = world.start()
    members = [(publish(world, 0), 1.0), (world.publish("x"), 1.0)]
    (world.source / WEIGHTS).write_bytes(b"no weights")
    broken = [*members, (world.publish("y"), 1.0)]
    status, answer = await ask(world, engine, broken)
    assert (status, answer["error"]["code"]) == (503, "adapter_unavailable") and folders(shared_memory) == {}
    assert (await ask(world, engine, members))[0] == 200


async def test_a_cleared_folder_is_made_again(world: World, shared_memory: Path) -> None:
    engine = world.start()
    members = [(publish(world, seed), 1.0) for seed in range(2)]
    assert (await ask(world, engine, members))[0] == 200
    name = composition_id(members)
    assert await engine.forget(name)
    shutil.rmtree(folders(shared_memory)[name])
    assert (await ask(world, engine, members))[0] == 200
    assert set(folders(shared_memory)) == vllm(engine).loaded == {name}


async def test_nothing_outlives_the_engine(world: World, shared_memory: Path) -> None:
    engine = world.start()
    members = [(publish(world, seed), 1.0) for seed in range(2)]
    await ask(world, engine, members)
    await engine.shutdown()
    assert folders(shared_memory) == {}
    (shared_memory / f"{next(shared_memory.iterdir()).name}/0/.cmp_1.part").mkdir()
    (shared_memory / f"{next(shared_memory.iterdir()).name}/7/cmp_2").mkdir(parents=True)
    world.start()
    assert folders(shared_memory) == {}, "neither of its own folder's former engine nor of another that was killed"


async def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, shared_memory: Path) -> None:
    private = folder_for_compositions(tmp_path / "cache")
    assert private.parent == shared_memory
    private.chmod(0o755)
    assert folder_for_compositions(tmp_path / "cache") == tmp_path / "cache" / "compositions"
    private.rmdir()
    private.symlink_to(tmp_path)
    assert folder_for_compositions(tmp_path / "cache") == tmp_path / "cache" / "compositions"


