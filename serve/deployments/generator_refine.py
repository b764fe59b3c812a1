"""Jobs of kind `refine`: gradient steps on what is published already, kept where the gate says that it is better.

They run while no document waits. When one arrives the job goes back to the queue, and starts anew later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from hypernet.distill_loop import Distilled, Distiller, DistillSettings
from hypernet.documents import DocumentText
from hypernet.gate import GateReport
from hypernet.lora import LoraAdapter
from hypernet.probes import Probe, text_answers
from serve.config import RefineConfig
from serve.deployments.generator_gate import AdapterGate
from serve.deployments.generator_leases import HeldJobs, Stopping
from serve.deployments.generator_store import AdapterStore, FinishedPart, Span, StagedAdapter
from serve.metrics import GeneratorMetrics
from serve.registry import LeaseLost, Registry
from serve.registry.records import Adapter, DocumentVersion, LeasedJob

logger = logging.getLogger(__name__)

MIN_GAIN = 0.02
"""How much the gate's score must rise for a new adapter to be worth its publication."""
MIN_PART_S = 1.0
"""Of a document with many parts, less time than this for one would be spent on reading it alone."""
LOOK_EVERY_S = 0.1


class _MakeRoom(Exception):
    """A document waits."""


class RefineJobs:
    """Sees one refine job at a time through."""

    def __init__(
        self,
        config: RefineConfig,
        registry: Registry,
        distiller: Distiller,
        fingerprints: tuple[str, str],
        gate: AdapterGate,
        store: AdapterStore,
        held: HeldJobs,
        metrics: GeneratorMetrics,
    ) -> None:
        """`fingerprints` are those of the base and of the generator that are loaded."""
        self._config = config
        self._registry = registry
        self._distiller = distiller
        self._fingerprints = fingerprints
        self._gate = gate
        self._store = store
        self._held = held
        self._metrics = metrics

    def run(self, item: LeasedJob) -> None:
        """End the job, or give it back where a document waits. Raises Stopping."""
        begun = time.monotonic()
        try:
            outcome = self._refine(item)
        except Stopping:
            raise
        except _MakeRoom:
            # What waits may be a new version of this document, which has ended this job.
            outcome = "made_room" if self._held.give_back(item) else "outdated"
        except LeaseLost as error:
            logger.info("refinement of %s is out of date: %s", item.document.id, error)
            outcome = "outdated"
        except Exception as error:
            logger.exception("job %s failed", item.job.id)
            self._held.fail(item, f"The adapter could not be refined: {error}", retry=True)
            outcome = "failed"
        self._held.let_go(item)
        self._metrics.refines.labels(outcome).inc()
        self._metrics.stage_seconds.labels("refine").observe(time.monotonic() - begun)
        logger.info("refinement of %s version %d: %s", item.document.id, item.version.number, outcome)

    def _refine(self, item: LeasedJob) -> str:
        current = self._registry.current_adapters_of(item.job.tenant_id, item.job.document_id)
        if not current or any(self._is_foreign(adapter, item) for adapter in current):
            self._registry.finish_job(item.job.id, self._held.worker, "The document's adapters are other ones by now.")
            return "outdated"
        better = self._better_parts(item, current)
        if not better:
            self._registry.finish_job(item.job.id, self._held.worker, "The gate found the refined adapter no better.")
            return "not_better"
        loras = [better[i][0].lora if i in better else self._store.load(old) for i, old in enumerate(current)]
        with self._store.staged(loras) as staged:
            parts = [
                _refined(staged[i], old, *better[i]) if i in better
                else FinishedPart(staged[i], _spans(old), old.manifest, _state(old), old.generator_fingerprint)
                for i, old in enumerate(current)
            ]
            self._held.reached("generated", [item])
            self._store.publish(item, parts, expected_adapter_ids=[adapter.id for adapter in current])
        return "better"

    def _better_parts(self, item: LeasedJob, current: Sequence[Adapter]) -> dict[int, tuple[Distilled, GateReport]]:
        """What the steps and the gate gave for those parts that became better; as many are tried as the time allows."""
        spans = [_spans(adapter) for adapter in current]
        probes = [_answered(item.version, own, asked)
                  for own, asked in zip(spans, self._gate.probes(item.version, spans), strict=True)]
        better: dict[int, tuple[Distilled, GateReport]] = {}
        deadline = time.monotonic() + self._config.budget_s
        # Those that know least of their text have the most to gain.
        for tried, i in enumerate(sorted(range(len(current)), key=lambda i: _score(current[i]))):
            left = deadline - time.monotonic()
            if tried and left <= 0:
                break
            old = self._store.load(current[i])
            seconds = max(left / (len(current) - tried), min(left, MIN_PART_S), 0.1)
            run = self._steps(item, old, spans[i], seconds, tried, len(current))
            self._make_room(item)
            before = self._gate.check(item.version, old, spans[i], probes[i], source=None)
            self._make_room(item)
            after = self._gate.check(item.version, run.lora, spans[i], probes[i], source="refine")
            if before and after and is_better(before, after):
                better[i] = run, after
        return better

    def _is_foreign(self, adapter: Adapter, item: LeasedJob) -> bool:
        return (adapter.version != item.job.version or adapter.state not in ("ready", "degraded")
                or (adapter.base_fingerprint, adapter.generator_fingerprint) != self._fingerprints)

    def _steps(
        self, item: LeasedJob, old: LoraAdapter, spans: Sequence[Span], seconds: float, tried: int, parts: int
    ) -> Distilled:
        """Gradient steps on one part, after `tried` others."""
        self._held.progress(item, "refining", 0.8 * tried / parts)
        done = self._held.steps(item, "refining", 0.8 * tried / parts, 0.8 * (tried + 1) / parts)
        settings = replace(self._distiller.settings, seconds=seconds)
        document = DocumentText(item.version.title, item.version.text)
        distilled = self._distiller.distill(document, (), old, None, done, self._interrupted(item), settings, spans)
        if distilled.stopped == "cancelled":
            self._make_room(item)
        return distilled

    def _interrupted(self, item: LeasedJob) -> Callable[[], bool]:
        """Whether to stop at once; asks the registry for waiting documents now and then only."""
        looked = time.monotonic()
        found = False

        def interrupted() -> bool:
            nonlocal looked, found
            if not found and time.monotonic() - looked >= LOOK_EVERY_S:
                found = self._registry.generate_waits()
                looked = time.monotonic()
            return found or self._held.cancelled(item)

        return interrupted

    def _make_room(self, item: LeasedJob) -> None:
        """Raises _MakeRoom where a document waits, Stopping where the worker ends, LeaseLost where the job is gone."""
        self._held.must_hold(item)
        if self._registry.generate_waits():
            raise _MakeRoom


