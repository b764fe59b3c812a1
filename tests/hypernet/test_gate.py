"""The quality gate on the shipped pair: own adapters pass; zeros, other documents' and broken adapters do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hypernet.documents import DocumentText
from hypernet.gate import REFERENCE_DOCUMENT, Candidate, Gate, GateSettings, ProbeScores, _update_norm, score_of
from hypernet.generate import HypernetGenerator
from hypernet.lora import LoraAdapter
from hypernet.nano import base_dir, hypernet_dir
from hypernet.probes import Probe
from hypernet.prompts import in_context
from tests.hypernet.helpers import deltas, random_lora

POOL = DocumentText("Harbour Pool: visitor notice",
                    "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde.")
FERRY = DocumentText("Ferry", "The night ferry to Ostmark leaves at 22:40. Bicycles cost 6 euros.")
JAPANESE = DocumentText("", "これは日本語の文章です。")


@pytest.fixture(scope="module")
def generator() -> HypernetGenerator:
    return HypernetGenerator.load(hypernet_dir(), base_dir(), threads=1)


@pytest.fixture(scope="module")
def loras(generator: HypernetGenerator) -> dict[str, LoraAdapter]:
    documents = {"pool": POOL, "ferry": FERRY, "reference": REFERENCE_DOCUMENT, "japanese": JAPANESE}
    made = generator.generate(list(documents.values()))
    return {name: document.parts[0].lora for name, document in zip(documents, made, strict=True)}


@pytest.fixture(scope="module")
def gate(generator: HypernetGenerator, loras: dict[str, LoraAdapter]) -> Gate:
    return Gate(generator.base, generator.tokenizer, loras["reference"], GateSettings(budget_s=1e6))


def scaled(lora: LoraAdapter, factor: float) -> LoraAdapter:
    return replace(lora, tensors={path: (a, b * factor) for path, (a, b) in lora.tensors.items()})


def test_own_adapters_are_ready(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    for document, name in ((POOL, "pool"), (FERRY, "ferry")):
        report = gate.check(loras[name], document)
        assert report.state == "ready", report
        assert report.reasons == ()
        assert report.score is not None
        assert report.score > 0.6
        assert report.probes >= 1


def test_another_documents_adapter_is_degraded(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    for document, name in ((POOL, "ferry"), (FERRY, "pool")):
        report = gate.check(loras[name], document)
        assert report.state == "degraded", report
        assert "below_threshold" in report.reasons


def test_reference_adapter_has_no_margin(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    report = gate.check(loras["reference"], POOL)
    assert report.margin == 0
    assert set(report.reasons) == {"below_threshold", "no_margin"}


def test_zeros_are_collapsed(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    assert gate.check(scaled(loras["pool"], 0.0), POOL).reasons == ("collapsed",)
    nearly = gate.check(scaled(loras["pool"], 0.01), POOL)
    assert nearly.state == "degraded"
    assert "below_threshold" in nearly.reasons


@pytest.mark.parametrize(("factor", "reason"), [(float("nan"), "not_finite"), (float("inf"), "not_finite"),
                                                (1e6, "norm")])
def test_broken_weights(gate: Gate, loras: dict[str, LoraAdapter], factor: float, reason: str) -> None:
    report = gate.check(scaled(loras["pool"], factor), POOL)
    assert (report.state, report.reasons, report.score) == ("degraded", (reason,), None)


@pytest.mark.parametrize("document", [DocumentText("", "x"), JAPANESE])
def test_no_probes(gate: Gate, loras: dict[str, LoraAdapter], document: DocumentText) -> None:
    report = gate.check(loras["japanese"], document)
    assert (report.state, report.reasons, report.probes) == ("degraded", ("no_probes",), 0)


def test_clients_probes_and_answers_are_used(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    right = gate.check(loras["pool"], POOL, probes=[Probe("When does the Harbour Pool open?", "7:15")])
    assert right.state == "ready"
    assert right.probes == 1
    absent = gate.check(loras["pool"], POOL, probes=[Probe("What is the capital of the moon?", "   ")])
    assert absent.reasons == ("no_probes",)


def test_only_the_spans_are_asked(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    report = gate.check(loras["pool"], POOL, spans=[(0, POOL.text.index("The lifeguard"))])
    assert report.probes == 1


def test_same_probes_give_the_same_report(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    first, second = (gate.check(loras["pool"], POOL) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


def test_several_are_judged_as_each_alone(gate: Gate, loras: dict[str, LoraAdapter],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Own, another's and broken adapters, with open and with given answers, in whichever passes they share."""
    asked = [Probe("When does the Harbour Pool open?", "7:15"), Probe("Who is the lifeguard on duty?")]
    candidates = [Candidate(loras["pool"], POOL), Candidate(loras["ferry"], FERRY), Candidate(loras["ferry"], POOL),
                  Candidate(scaled(loras["pool"], 0.0), POOL), Candidate(loras["japanese"], JAPANESE),
                  Candidate(loras["pool"], POOL, [(0, POOL.text.index("The lifeguard"))]),
                  Candidate(loras["pool"], POOL, probes=asked)]
    alone = [gate.check(one.lora, one.document, one.spans, one.probes).manifest() for one in candidates]
    passes: list[int] = []
    counted = gate.base.register_forward_pre_hook(
        lambda _module, _inputs, given: passes.append(len(given["input_ids"])), with_kwargs=True)
    monkeypatch.setattr("hypernet.gate.BATCH_TOKENS", 200)
    for rows in (1, 1000):
        monkeypatch.setattr(gate, "_rows", rows)
        for one, expected in zip(gate.check_all(candidates), alone, strict=True):
            found = {**one.manifest(), "seconds": expected["seconds"]}
            for name in ("reasons", "asked"):
                assert found.pop(name) == expected[name]
            assert found == pytest.approx({key: expected[key] for key in found}, abs=1e-3)
    counted.remove()
    assert len(set(passes)) > 2, "passes of several sizes"
    assert [one["state"] for one in alone] == ["ready", "ready", "degraded", "degraded", "degraded", "ready", "ready"]
    assert gate.check_all([]) == []


