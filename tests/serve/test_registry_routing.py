"""Decisions, feedback and calibrations in the registry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.registry import InvalidInput, NotFound, Registry
from serve.registry.records import NewFeedback, RecordedDecision, StoredCalibration
from tests.serve.registry_helpers import (  # noqa: F401
    Clock,
    acme,
    clock,
    make_ready,
    one_part,
    read,
    registry,
    several_parts,
    url,
)


def decision(tenant: str, key: str, at: float, document: str = "doc_x", **fields: object) -> RecordedDecision:
    candidate = {"adapter_id": "adp_x", "document_id": document, "title": "Secret title", "score": 0.5, "rank": 0.4,
                 "similarity": 0.6, "word_share": 0.3, "margin": None}
    made = RecordedDecision(key, tenant, at, "imprint", f"question {key}", {"x-app": "a"}, [candidate], "adp_x",
                            document, "matched", 0.9)
    return replace(made, **fields)  # type: ignore[arg-type]


def test_the_newest_decisions_of_each_tenant_are_kept(registry: Registry, acme: str) -> None:  # noqa: F811
    globex = registry.create_tenant("globex").id
    registry.record_decisions([])
    registry.record_decisions([decision(globex, "g", 0.5)], kept=3)
    for start in (0, 4):
        rows = [decision(acme, f"r{i}", float(i)) for i in range(start, start + 4)]
        registry.record_decisions(rows, kept=3)
    assert [one.response_id for one in registry.recent_decisions(acme, 10)] == ["r7", "r6", "r5"]
    assert [one.response_id for one in registry.recent_decisions(acme, 2)] == ["r7", "r6"]
    assert [one.response_id for one in registry.recent_decisions(globex, 10)] == ["g"]
    assert registry.get_decision(acme, "r0") is None and registry.get_decision(acme, "g") is None
    found = registry.get_decision(acme, "r7")
    assert found is not None and found.candidates[0]["title"] == ""
    assert replace(found, candidates=[]) == replace(decision(acme, "r7", 7.0), candidates=[])


def test_nothing_of_a_deleted_document_stays(registry: Registry, acme: str) -> None:  # noqa: F811
    make_ready(registry, acme, "Pool rules", external_id="pool")
    make_ready(registry, acme, "Sauna rules", external_id="sauna")
    pool, sauna = read(registry, acme, "pool").id, read(registry, acme, "sauna").id
    registry.record_decisions([decision(acme, "r1", 1.0, pool), decision(acme, "r2", 2.0, sauna)])
    registry.record_decisions([decision(acme, "r3", 3.0, pool, document_id=None, adapter_id=None)])
    for key in ("r1", "r2", "r3"):
        registry.give_feedback(acme, NewFeedback(key, "down"))
    assert [one.candidates[0]["title"] for one in registry.recent_decisions(acme, 9)] == [
        "Pool rules", "Sauna rules", "Pool rules"
    ]  # fmt: skip
    registry.delete_document(acme, pool)
    assert [(one.response_id, one.candidates[0]["title"]) for one in registry.recent_decisions(acme, 9)] == [
        ("r3", ""), ("r2", "Sauna rules")
    ]  # fmt: skip
    assert {one.response_id for one in registry.feedback_since(acme)} == {"r2", "r3"}


def test_feedback_is_tied_to_a_decision_of_the_tenant(
    registry: Registry, acme: str, clock: Clock  # noqa: F811
) -> None:
    globex = registry.create_tenant("globex").id
    make_ready(registry, acme, "Pool rules", external_id="pool")
    pool = read(registry, acme, "pool").id
    registry.record_decisions([decision(acme, "r1", 1.0), decision(acme, "r2", 2.0)])
    given = registry.give_feedback(acme, NewFeedback("r1", "down", pool, answer="At eight."))
    assert (given.rating, given.right_document_id, given.answer) == ("down", pool, "At eight.")
    assert (given.adapter_id, given.document_id) == ("adp_x", "doc_x") and "title" not in given.candidates[0]
    clock.now += 1
    registry.give_feedback(acme, NewFeedback("r2", "up"))
    clock.now += 1
    # Said again, also when the decision itself is gone by then.
    registry.record_decisions([decision(acme, f"n{i}", 9.0 + i) for i in range(2)], kept=2)
    assert registry.get_decision(acme, "r1") is None
    again = registry.give_feedback(acme, NewFeedback("r1", "up"))
    assert again.rating == "up" and again.answer is None and again.candidates == given.candidates
    assert [one.response_id for one in registry.feedback_since(acme)] == ["r2", "r1"]
    assert [one.response_id for one in registry.feedback_since(acme, clock.now - 1)] == ["r1"]
    assert registry.newest_feedback([acme, globex]) == {acme: clock.now}
    for tenant, new in (
        (globex, NewFeedback("r1", "up")),
        (acme, NewFeedback("r9", "up")),
        (acme, NewFeedback("n0", right_document_id="doc_absent")),
    ):
        with pytest.raises(NotFound):
            registry.give_feedback(tenant, new)
    for bad in (NewFeedback("n0"), NewFeedback("n0", right_document_id=pool, no_document=True),
                NewFeedback("n0", answer="\x00"), NewFeedback("n0", answer="x" * 20_001)):  # fmt: skip
        with pytest.raises(InvalidInput):
            registry.give_feedback(acme, bad)
    assert registry.feedback_since(globex) == []


def stored(tenant: str, stage: str = "live", **body: object) -> StoredCalibration:
    return StoredCalibration(tenant, stage, "minilm", "1", "gen-1", 3, 0.0, body)  # type: ignore[arg-type]


def test_calibrations_have_versions_and_stages(registry: Registry, acme: str) -> None:  # noqa: F811
    globex = registry.create_tenant("globex").id
    first = registry.store_calibration(stored(acme, bias=1.0), 0)
    assert first is not None and (first.version, first.body["bias"], first.body["version"]) == (1, 1.0, 1)
    assert registry.store_calibration(stored(acme), 0) is None, "another process was faster"
    shadow = registry.store_calibration(stored(acme, "shadow"), 1)
    assert shadow is not None and registry.calibrations([acme])[acme] == first
    assert registry.calibrations([acme, globex], "shadow") == {acme: shadow}
    assert registry.promote_calibration(acme, 2) and not registry.promote_calibration(acme, 2)
    assert registry.calibrations([acme])[acme].version == 2 and registry.calibrations([acme], "shadow") == {}
    registry.store_calibration(stored(acme, "shadow"), 2)
    registry.retire_shadow(acme, 3)
    assert registry.calibrations([acme], "shadow") == {} and not registry.promote_calibration(acme, 3)
    for version in range(3, 20):
        registry.store_calibration(stored(acme, "shadow"), version)
    assert registry.calibrations([acme])[acme].version == 2, "the live one is never cleared away"
    assert registry.newest_calibration_version(acme) == 20 and registry.newest_calibration_version(globex) == 0


def test_what_the_gate_asked_is_read_of_current_ready_adapters(registry: Registry, acme: str) -> None:  # noqa: F811
    globex = registry.create_tenant("globex").id

    def gate(*rights: bool) -> dict[str, object]:
        return {"gate": {"state": "ready", "asked": [{"question": f"q{i}", "right": r} for i, r in enumerate(rights)]}}

    make_ready(registry, globex, "Other", parts=one_part(manifest=gate(True)))
    make_ready(registry, acme, "One", external_id="one", parts=one_part(manifest=gate(False)))
    make_ready(registry, acme, "One again", external_id="one", parts=one_part(manifest=gate(True, False)))
    make_ready(registry, acme, "Off", parts=one_part(manifest={"gate": {"state": "off"}}))
    make_ready(registry, acme, "Old", parts=one_part())
    make_ready(registry, acme, "Bad", parts=several_parts(2, ["ready", "degraded"], manifest=gate(True)))
    make_ready(registry, acme, "Gone", external_id="gone", parts=one_part(manifest=gate(True)))
    registry.delete_document(acme, "gone")
    one = read(registry, acme, "one")
    found = registry.asked_probes(acme)
    assert [(a.adapter_id, a.question, a.right) for a in found if a.document_id == one.id] == [
        (one.adapter_id, "q0", True), (one.adapter_id, "q1", False)
    ]  # fmt: skip
    assert len(found) == 3 and {a.generator_fingerprint for a in found} == {"gen-1"}
    assert registry.heads([acme, globex, "ten_none"]) == {acme: registry.head(acme), globex: registry.head(globex)}
