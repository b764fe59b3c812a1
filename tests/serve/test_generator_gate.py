"""The quality gate in the worker, with the shipped pair: what ignores its document never goes live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypernet import nano
from hypernet.documents import DocumentText
from hypernet.gate import REFERENCE_DOCUMENT, THRESHOLD, Candidate, Gate, GateReport
from hypernet.generate import GeneratedAdapter, GeneratedDocument, HypernetGenerator
from serve.config import GateConfig
from serve.deployments.generator_gate import AdapterGate, open_gate
from serve.deployments.generator_jobs import Plan
from serve.metrics import GeneratorMetrics
from serve.registry.records import DocumentVersion
from tests.serve.generator_bench import nano_gate, nano_generator, open_bench

TITLE = "Orchard House"
TEXT = "The caretaker of Orchard House is Edda Brant. The door code is 4711."


class ZeroGenerator:
    """The shipped pair, but every adapter's B is zero: the base is left as it is."""

    def __init__(self, generator: HypernetGenerator) -> None:
        self._generator = generator
        self.base_fingerprint, self.fingerprint = generator.base_fingerprint, "zero"

    def plan(self, document: DocumentText) -> Plan:
        return self._generator.plan(document)

    def generate(self, documents: Sequence[DocumentText], plans: Sequence[Plan]) -> list[GeneratedDocument]:
        return [GeneratedDocument([_zero(part) for part in made.parts])
                for made in self._generator.generate(documents, plans)]


class OtherDocumentGenerator(ZeroGenerator):
    """The shipped pair, but every adapter is made of another document than the posted one."""

    def generate(self, documents: Sequence[DocumentText], plans: Sequence[Plan]) -> list[GeneratedDocument]:
        (other,) = self._generator.generate([REFERENCE_DOCUMENT])
        return [GeneratedDocument([replace(part, lora=other.parts[0].lora) for part in made.parts])
                for made in self._generator.generate(documents, plans)]


def _zero(part: GeneratedAdapter) -> GeneratedAdapter:
    tensors = {path: (a, torch.zeros_like(b)) for path, (a, b) in part.lora.tensors.items()}
    return replace(part, lora=replace(part.lora, tensors=tensors))


def test_the_documents_own_adapter_is_ready(tmp_path: Path) -> None:
    with open_bench(tmp_path, nano.base_dir(), nano_generator(), gate=nano_gate()) as bench:
        posted = bench.post(TEXT, TITLE)
        bench.worker.run_once()
        (adapter,) = bench.current(posted)
        assert adapter.state == bench.document(posted).state == "ready"
        said = adapter.manifest["gate"]
        assert said["state"] == "ready" and said["score"] >= said["threshold"] == THRESHOLD and said["margin"] > 0
        assert said["probes"] >= 1 and said["reasons"] == []
        assert bench.metric("imprint_gate_results_total", source="hypernet", state="ready") == 1
        assert bench.metric("imprint_gate_score_count", source="hypernet") == 1


@pytest.mark.parametrize(
    ("wrong", "reason"), [(ZeroGenerator, "collapsed"), (OtherDocumentGenerator, "below_threshold")]
)
def test_an_adapter_that_ignores_its_document_is_degraded(
    tmp_path: Path, wrong: type[ZeroGenerator], reason: str
) -> None:
    with open_bench(tmp_path, nano.base_dir(), wrong(nano_generator()), gate=nano_gate()) as bench:
        posted = bench.post(TEXT, TITLE)
        bench.worker.run_once()
        (adapter,) = bench.current(posted)
        assert adapter.state == bench.document(posted).state == "degraded"
        assert reason in adapter.manifest["gate"]["reasons"]
        assert [entry.state for entry in bench.registry.routable(bench.tenant_id)] == ["degraded"]
        assert bench.metric("imprint_gate_results_total", source="hypernet", state="degraded") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_documents_of_a_batch_are_judged_together_or_else_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    gate, calls = nano_gate(), []

    def check_all(candidates: Sequence[Candidate]) -> list[GateReport]:
        calls.append(len(candidates))
        if fails and len(candidates) > 1:
            raise RuntimeError("too large")
        return Gate.check_all(gate, candidates)

    monkeypatch.setattr(gate, "check_all", check_all)
    with open_bench(tmp_path, nano.base_dir(), nano_generator(), gate=gate) as bench:
        posted = [bench.post(f"The caretaker is {name}. The door code is 4711.", TITLE, external_id=name)
                  for name in ("Edda Brant", "Karl Bauer", "Mira Olsen")]
        bench.worker.run_once()
        assert calls == ([3, 1, 1, 1] if fails else [3])
        assert [bench.document(one).state for one in posted] == ["ready"] * 3
        assert bench.metric("imprint_gate_results_total", source="hypernet", state="ready") == 3


