"""Another encoder: documents are embedded anew in the background, and the old index serves until the switch. Two tiny
real encoders, real registry, worker and router."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import router.index
import router.search
import serve.deployments.generator_embed as generator_embed
from hypernet.generate import HypernetGenerator
from router.embed import MiniLmEncoder, encoder_name
from router.shipped import CALIBRATION_FILE
from serve.config import ImprintConfig, RouterConfig
from serve.deployments.generator_embed import EmbedAnew
from serve.deployments.generator_store import embedded
from serve.deployments.router import RouterDeployment
from serve.deployments.router_encoders import key_of, name_of
from serve.metrics import GeneratorMetrics
from serve.registry import Registry, migrate
from serve.registry.records import DocumentVersion, NewCentroids, NewPart, StoredCalibration
from tests.serve.generator_bench import Bench, open_bench
from tests.serve.registry_helpers import new_adapter
from tests.tiny_encoder import make_encoder
from tests.tiny_pair import make_pair

NAMES = ("Aster", "Borea", "Corvo", "Delfin", "Estrel", "Falken", "Gentian", "Heron")
WORDS = " ".join(NAMES) + " data sheet weighs how heavy is the kg it costs euros what does cost kelp"


def text(name: str) -> str:
    return f"The {name} weighs {NAMES.index(name)} kg. It costs 40 euros."


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The old encoder and the new one, as the configuration names them."""
    folder = tmp_path_factory.mktemp("encoders")
    return make_encoder(folder / "old", WORDS, 96, seed=1), make_encoder(folder / "new", WORDS, 128, seed=2)


@pytest.fixture(scope="module")
def old(paths: tuple[str, str]) -> MiniLmEncoder:
    return MiniLmEncoder.load(paths[0])


@pytest.fixture(scope="module")
def new(paths: tuple[str, str]) -> MiniLmEncoder:
    return MiniLmEncoder.load(paths[1])


class Scene:
    """A tenant whose documents a worker of the old encoder has published."""

    def __init__(self, data_dir: Path, old: MiniLmEncoder, new: MiniLmEncoder) -> None:
        migrate(f"sqlite:///{data_dir}/registry.db")
        self.data_dir, self.old, self.new = data_dir, old, new
        self.registry = Registry.open(f"sqlite:///{data_dir}/registry.db")
        self.tenant = self.registry.create_tenant("acme").id
        self.adapters: dict[str, str] = {}
        for name in NAMES[:6]:
            self.publish(name, old)

    def publish(self, name: str, *encoders: MiniLmEncoder, **post: Any) -> str:
        """As a worker of these encoders does; gives the document's ID."""
        adapter = new_adapter(manifest={"chunks": []})
        posted = self.registry.post_document(self.tenant, f"{name} data sheet", text(name), **post)
        first, *more = [embedded(one, RouterConfig(), posted.version, (), False) for one in encoders]
        self.registry.lease_jobs("maker", 10, 60.0)
        made: NewPart = (adapter, first, *more)
        self.registry.publish(posted.job.id, "maker", [made])
        self.adapters[name] = adapter.id
        return posted.document.id

    def worker(self) -> EmbedAnew:
        """The part of the new encoder's worker that embeds documents anew."""
        return EmbedAnew(self.registry, self.new, RouterConfig(), GeneratorMetrics(), threading.Event())

    def router(self, paths: tuple[str, str], previous: bool = True) -> RouterDeployment:
        settings = {"encoder": paths[1], "previous_encoder": paths[0] if previous else None, "calibrate_every_s": 0,
                    "threshold": 0.0}  # the best document answers
        return RouterDeployment(ImprintConfig(data_dir=self.data_dir, router=settings))

    def encoder_in_use(self, deployment: RouterDeployment) -> str:
        index = deployment._indexes.current(self.tenant)
        return index.encoder


@pytest.fixture
def scene(tmp_path: Path, old: MiniLmEncoder, new: MiniLmEncoder) -> Iterator[Scene]:
    made = Scene(tmp_path, old, new)
    yield made
    made.registry.close()


async def found(deployment: RouterDeployment, scene: Scene) -> dict[str, str]:
    """Name -> the name of the document that answers a question about it; "" where none does."""
    by_adapter = {adapter: name for name, adapter in scene.adapters.items()}
    answers = {}
    for name in scene.adapters:
        messages = [{"role": "user", "content": f"How heavy is the {name}?"}]
        decision = await deployment.route({"tenant_id": scene.tenant, "model": "imprint", "messages": messages})
        answers[name] = by_adapter.get(decision["adapter_id"] or "", "")
    return answers


