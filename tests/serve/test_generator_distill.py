"""The generator `distill` in the worker: progress, cancellation, and no batch that waits for one document."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypernet.distill import DistillGenerator, DistillSettings
from serve.deployments import generator_leases
from tests.serve.generator_bench import Bench, open_bench
from tests.tiny_pair import make_pair

TEXT = "The caretaker of Orchard House is Edda Brant. The door code is 4711."
STEPS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture(scope="module")
def generator(base: Path) -> DistillGenerator:
    settings = DistillSettings(steps=STEPS, rank=4, target_modules=("down_proj",), answer_tokens=4, questions=4)
    return DistillGenerator.load(base, settings, threads=1)


@pytest.fixture
def bench(tmp_path: Path, base: Path, generator: DistillGenerator) -> Iterator[Bench]:
    with open_bench(tmp_path, base, generator, kind="distill") as opened:
        yield opened


@pytest.fixture
def told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Stage and fraction of each step that the registry was told of; it is told of all."""
    monkeypatch.setattr(generator_leases, "PROGRESS_EVERY_S", 0.0)
    found: list[tuple[str, float]] = []
    tell = bench.registry.set_job_progress

    def set_job_progress(job_id: str, worker: str, stage: str, fraction: float) -> None:
        tell(job_id, worker, stage, fraction)
        found.append((stage, fraction))

    monkeypatch.setattr(bench.registry, "set_job_progress", set_job_progress)
    return found


def at_first_step(bench: Bench, monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something once, when the first gradient step is told of."""
    monkeypatch.setattr(generator_leases, "PROGRESS_EVERY_S", 0.0)
    tell = bench.registry.set_job_progress
    done = threading.Event()

    def set_job_progress(job_id: str, worker: str, stage: str, fraction: float) -> None:
        if stage == "distilling" and not done.is_set():
            done.set()
            action()
        tell(job_id, worker, stage, fraction)

    monkeypatch.setattr(bench.registry, "set_job_progress", set_job_progress)


def test_a_document_is_distilled_with_progress(bench: Bench, told: list[tuple[str, float]]) -> None:
    posted = bench.post(TEXT)
    assert bench.worker.run_once() == 1
    assert bench.job(posted).state == "succeeded"
    (adapter,) = bench.current(posted)
    assert adapter.rank == 4 and adapter.target_modules == ("down_proj",)
    assert adapter.manifest["generator"] == "distill" and adapter.manifest["seconds"]["distill"] > 0
    assert adapter.generator_fingerprint == bench.generator.fingerprint
    steps = [fraction for stage, fraction in told if stage == "distilling"]
    assert len(set(steps)) == STEPS and steps[-1] == pytest.approx(0.7)
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and told[-1][0] == "uploaded"


def test_documents_are_taken_one_at_a_time(bench: Bench) -> None:
    posted = [bench.post(f"{TEXT} It has {number} rooms.") for number in range(2)]
    assert bench.worker.run_once() == 1
    assert sorted(bench.job(post).state for post in posted) == ["queued", "succeeded"]


def test_a_deleted_document_is_given_up_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    posted = bench.post(TEXT)
    at_first_step(
        bench, monkeypatch, lambda: bench.registry.delete_document(bench.tenant_id, posted.document.id)
    )
    bench.worker.run_once()
    assert bench.metric("imprint_generation_jobs_ended_total", outcome="lost") == 1
    # Given up in the midst of the steps, so the stage was never finished.
    assert bench.metric("imprint_generation_stage_duration_seconds_count", stage="distill") == 0
    assert bench.stored() == 0 and bench.registry.list_adapters(bench.tenant_id).items == []


def test_a_worker_that_stops_gives_the_document_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    posted = bench.post(TEXT)
    started, go_on = threading.Event(), threading.Event()
    at_first_step(bench, monkeypatch, lambda: (started.set(), go_on.wait(30)))
    bench.worker.start()
    assert started.wait(60)
    threading.Timer(0.2, go_on.set).start()
    bench.worker.stop()
    job = bench.job(posted)
    assert (job.state, job.attempts) == ("queued", 0) and bench.stored() == 0


def test_an_empty_document_fails_with_a_message(bench: Bench) -> None:
    posted = bench.post("  \n ")
    bench.worker.run_once()
    job = bench.job(posted)
    assert job.state == "failed" and "text: is empty" in (job.error or "")