def test_own_answers_are_as_probable_as_when_they_are_read(gate: Gate) -> None:
    prompts = [in_context(gate.tokenizer, POOL.text, question)
               for question in ("When does the Harbour Pool open?", "Who is the lifeguard on duty?")]
    written = gate._greedy(prompts)
    read = gate._log_probabilities(prompts, [answer for answer, _ in written], None)
    assert [reference for _, reference in written] == pytest.approx(read, abs=1e-4)
    assert all(-3 < reference < 0 for reference in read)


def test_base_is_left_as_it_was(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    def hooks() -> int:  # transformers keeps some of its own
        return sum(len(module._forward_hooks) for module in gate.base.modules())
    before = hooks()
    assert gate.check(loras["pool"], POOL).probes > 0
    assert hooks() == before


def test_manifest_is_plain_json(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    manifest = gate.check(loras["pool"], POOL).manifest()
    assert json.loads(json.dumps(manifest, allow_nan=False)) == manifest
    assert manifest["state"] == "ready"
    assert manifest["threshold"] == GateSettings().threshold
    assert len(manifest["asked"]) == manifest["probes"] and any(one["right"] for one in manifest["asked"])
    assert not any(one["right"] for one in gate.check(loras["ferry"], POOL).manifest()["asked"])


def test_long_document_is_read_in_windows(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    filler = " ".join(f"Nothing of note happened in week {i}." for i in range(400))
    document = DocumentText("Harbour Pool", f"{filler}\n{POOL.text}")
    report = gate.check(loras["pool"], document, probes=[Probe("Who is the lifeguard on duty?", "Marta Velde")])
    assert report.probes == 1


def test_budget_drops_probes_but_leaves_two(generator: HypernetGenerator, loras: dict[str, LoraAdapter]) -> None:
    short = Gate(generator.base, generator.tokenizer, loras["reference"], GateSettings(budget_s=1e-6))
    assert short._within_budget([100] * 8) == [2, 6]
    short.settings = GateSettings(budget_s=1e6)
    assert short._within_budget([100] * 8) == list(range(8))


def test_task_adapter(gate: Gate, loras: dict[str, LoraAdapter]) -> None:
    assert gate.check_task(loras["pool"], "Answer questions about a pool.").state == "ready"
    assert gate.check_task(loras["reference"], "Answer questions.").reasons == ("collapsed",)
    asked = [Probe("When does the Harbour Pool open?", "7:15")]
    good = gate.check_task(loras["pool"], "Answer questions about a pool.", asked)
    assert (good.state, good.score, good.probes) == ("ready", None, 1)
    assert gate.check_task(loras["ferry"], "Answer.", [Probe("When does Bled open?", "")]).probes == 0


def scores(adapter: float, base: float, reference: float, wrong: float) -> list[ProbeScores]:
    return [ProbeScores(Probe("?"), "a", adapter, base, reference, wrong)]


def test_score() -> None:
    assert score_of(scores(-2.0, -4.0, -1.0, -5.0)) == pytest.approx(2 / 3)
    assert score_of(scores(-2.0, -5.0, -1.0, -4.0)) == pytest.approx(2 / 3), "the better of base and wrong is the floor"
    assert score_of(scores(-0.1, -4.0, -1.0, -5.0)) == 1.0
    assert score_of(scores(-9.0, -4.0, -1.0, -5.0)) == 0.0
    assert score_of(scores(-1.0, -1.0, -1.0, -1.0)) == 0.0
    assert score_of(scores(float("nan"), -4.0, -1.0, -5.0)) == 0.0
    assert score_of([]) == 0.0


def test_update_norm_is_that_of_the_product() -> None:
    one, two = random_lora(1), random_lora(2, rank=6)

    def norm(updates: Mapping[str, Tensor]) -> float:
        return float(torch.stack([update.norm() for update in updates.values()]).norm())
    assert _update_norm(one) == pytest.approx(norm(deltas(one)), rel=1e-4)
    difference = {path: update - deltas(two)[path] for path, update in deltas(one).items()}
    assert _update_norm(one, two) == pytest.approx(norm(difference), rel=1e-4)