async def test_the_old_index_serves_until_the_last_document_has_new_vectors(
    scene: Scene, paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(generator_embed, "BATCH", 4)
    deployment, worker = scene.router(paths), scene.worker()
    embedded_with: list[str] = []
    whole = MiniLmEncoder.embed_one
    monkeypatch.setattr(MiniLmEncoder, "embed_one",
                        lambda self, asked: embedded_with.append(key_of(name_of(self))) or whole(self, asked))
    expected = {name: name for name in NAMES[:6]}
    assert await found(deployment, scene) == expected
    old, new = key_of(name_of(scene.old)), key_of(name_of(scene.new))
    assert scene.encoder_in_use(deployment) == old and set(embedded_with) == {old}

    # Half way, with a document that came meanwhile and one that was replaced.
    assert worker.run_once() and scene.registry.count_lacking(name_of(scene.new)) == 2
    scene.publish("Gentian", scene.new, scene.old)
    expected["Gentian"] = "Gentian"
    assert await found(deployment, scene) == expected
    assert await found(scene.router(paths), scene) == expected, "also after a restart"
    deployment._upkeep.run_once()
    assert scene.encoder_in_use(deployment) == old and set(embedded_with) == {old}

    # After the last one: the next request may still be answered from the old one, and all are answered rightly.
    while worker.run_once():
        pass
    assert scene.registry.count_lacking(name_of(scene.new)) == 0
    assert worker._metrics.registry.get_sample_value("imprint_embed_adapters_left") == 0
    assert await found(deployment, scene) == expected
    wait_for(lambda: scene.encoder_in_use(deployment) == new)
    embedded_with.clear()
    assert await found(deployment, scene) == expected and set(embedded_with) == {new}
    scene.publish("Heron", scene.new, scene.old)
    assert await found(deployment, scene) == {**expected, "Heron": "Heron"}
    previous = deployment._encoders._previous
    assert previous is not None and previous._loaded is not None
    assert "can be taken out of the configuration" not in caplog.text
    deployment._upkeep.run_once()
    assert previous._loaded is None and "can be taken out of the configuration" in caplog.text
    assert await found(scene.router(paths, previous=False), scene) == {**expected, "Heron": "Heron"}
    fresh = scene.router(paths)
    assert await found(fresh, scene) == {**expected, "Heron": "Heron"}
    assert fresh._encoders._previous is not None and fresh._encoders._previous._loaded is None, "nobody needs it"


async def test_no_request_notices_the_switch(scene: Scene, paths: tuple[str, str]) -> None:
    deployment, worker = scene.router(paths), scene.worker()
    wrong: list[dict[str, str]] = []
    rounds = 0
    over = threading.Event()

    def ask() -> None:
        nonlocal rounds
        while not over.is_set():
            answers = asyncio.run(found(deployment, scene))
            wrong.extend([answers] if any(name != answer for name, answer in answers.items()) else [])
            rounds += 1

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    while worker.run_once():
        pass
    wait_for(lambda: scene.encoder_in_use(deployment) == key_of(name_of(scene.new)))
    after = rounds + 4
    wait_for(lambda: rounds > after)
    over.set()
    for thread in asking:
        thread.join()
    assert wrong == []


async def test_a_tenant_that_nobody_asks_about_is_switched_by_upkeep(scene: Scene, paths: tuple[str, str]) -> None:
    deployment, worker = scene.router(paths), scene.worker()
    await found(deployment, scene)
    while worker.run_once():
        pass
    index = deployment._indexes.in_memory(scene.tenant)
    assert index is not None and index.encoder == key_of(name_of(scene.old))
    deployment._upkeep.run_once()
    index = deployment._indexes.in_memory(scene.tenant)
    assert index is not None and index.encoder == key_of(name_of(scene.new)) and len(index) == 6


async def test_without_a_previous_encoder_documents_are_routed_to_when_they_are_embedded(
    scene: Scene, paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generator_embed, "BATCH", 2)
    deployment, worker = scene.router(paths, previous=False), scene.worker()
    assert set((await found(deployment, scene)).values()) == {""}
    assert "6 adapters of" in caplog.text and "are not routed to" in caplog.text
    for count in (2, 4, 6):
        assert worker.run_once()
        answers = await found(deployment, scene)
        assert sum(name == answer for name, answer in answers.items()) == count
    assert not worker.run_once()


async def test_an_index_on_disk_is_that_of_the_encoder_in_use(
    scene: Scene, paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.index, "FLAT_ROWS", 10)
    monkeypatch.setattr(router.search, "MAX_EXACT_ROWS", 5)
    expected = {name: name for name in NAMES[:6]}
    deployment, worker = scene.router(paths), scene.worker()
    state = scene.data_dir / "router-index" / scene.tenant / "state.json"
    assert await found(deployment, scene) == expected
    wait_for(state.exists)
    assert key_of(name_of(scene.old)) in state.read_text()
    while worker.run_once():
        pass
    deployment._upkeep.run_once()
    wait_for(lambda: state.exists() and key_of(name_of(scene.new)) in state.read_text())
    assert await found(deployment, scene) == expected == await found(scene.router(paths), scene)


async def test_a_calibration_counts_for_its_encoder_alone(scene: Scene, paths: tuple[str, str]) -> None:
    deployment, worker = scene.router(paths), scene.worker()

    def store(encoder: MiniLmEncoder, version: int) -> None:
        name = {"encoder": encoder.id, "encoder_version": encoder.version, "version": version}
        body = json.loads(CALIBRATION_FILE.read_text()) | name
        row = StoredCalibration(scene.tenant, "live", encoder.id, encoder.version, "gen-1", 1, 0.0, body)
        assert scene.registry.store_calibration(row, version - 1) is not None
        deployment._calibrations.refresh()

    async def used() -> dict[str, Any] | None:
        messages = [{"role": "user", "content": "How heavy is the Corvo?"}]
        decision = await deployment.route({"tenant_id": scene.tenant, "model": "imprint", "messages": messages})
        assert (decision["calibration"] is None) == (decision["confidence"] is None)
        calibration: dict[str, Any] | None = decision["calibration"]
        return calibration

    assert await used() is None, "none is shipped for these encoders"
    store(scene.old, 1)
    calibration = await used()
    assert calibration is not None and calibration["encoder"] == "old"
    store(scene.new, 2)
    assert await used() is None, "the old one serves"
    while worker.run_once():
        pass
    deployment._upkeep.run_once()
    calibration = await used()
    assert calibration is not None and (calibration["encoder"], calibration["version"]) == ("new", 2)


def test_work_on_documents_goes_first_and_failures_are_told_and_tried_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = scene.worker()
    scene.registry.post_document(scene.tenant, "Heron data sheet", text("Heron"))
    assert worker.run_once() and scene.registry.count_lacking(name_of(scene.new)) == 6, "a document waits"
    scene.registry.lease_jobs("maker", 10, 60.0)
    whole = generator_embed.embedded

    def fails(encoder: MiniLmEncoder, settings: RouterConfig, version: DocumentVersion, *rest: Any) -> NewCentroids:
        if "Corvo" in version.title:
            raise ValueError("not finite")
        return whole(encoder, settings, version, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(generator_embed, "embedded", fails)
        assert worker.run_once() and not worker.run_once() and not worker.run_once()
    assert scene.registry.count_lacking(name_of(scene.new)) == 1
    assert worker._metrics.registry.get_sample_value("imprint_embed_adapters_left") == 1
    assert caplog.text.count("cannot be embedded") == 1, "at the next look again, not before"
    worker._look_at = 0.0
    assert worker.run_once() and not scene.registry.lacks_any(name_of(scene.new))


def test_two_workers_share_the_documents(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = scene.worker(), scene.worker()
    done: list[str] = []
    whole = generator_embed.embedded

    def embeds(encoder: MiniLmEncoder, settings: RouterConfig, version: DocumentVersion, *rest: Any) -> NewCentroids:
        done.append(version.title)
        if len(done) == 2:
            second.run_once()
        return whole(encoder, settings, version, *rest)

    monkeypatch.setattr(generator_embed, "embedded", embeds)
    head = scene.registry.head(scene.tenant)
    while first.run_once():
        pass
    assert not scene.registry.lacks_any(name_of(scene.new))
    assert scene.registry.head(scene.tenant) == head + 6, "one change for each document, whoever was first"
    assert len(done) <= 7, "the document that both had begun is the only one done twice"


def test_the_worker_embeds_old_and_new_documents_alike(
    tmp_path: Path, old: MiniLmEncoder, new: MiniLmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, checkpoint = make_pair(tmp_path / "pair")
    generator = HypernetGenerator.load(checkpoint, base, chunks_per_part=1)
    long = " ".join(text(name) * 4 for name in NAMES)

    def post(bench: Bench) -> str:
        posted = bench.post(long, "Norvia data sheets")
        bench.worker.run_once()
        assert bench.job(posted).state == "succeeded"
        return posted.document.id

    with open_bench(tmp_path, base, generator, embedder=old) as bench:
        before = post(bench)
        count = len(bench.registry.routable(bench.tenant_id))
        assert count > 1, "several parts"
        assert bench.registry.count_lacking(name_of(new)) == count
    with open_bench(tmp_path, base, generator, embedder=new, previous_embedder=old, poll_s=0.05) as bench:
        other = bench.registry.create_tenant("globex").id
        bench.tenant_id, mine = other, bench.tenant_id
        after = post(bench)
        assert bench.registry.count_lacking(name_of(new)) == count, "the new document has both"
        assert bench.registry.count_lacking(name_of(old)) == 0
        bench.worker.start()
        wait_for(lambda: not bench.registry.lacks_any(name_of(new)))
        wait_for(lambda: bench.metrics.registry.get_sample_value("imprint_embed_adapters_left") == 0)
        assert bench.worker.alive()
        for encoder in (old, new):
            theirs = bench.registry.routable(other, [after], name_of(encoder))
            ours = bench.registry.routable(mine, [before], name_of(encoder))
            assert len(theirs) == len(ours) == count
            for one, two in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one.centroids, two.centroids, atol=1e-5)


def test_an_encoder_is_named_without_loading_it(paths: tuple[str, str], old: MiniLmEncoder, tmp_path: Path) -> None:
    assert encoder_name(paths[0]) == name_of(old) and encoder_name("minilm")[0] == "minilm"
    with pytest.raises(FileNotFoundError):
        encoder_name(str(tmp_path / "absent"))


@pytest.mark.parametrize("previous", ["", "minilm"])
def test_the_previous_encoder_is_another_one(previous: str) -> None:
    with pytest.raises(ValueError, match=r"previous_encoder .* must be another encoder"):
        RouterConfig(previous_encoder=previous)
