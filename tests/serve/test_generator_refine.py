"""Refinement in the worker, with the shipped pair: better adapters replace published ones, and nothing else does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hypernet import nano
from hypernet.distill_loop import Distilled, Distiller, DistillSettings
from hypernet.documents import DocumentText
from hypernet.gate import GateReport
from hypernet.generate import GeneratedAdapter, GeneratedDocument, HypernetGenerator
from hypernet.lora import LoraAdapter
from hypernet.probes import Probe
from serve.deployments.generator_gate import AdapterGate
from serve.deployments.generator_jobs import Plan
from serve.deployments.generator_refine import LOOK_EVERY_S, MIN_GAIN, is_better
from serve.deployments.generator_store import Span
from serve.niceness import BACKGROUND
from serve.registry.records import DocumentVersion, Job, LeasedJob
from tests.serve.generator_bench import Bench, nano_gate, nano_generator, open_bench

TITLE = "Orchard House"
TEXT = ("The caretaker of Orchard House is Edda Brant. The door code is 4711. The rent is 830 euros a month. "
        "The house opens at 7:15.")


class WeakGenerator:
    """The shipped pair, but every adapter has a third of its strength: there is something to improve."""

    def __init__(self, generator: HypernetGenerator) -> None:
        self._generator = generator
        self.base_fingerprint, self.fingerprint = generator.base_fingerprint, "weak"

    def plan(self, document: DocumentText) -> Plan:
        return self._generator.plan(document)

    def generate(self, documents: Sequence[DocumentText], plans: Sequence[Plan]) -> list[GeneratedDocument]:
        return [GeneratedDocument([_weak(part) for part in made.parts])
                for made in self._generator.generate(documents, plans)]


def _weak(part: GeneratedAdapter) -> GeneratedAdapter:
    return replace(part, lora=replace(part.lora, alpha=part.lora.alpha / 3))


def distiller(**settings: Any) -> Distiller:
    generator = nano_generator()
    few = {"steps": 6, "seconds": 60, "questions": 8, **settings}
    return Distiller(generator.base, generator.tokenizer, DistillSettings(**few))


def weak_bench(folder: Path, trainer: Distiller | None = None) -> AbstractContextManager[Bench]:
    return open_bench(folder, nano.base_dir(), WeakGenerator(nano_generator()), gate=nano_gate(),
                      distiller=trainer or distiller(), refine={"after_s": 0, "budget_s": 60})


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with weak_bench(tmp_path) as opened:
        yield opened


@pytest.fixture
def leased(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[LeasedJob]:
    """Every job that the worker has taken so far."""
    found: list[LeasedJob] = []
    lease = bench.registry.lease_jobs

    def lease_jobs(*arguments: Any) -> list[LeasedJob]:
        taken = lease(*arguments)
        found.extend(taken)
        return taken

    monkeypatch.setattr(bench.registry, "lease_jobs", lease_jobs)
    return found


def outcome(bench: Bench, name: str) -> float:
    return bench.metric("imprint_refine_jobs_ended_total", outcome=name)


def during_training(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something once, in the middle of the next refinement, and then let it go on."""
    whole = Distiller.distill
    done = threading.Event()

    def distill(self: Distiller, document: DocumentText, questions: Sequence[str], start: LoraAdapter | None,
                rank: int | None, on_progress: Callable[[float], None], cancelled: Callable[[], bool],
                settings: DistillSettings | None, spans: Sequence[tuple[int, int]]) -> Distilled:
        def progress(share: float) -> None:
            if not done.is_set():
                done.set()
                action()
                time.sleep(2 * LOOK_EVERY_S)
            on_progress(share)

        return whole(self, document, questions, start, rank, progress, cancelled, settings, spans)

    monkeypatch.setattr(Distiller, "distill", distill)


def job_of(bench: Bench, item: LeasedJob) -> Job:
    job = bench.registry.get_job(bench.tenant_id, item.job.id)
    assert job is not None
    return job