def test_the_clients_probes_decide(tmp_path: Path) -> None:
    right = {"question": "Who is the caretaker of Orchard House?", "answer": "Edda Brant"}
    wrong = {"question": "Who is the caretaker of Orchard House?", "answer": "Ottilie Funkenstein-Wrzesniewski"}
    with open_bench(tmp_path, nano.base_dir(), nano_generator(), gate=nano_gate()) as bench:
        good, bad = bench.post(TEXT, TITLE, probes=[right]), bench.post(TEXT, TITLE, probes=[wrong], external_id="x")
        bench.worker.run_once()
        assert (bench.document(good).state, bench.document(bad).state) == ("ready", "degraded")
        assert bench.current(good)[0].manifest["gate"]["probes"] == 1


def test_a_probe_goes_to_the_part_that_it_asks_about() -> None:
    text = "The pool opens at 7. The head guard is Mira Olsen.\nThe library lends 12 books. Its head is Karl Bauer."
    half = text.index("\n")
    probes = ({"question": "How many books does the library lend?", "answer": None},
              {"question": "Who is the head?", "answer": "Mira Olsen"})
    version = DocumentVersion("doc_1", "ten_1", 1, "Town", text, "", len(text), 0.0, probes=probes)
    first, second = AdapterGate(nano_gate(), GeneratorMetrics()).probes(version, [[(0, half)], [(half, len(text))]])
    assert [probe.question for probe in first] == ["Who is the head?"]
    assert [probe.question for probe in second] == ["How many books does the library lend?"]


def test_many_parts_are_asked_fewer_questions() -> None:
    lines = [f"The code of room {i} is {i * 37 % 9000 + 1000}. The key of room {i} hangs in box {i * 7}." * 3
             for i in range(8)]
    text = "\n".join(lines)
    version = DocumentVersion("doc_1", "ten_1", 1, "Rooms", text, "", len(text), 0.0)
    gate = AdapterGate(nano_gate(), GeneratorMetrics())
    spans = [[(text.index(line), text.index(line) + len(line))] for line in lines]
    assert [len(probes) for probes in gate.probes(version, spans)] == [2] * 8
    assert len(gate.probes(version, [[(0, len(text))]])[0]) == 8


def test_a_tasks_adapter_is_judged_without_a_document() -> None:
    metrics = GeneratorMetrics()
    version = DocumentVersion("doc_1", "ten_1", 1, "", "Translate the sentence into French.", "", 35, 0.0, mode="task")
    (made,) = nano_generator().generate([DocumentText("", TEXT)])
    gate = AdapterGate(nano_gate(), metrics)
    sound, empty = (gate.check_task(version, part.lora) for part in (made.parts[0], _zero(made.parts[0])))
    assert sound is not None and (sound.state, sound.score) == ("ready", None)
    assert empty is not None and (empty.state, empty.reasons) == ("degraded", ("collapsed",))
    assert metrics.registry.get_sample_value(
        "imprint_gate_results_total", {"source": "task", "state": "degraded"}) == 1


def test_the_configured_threshold_counts() -> None:
    strict = open_gate(GateConfig(threshold=1.0, probes=2), nano_generator())
    assert strict is not None and (strict.settings.threshold, strict.settings.probes) == (1.0, 2)
    assert nano_gate().settings.threshold == THRESHOLD
    assert open_gate(GateConfig(enabled=False), nano_generator()) is None
