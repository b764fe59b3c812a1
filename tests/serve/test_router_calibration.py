"""Calibrations of tenants: fitted to probes, moved by feedback through a shadow, and by nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from router.calibrate import Calibration
from router.centroids import document_centroids
from router.decide import RouterSettings, decide
from router.embed import MiniLmEncoder
from router.shipped import general_chat, shipped_calibration
from router.text import words
from serve.deployments.router_calibration import MIN_FEEDBACK, Calibrator, TenantCalibrations, feedback_examples
from serve.deployments.router_encoders import Encoders
from serve.deployments.router_index import TenantIndexes
from serve.metrics import RouterMetrics
from serve.registry import Registry, migrate
from serve.registry.records import Feedback, NewCentroids, NewFeedback, RecordedDecision, StoredCalibration
from tests.serve.registry_helpers import Clock, make_ready, new_adapter

NAMES = ("Aster", "Borea", "Corvo", "Delfin", "Estrel", "Falken")
QUESTIONS = ("How heavy is the {}?", "What does the {} cost?", "Who designed the {}?", "Where is the {} made?")


@pytest.fixture(scope="module")
def encoder() -> MiniLmEncoder:
    return MiniLmEncoder.load(threads=1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    url = f"sqlite:///{tmp_path}/registry.db"
    migrate(url)
    opened = Registry.open(url, clock)
    yield opened
    opened.close()


class Bench:
    """A calibrator over a real registry, index and encoder, without its thread."""

    def __init__(self, registry: Registry, encoder: MiniLmEncoder, clock: Clock) -> None:
        self.registry, self.encoder, self.clock = registry, encoder, clock
        self.indexes = TenantIndexes(registry, encoder)
        self.calibrations = TenantCalibrations(registry)
        self.metrics = RouterMetrics()
        self.calibrator = Calibrator(
            registry, Encoders(encoder), self.indexes, self.calibrations, self.metrics, every_s=0
        )
        self.shipped = shipped_calibration(encoder.id, encoder.version)

    def current(self, tenant_id: str) -> Calibration | None:
        return self.calibrations.current(tenant_id, self.encoder)

    def tenant(self, name: str) -> str:
        tenant_id = self.registry.create_tenant(name).id
        self.current(tenant_id)
        return tenant_id

    def publish(self, tenant_id: str, name: str, right: bool) -> str:
        """A document with the gate's questions, all answered right or all wrong; gives the adapter's ID."""
        text = f"The {name} weighs 3 kg. It costs 40 euros. Ada Brant designed it. It is made in Harrow."
        asked = [{"question": question.format(name), "right": right} for question in QUESTIONS]
        matrix = document_centroids(self.encoder, name, [text], 4)
        adapter = new_adapter(manifest={"gate": {"state": "ready", "asked": asked}})
        centroids = NewCentroids(self.encoder.id, self.encoder.version, matrix)
        make_ready(self.registry, tenant_id, f"{name} data sheet", text, [(adapter, centroids)])
        return adapter.id

    def outcomes(self) -> set[str]:
        """Which outcomes were counted since the start."""
        return {
            sample.labels["outcome"] for metric in self.metrics.calibrations.collect() for sample in metric.samples
        }

    def say(self, tenant_id: str, number: int, features: tuple[float, float], rating: str) -> None:
        """Feedback on an answer that the candidate of these similarity and margin has given."""
        similarity, margin = features
        candidate = {"adapter_id": "adp_x", "document_id": "doc_x", "title": "", "score": similarity,
                     "similarity": similarity, "word_share": 0.5, "rank": similarity, "margin": margin}  # fmt: skip
        key = f"r{number}"
        self.registry.record_decisions([
            RecordedDecision(key, tenant_id, self.clock.now, "imprint", "q", {}, [candidate], "adp_x", "doc_x",
                             "matched", 0.8)
        ])  # fmt: skip
        self.clock.now += 1
        self.registry.give_feedback(tenant_id, NewFeedback(key, rating))  # type: ignore[arg-type]


@pytest.fixture
def bench(registry: Registry, encoder: MiniLmEncoder, clock: Clock) -> Bench:
    return Bench(registry, encoder, clock)


# Near ties of this tenant are right and clear leads wrong, against all that is shipped.
CONTRARY = (((0.8, 0.2), "down"), ((0.5, 0.0), "up"), ((0.75, 0.18), "down"), ((0.45, 0.01), "up"))
AGREEING = (((0.8, 0.2), "up"), ((0.3, 0.0), "down"), ((0.75, 0.18), "up"), ((0.25, 0.01), "down"))


def test_a_tenants_probes_move_its_own_calibration_alone(bench: Bench) -> None:
    acme, globex = bench.tenant("acme"), bench.tenant("globex")
    shipped = bench.shipped
    assert shipped is not None
    adapters = {name: bench.publish(acme, name, right=name not in ("Corvo", "Delfin")) for name in NAMES}
    bench.publish(globex, "Corvo", right=True)
    bench.calibrator.run_once()
    assert bench.current(globex) is shipped, "one document is too little to fit to"
    own = bench.current(acme)
    assert own is not None and own.version == 1 and own.generator == "gen-1" and own.quality is not None
    index, settings = bench.indexes.current(acme), RouterSettings()
    question = "What does the Aster cost?"
    results = index.search(bench.encoder.embed_one(question), words(question))
    assert decide(results, settings, calibration=own).adapter_id == adapters["Aster"]
    # An adapter that answers wrong needs more than one that answers right.
    assert own.threshold(adapters["Corvo"], 0.5) > 0.5 > own.threshold(adapters["Aster"], 0.5)
    question = general_chat()[0]
    results = index.search(bench.encoder.embed_one(question), words(question))
    assert decide(results, settings, calibration=own).adapter_id is None
    # Nothing new: nothing is fitted. A new document: another version.
    bench.calibrator.run_once()
    assert bench.registry.newest_calibration_version(acme) == 1
    bench.publish(acme, "Gentian", right=True)
    bench.calibrator.run_once()
    again = bench.current(acme)
    assert again is not None and again.version == 2
    # Another replica finds it in the registry.
    fresh = TenantCalibrations(bench.registry)
    assert fresh.current(acme, bench.encoder) == again and fresh.current(globex, bench.encoder) is shipped


def test_feedback_goes_live_only_when_it_does_better_on_feedback_after_it(bench: Bench) -> None:
    acme, globex = bench.tenant("acme"), bench.tenant("globex")
    theirs = bench.current(globex)
    features = (0.5, 0.5, 0.0, 0.0, 0.0)
    assert theirs is not None
    before = theirs.probability(features), theirs.threshold("adp_x", 0.5)
    for number in range(MIN_FEEDBACK - 1):
        bench.say(acme, number, *CONTRARY[number % 4])
    bench.calibrator.run_once()
    assert bench.registry.newest_calibration_version(acme) == 0, "too little feedback"
    bench.say(acme, 99, *CONTRARY[3])
    bench.calibrator.run_once()
    shadow = bench.registry.calibrations([acme], "shadow")[acme]
    assert bench.current(acme) is bench.shipped and "shadow" in bench.outcomes()
    for number in range(100, 100 + MIN_FEEDBACK - 1):
        bench.say(acme, number, *CONTRARY[number % 4])
    bench.calibrator.run_once()
    assert bench.registry.calibrations([acme]) == {}, "too little that the shadow has not seen"
    bench.say(acme, 200, *CONTRARY[0])
    bench.calibrator.run_once()
    own = bench.current(acme)
    assert own is not None and own.version == shadow.version and "promoted" in bench.outcomes()
    shipped = bench.shipped
    assert shipped is not None
    assert own.probability((0.8, 0.5, 0.2, 0.0, 0.0)) < shipped.probability((0.8, 0.5, 0.2, 0.0, 0.0))
    assert 'imprint_router_feedback_log_loss{stage="shadow"}' in bench.metrics.text()
    # One tenant's feedback never moves another's.
    bench.calibrations.refresh()
    other = bench.current(globex)
    assert other is theirs and (other.probability(features), other.threshold("adp_x", 0.5)) == before


def test_a_shadow_that_does_no_better_is_dropped(bench: Bench) -> None:
    acme = bench.tenant("acme")
    for number in range(MIN_FEEDBACK):
        bench.say(acme, number, *CONTRARY[number % 4])
    bench.calibrator.run_once()
    assert acme in bench.registry.calibrations([acme], "shadow")
    for number in range(100, 100 + MIN_FEEDBACK):
        bench.say(acme, number, *AGREEING[number % 4])
    bench.calibrator.run_once()
    assert bench.registry.calibrations([acme], "shadow") == {} == bench.registry.calibrations([acme])
    assert bench.current(acme) is bench.shipped and "rejected" in bench.outcomes()
    bench.calibrator.run_once()
    assert acme in bench.registry.calibrations([acme], "shadow"), "a new one, of all feedback"


def test_a_stored_calibration_that_does_not_fit_is_not_used(bench: Bench) -> None:
    acme = bench.tenant("acme")
    shipped = bench.shipped
    assert shipped is not None
    good = {**shipped.to_json(), "bias": 1.5}
    mine = bench.encoder.id
    for version, (encoder, body) in enumerate(
        [("another", good), (mine, {**good, "features": 0}), (mine, {}), (mine, good)]
    ):
        stored = StoredCalibration(acme, "live", encoder, bench.encoder.version, "gen-1", 1, 0.0, body)
        assert bench.registry.store_calibration(stored, version) is not None
        bench.calibrations.refresh()
        current = bench.current(acme)
        assert current is not None and (current == shipped) == (version < 3)


def test_a_tenant_whose_fit_fails_keeps_what_it_has(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = bench.tenant("acme")
    for name in NAMES:
        bench.publish(acme, name, right=True)
    monkeypatch.setattr(bench.calibrator, "embed", lambda *_, **__: 1 / 0)
    bench.calibrator.run_once()
    assert bench.current(acme) is bench.shipped and bench.outcomes() == {"failed"}


def test_what_feedback_says_about_candidates() -> None:
    def candidate(number: int) -> dict[str, object]:
        return {"adapter_id": f"adp_{number}", "document_id": f"doc_{number}", "score": 0.5, "similarity": 0.1 * number,
                "word_share": 0.4, "rank": 0.5, "margin": 0.1}  # fmt: skip

    first = Feedback("ten_a", "r", 1.0, None, None, False, None, [candidate(1), candidate(2)], "adp_1", "doc_1")

    def said(**fields: object) -> list[tuple[str, bool]]:
        found = feedback_examples([replace(first, **fields)])  # type: ignore[arg-type]
        return [(one.adapter_id, one.right) for one in found]

    base = {"adapter_id": None, "document_id": None}
    assert said(rating="up") == [("adp_1", True)] and said(rating="down") == [("adp_1", False)]
    assert said(answer="It is 4.") == [("adp_1", False)]
    assert said(rating="up", adapter_id="adp_2") == [("adp_2", True)]
    assert said(right_document_id="doc_1") == [("adp_1", True)]
    assert said(right_document_id="doc_2") == [("adp_1", False), ("adp_2", True)]
    assert said(right_document_id="doc_9") == [("adp_1", False)]
    assert said(no_document=True) == [("adp_1", False)]
    assert said(rating="up", **base) == [("adp_1", False)] and said(rating="down", **base) == []
    assert said(rating="up", candidates=[]) == []