def test_a_better_adapter_replaces_the_published_one(bench: Bench, leased: list[LeasedJob]) -> None:
    posted = bench.post(TEXT, TITLE)
    assert bench.worker.run_once() == 1
    (old,) = bench.current(posted)
    assert bench.worker.run_once() == 1
    (new,) = bench.current(posted)
    assert new.id != old.id and new.state == "ready" and new.version == old.version
    assert new.manifest["gate"]["score"] >= (old.manifest["gate"]["score"] or 0) + MIN_GAIN
    assert new.manifest["refined"]["from"] == old.id and new.manifest["refined"]["steps"] > 0
    assert new.manifest["chunks"] == old.manifest["chunks"]
    assert (new.base_fingerprint, new.generator_fingerprint) == (old.base_fingerprint, old.generator_fingerprint)
    retired = bench.registry.get_adapter(bench.tenant_id, old.id)
    assert retired is not None and retired.retired_at is not None
    job = job_of(bench, leased[-1])
    assert (job.kind, job.state, job.adapter_id) == ("refine", "succeeded", new.id)
    assert bench.document(posted).state == "ready"
    assert outcome(bench, "better") == 1
    assert bench.worker.run_once() == 0 and list(bench.config.staging_dir.iterdir()) == []


def test_both_adapters_are_asked_for_what_the_text_says(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for what the base makes of it: the values of the text are what is taught."""
    bench.post(TEXT, TITLE)
    bench.worker.run_once()
    asked: list[Sequence[Probe]] = []
    whole = AdapterGate.check

    def check(self: AdapterGate, version: DocumentVersion, lora: LoraAdapter, spans: Sequence[Span],
              probes: Sequence[Probe], source: str | None) -> GateReport | None:
        asked.append(probes)
        return whole(self, version, lora, spans, probes, source)

    monkeypatch.setattr(AdapterGate, "check", check)
    bench.worker.run_once()
    before, after = asked
    assert before == after
    assert {probe.answer for probe in before} == {"Edda Brant", "4711", "830 euros a month", "7:15"}


def test_an_adapter_that_is_no_better_is_not_published(tmp_path: Path) -> None:
    with weak_bench(tmp_path, distiller(steps=1, learning_rate=1e-9)) as bench:
        posted = bench.post(TEXT, TITLE)
        bench.worker.run_once()
        before = bench.current(posted)
        assert bench.worker.run_once() == 1
        assert bench.current(posted) == before and bench.stored() == 1
        assert outcome(bench, "not_better") == 1
        assert bench.registry.count_jobs("refine") == {"queued": 0, "running": 0, "succeeded": 1, "failed": 0}


def test_a_refinement_makes_room_for_a_document(
    bench: Bench, leased: list[LeasedJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    posted = bench.post(TEXT, TITLE)
    bench.worker.run_once()
    (old,) = bench.current(posted)
    during_training(monkeypatch, lambda: bench.post("Room 3 is let to Olaf Pries.", "Rooms"))
    bench.worker.run_once()
    job = job_of(bench, leased[-1])
    assert (job.kind, job.state, job.attempts) == ("refine", "queued", 0)
    assert bench.current(posted) == [old] and outcome(bench, "made_room") == 1
    bench.worker.run_once()
    assert leased[-1].job.kind == "generate"
    assert job_of(bench, leased[-1]).state == "succeeded"
    assert {bench.worker.run_once(), bench.worker.run_once()} == {1}
    assert bench.current(posted)[0].id != old.id


def test_a_refinement_of_an_old_version_is_not_published(
    bench: Bench, leased: list[LeasedJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    posted = bench.post(TEXT, TITLE, external_id="house")
    bench.worker.run_once()
    (old,) = bench.current(posted)
    during_training(monkeypatch, lambda: bench.post("The house was sold.", TITLE, external_id="house"))
    bench.worker.run_once()
    assert bench.current(posted) == [old] and bench.stored() == 1
    job = job_of(bench, leased[-1])
    assert job.kind == "refine" and job.adapter_id is None
    assert outcome(bench, "outdated") == 1


def test_a_refinement_of_a_deleted_document_leaves_nothing(
    bench: Bench, leased: list[LeasedJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    posted = bench.post(TEXT, TITLE)
    bench.worker.run_once()
    during_training(
        monkeypatch, lambda: bench.registry.delete_document(bench.tenant_id, posted.document.id) 
    )
    bench.worker.run_once()
    assert bench.current(posted) == [] and bench.stored() == 1  # the deleted one, until it is purged
    assert outcome(bench, "outdated") == 1 and job_of(bench, leased[-1]).adapter_id is None


def test_refinement_leaves_the_processor_to_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.post(TEXT, TITLE)
    seen: list[int] = []
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    during_training(
        monkeypatch, lambda: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    )
    while bench.worker.run_once():
        pass
    assert seen == [max(mine, BACKGROUND)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


def test_a_refinement_ends_with_the_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    posted = bench.post(TEXT, TITLE)
    bench.worker.run_once()
    before = bench.current(posted)
    started, go_on = threading.Event(), threading.Event()
    during_training(monkeypatch, lambda: (started.set(), go_on.wait(30)))
    bench.worker.start()
    assert started.wait(30)
    threading.Timer(0.2, go_on.set).start()
    bench.worker.stop()
    assert not bench.worker.alive()
    assert bench.registry.count_jobs("refine") == {"queued": 1, "running": 0, "succeeded": 0, "failed": 0}
    assert bench.current(posted) == before and bench.stored() == 1


HOUSES = [f"The caretaker of house {i} is {name} Brant. The rent of house {i} is {310 + 7 * i} euros a month. "
          f"The door code of house {i} is {4011 + 13 * i}." for i, name in enumerate(("Edda", "Olaf", "Mira"))]


def many_parts(folder: Path, budget_s: float) -> AbstractContextManager[Bench]:
    generator = HypernetGenerator(nano.hypernet_dir(), nano.base_dir(), chunks_per_part=1)
    return open_bench(folder, nano.base_dir(), WeakGenerator(generator), gate=nano_gate(), distiller=distiller(),
                      refine={"after_s": 0, "budget_s": budget_s})


def test_only_so_many_parts_are_refined_as_the_time_allows(tmp_path: Path) -> None:
    with many_parts(tmp_path, budget_s=0.01) as bench:
        posted = bench.post("\n\n".join(HOUSES * 3), "Houses")
        bench.worker.run_once()
        assert len(bench.current(posted)) > 1
        bench.worker.run_once()
        judged = [bench.metric("imprint_gate_results_total", source="refine", state=state)
                  for state in ("ready", "degraded")]
        assert sum(judged) == 1


def test_of_several_parts_only_the_better_ones_change(tmp_path: Path) -> None:
    with many_parts(tmp_path, budget_s=60) as bench:
        posted = bench.post("\n\n".join(HOUSES * 3), "Houses")
        bench.worker.run_once()
        old = bench.current(posted)
        bench.worker.run_once()
        new = bench.current(posted)
        assert len(old) > 1 and len(new) == len(old)
        assert not {adapter.id for adapter in new} & {adapter.id for adapter in old}
        for before, after in zip(old, new, strict=True):
            assert (after.part, after.manifest["chunks"]) == (before.part, before.manifest["chunks"])
            if "refined" not in after.manifest:
                assert after.state == before.state and after.checksum == before.checksum
        assert any("refined" in adapter.manifest for adapter in new)


def test_which_adapter_is_better() -> None:
    report = GateReport("ready", 0.5, 0.15, -1.0, -3.0, 0.0, -3.0, 2.0, 8, (), 0.1)
    assert is_better(report, replace(report, score=0.5 + MIN_GAIN))
    assert not is_better(report, replace(report, score=0.5 + MIN_GAIN / 2))
    assert not is_better(report, replace(report, state="degraded", score=0.9))
    assert is_better(replace(report, state="degraded", score=None), report)
    assert is_better(replace(report, state="degraded"), replace(report, score=0.4))