def is_better(before: GateReport, after: GateReport) -> bool:
    """Whether a refined adapter should replace the one that it began with, both asked the same probes."""
    if after.state != "ready":
        return False
    return before.state != "ready" or (after.score or 0.0) >= (before.score or 0.0) + MIN_GAIN


def distill_settings(config: RefineConfig) -> DistillSettings:
    """How far a refinement goes, at most."""
    return DistillSettings(steps=config.steps, seconds=config.budget_s, learning_rate=config.learning_rate)


def _spans(adapter: Adapter) -> list[Span]:
    return [(int(chunk["start"]), int(chunk["end"])) for chunk in adapter.manifest.get("chunks", ())]


def _answered(version: DocumentVersion, spans: Sequence[Span], probes: Sequence[Probe]) -> list[Probe]:
    """The probes with the text's own answers, where it has them. What is taught is the text's, so that compared with
    what the base reads out of it, a part would seem worse for each fact that the base misreads."""
    known = text_answers(DocumentText(version.title, version.text), spans or None)
    return [Probe(probe.question, probe.answer or known.get(probe.question)) for probe in probes]


def _score(adapter: Adapter) -> float:
    return float(adapter.manifest.get("gate", {}).get("score") or 0.0)


def _state(adapter: Adapter) -> Literal["ready", "degraded"]:
    return "ready" if adapter.state == "ready" else "degraded"


def _refined(staged: StagedAdapter, old: Adapter, run: Distilled, report: GateReport) -> FinishedPart:
    """The part as it is published: what it was before, and what the steps changed."""
    refined = {"from": old.id, "steps": run.steps, "seconds": round(run.seconds, 6), "stopped": run.stopped,
               "first_loss": round(run.first_loss, 6), "loss": round(run.loss, 6), "questions": run.questions}
    manifest = {**old.manifest, "refined": refined, "gate": report.manifest()}
    return FinishedPart(staged, _spans(old), manifest, report.state, old.generator_fingerprint)
