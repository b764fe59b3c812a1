"""Jobs of kind `generate`: a document or a task's description becomes adapters, judged by the gate and published.

A job goes through the stages leased, generating, generated, uploaded. Nobody sees anything of it until the one
transaction that publishes all its parts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Protocol

from hypernet.distill import DistillCancelled, DistillGenerator
from hypernet.documents import Chunk, DocumentError, DocumentText
from hypernet.gate import GateReport
from hypernet.generate import GeneratedAdapter, GeneratedDocument
from hypernet.lora import AdapterInvalid, LoraAdapter
from router.embed import NotFinite
from serve.config import ImprintConfig
from serve.deployments.generator_gate import AdapterGate, Asked
from serve.deployments.generator_leases import HeldJobs, Stopping
from serve.deployments.generator_store import AdapterStore, FinishedPart, Span
from serve.metrics import GeneratorMetrics
from serve.registry import LeaseLost
from serve.registry.records import LeasedJob

logger = logging.getLogger(__name__)

Reports = list[GateReport | None]
"""The gate's on each part of a document; None without a gate."""
JUDGED_TOGETHER = 16
"""Parts that the gate judges at once, at most: it takes less time, but what is judged waits for all of it."""
Plan = list[list[Chunk]]
"""The chunks of each part of a document, in order."""
NO_TASKS = ("mode: 'task' needs generator.task.checkpoint, a converted Text-to-LoRA checkpoint, which this server does "
            "not have; 'document' is allowed")


class DocumentGenerator(Protocol):
    """What makes adapters of documents: hypernet.generate.HypernetGenerator or hypernet.distill.DistillGenerator."""

    base_fingerprint: str
    fingerprint: str

    def plan(self, document: DocumentText) -> Plan:
        """Check and cut a document. Raises DocumentError."""
        ...

    def generate(self, documents: Sequence[DocumentText], plans: Sequence[Plan]) -> list[GeneratedDocument]:
        """Adapters for documents and what `plan` gave for them, in one batch."""
        ...


class TaskAdapters(Protocol):
    """What makes adapters of descriptions of tasks, such as hypernet.tasks.TaskGenerator."""

    base_fingerprint: str
    fingerprint: str

    def generate(self, descriptions: Sequence[str]) -> list[LoraAdapter]:
        """An adapter for each description."""
        ...


class GenerateJobs:
    """Sees batches of jobs through, from leased to published."""

    def __init__(
        self,
        config: ImprintConfig,
        generator: DocumentGenerator,
        tasks: TaskAdapters | None,
        gate: AdapterGate,
        store: AdapterStore,
        held: HeldJobs,
        metrics: GeneratorMetrics,
    ) -> None:
        self._config = config
        self._generator = generator
        self._tasks = tasks
        self._gate = gate
        self._store = store
        self._held = held
        self._metrics = metrics

    def run(self, leased: Sequence[LeasedJob]) -> None:
        """End each of these jobs, well or badly. Raises Stopping."""
        self._metrics.batch_documents.observe(len(leased))
        self._held.reached("leased", leased)
        for item in leased:
            if item.version.mode == "task":
                self._alone(item, partial(self._make_task, item))
        planned = [(item, self._plan(item)) for item in leased if item.version.mode != "task"]
        valid = [(item, plan) for item, plan in planned if plan]
        if isinstance(self._generator, DistillGenerator):
            for item, plan in valid:
                self._alone(item, partial(self._distill, self._generator, item, plan))
        else:
            for some in _few_parts(self._generate(valid)):
                for (item, generated), reports in zip(some, self._judge(some), strict=True):
                    self._alone(item, partial(self._deliver, item, generated, reports))

    def _alone(self, item: LeasedJob, work: Callable[[], None]) -> None:
        """Do the rest of one job; what goes wrong ends this job only."""
        try:
            work()
            self._metrics.jobs.labels("succeeded").inc()
        except Stopping:
            raise
        except LeaseLost as error:
            logger.warning("%s", error)
            self._metrics.jobs.labels("lost").inc()
        except DocumentError as error:
            self._fail(item, str(error), retry=False)
        except AdapterInvalid as error:
            self._fail(item, f"The generated adapter is not valid: {error}", retry=False)
        except NotFinite as error:
            self._fail(item, f"The document cannot be compared with questions: {error}", retry=False)
        except Exception as error:
            logger.exception("job %s failed", item.job.id)
            self._fail(item, f"The adapter could not be made or stored: {error}", retry=True)
        self._held.let_go(item)

    def _plan(self, item: LeasedJob) -> Plan:
        """The document's chunks by part; none where the job is no longer ours or fails, alone, for its document."""
        try:
            self._held.progress(item, "generating", 0.1)
            return self._generator.plan(text_of(item))
        except LeaseLost as error:
            logger.warning("%s", error)
        except DocumentError as error:
            self._fail(item, str(error), retry=False)
        return []

    def _generate(self, items: list[tuple[LeasedJob, Plan]]) -> list[tuple[LeasedJob, GeneratedDocument]]:
        """Adapters of a batch; when it fails as a whole, one by one, so that only the culprit's job fails."""
        if not items:
            return []
        started = time.monotonic()
        try:
            generated = self._generator.generate([text_of(item) for item, _ in items], [plan for _, plan in items])
        except Exception as error:
            if len(items) > 1:
                logger.exception("a batch of %d documents failed; trying one by one", len(items))
                return [pair for one in items for pair in self._generate([one])]
            item = items[0][0]
            logger.exception("job %s failed", item.job.id)
            self._fail(item, f"Generation failed: {error}", retry=not isinstance(error, DocumentError))
            return []
        self._metrics.stage_seconds.labels("generate").observe(time.monotonic() - started)
        return [(item, one) for (item, _), one in zip(items, generated, strict=True)]

    def _distill(self, generator: DistillGenerator, item: LeasedJob, plan: Plan) -> None:
        """Gradient steps on one document, seconds to minutes; given up when the job is lost or the worker ends."""
        started = time.monotonic()
        done = self._held.steps(item, "distilling", 0.1, 0.7)
        try:
            (generated,) = generator.generate([text_of(item)], [plan], done, partial(self._held.cancelled, item))
        except DistillCancelled:
            self._held.must_hold(item)
            raise
        self._metrics.stage_seconds.labels("distill").observe(time.monotonic() - started)
        self._deliver(item, generated)

    def _judge(self, items: Sequence[tuple[LeasedJob, GeneratedDocument]]) -> list[Reports | None]:
        """The gate's reports on several documents' parts, asked together, which takes less time; None for a document
        that is to be judged alone: the only one, or any where that failed."""
        if len(items) > 1:
            try:
                asked = [self._asked(item, generated) for item, generated in items]
                reports = iter(self._gate.check_all([one for parts in asked for one in parts],
                                                    self._config.generator.kind))
                return [[next(reports) for _ in parts] for parts in asked]
            except Exception:
                logger.exception("%d documents could not be judged together; trying one by one", len(items))
        return [None for _ in items]

    def _asked(self, item: LeasedJob, generated: GeneratedDocument) -> list[Asked]:
        """What the gate is asked about each part of a document."""
        spans = [spans_of(made) for made in generated.parts]
        probes = self._gate.probes(item.version, spans)
        return [(item.version, made.lora, own, asked)
                for made, own, asked in zip(generated.parts, spans, probes, strict=True)]

    def _deliver(self, item: LeasedJob, generated: GeneratedDocument, reports: Reports | None = None) -> None:
        """Gate, store and publish all parts of one document. `reports`: what the gate said, where it was asked."""
        kind, count = self._config.generator.kind, len(generated.parts)
        with self._store.staged([part.lora for part in generated.parts]) as staged:
            found = list(reports or [])
            asked = [] if found else self._asked(item, generated)
            self._held.progress(item, "gate", 0.7)
            for first in range(0, len(asked), JUDGED_TOGETHER):
                self._held.progress(item, "gate", 0.7 + 0.1 * first / count)
                self._held.must_hold(item)
                found += self._gate.check_all(asked[first:first + JUDGED_TOGETHER], kind)
            parts = []
            for i, (adapter, made, report) in enumerate(zip(staged, generated.parts, found, strict=True)):
                manifest = {**part_manifest(kind, made, i, count), "gate": _said(report)}
                parts.append(FinishedPart(adapter, spans_of(made), manifest, _state(report),
                                          self._generator.fingerprint))
            self._publish(item, parts, refine=True)

    def _make_task(self, item: LeasedJob) -> None:
        if self._tasks is None:
            raise DocumentError(NO_TASKS)
        self._held.progress(item, "generating", 0.1)
        begun = time.perf_counter()
        with self._metrics.stage_seconds.labels("task").time():
            (lora,) = self._tasks.generate([item.version.text])
        seconds = {"hypernetwork": round(time.perf_counter() - begun, 6)}
        with self._store.staged([lora]) as (adapter,):
            self._held.progress(item, "gate", 0.7)
            report = self._gate.check_task(item.version, lora)
            manifest = {"generator": "text-to-lora", "part": 0, "parts": 1, "chunks": [], "seconds": seconds,
                        "task_fingerprint": self._tasks.fingerprint, "gate": _said(report)}
            # The registry compares all adapters with the one generator of documents that is loaded.
            part = FinishedPart(adapter, (), manifest, _state(report), self._generator.fingerprint)
            self._publish(item, [part], refine=False)

    def _publish(self, item: LeasedJob, parts: Sequence[FinishedPart], refine: bool) -> None:
        self._held.progress(item, "generated", 0.85)
        self._held.reached("generated", [item])
        later = self._config.generator.refine
        self._store.publish(item, parts, refine_after_s=later.after_s if refine and later.enabled else None)
        logger.info("document %s version %d: %s", item.document.id, item.version.number,
                    ", ".join(f"{part.staged.id} {part.state}" for part in parts))

    def _fail(self, item: LeasedJob, error: str, retry: bool) -> None:
        job = self._held.fail(item, error, retry)
        if job is not None:
            self._metrics.jobs.labels("failed" if job.state == "failed" else "retried").inc()


def text_of(item: LeasedJob) -> DocumentText:
    """The version that a job is about, as the generator reads it."""
    return DocumentText(item.version.title, item.version.text)


def spans_of(made: GeneratedAdapter) -> list[Span]:
    """The spans of the document's text that a part was made from, in characters."""
    return [(chunk.start, chunk.end) for chunk in made.chunks]


def _few_parts(
    items: Sequence[tuple[LeasedJob, GeneratedDocument]],
) -> Iterator[list[tuple[LeasedJob, GeneratedDocument]]]:
    """The documents in groups of at most `JUDGED_TOGETHER` parts, or of one document."""
    some: list[tuple[LeasedJob, GeneratedDocument]] = []
    for item, generated in items:
        if some and sum(len(one.parts) for _, one in some) + len(generated.parts) > JUDGED_TOGETHER:
            yield some
            some = []
        some.append((item, generated))
    if some:
        yield some


def _said(report: GateReport | None) -> dict[str, Any]:
    return {"state": "off"} if report is None else report.manifest()


def _state(report: GateReport | None) -> Literal["ready", "degraded"]:
    return "ready" if report is None else report.state


def part_manifest(kind: str, made: GeneratedAdapter, part: int, parts: int) -> dict[str, Any]:
    """What a part adapter was made from and how, as plain JSON."""
    return {
        "generator": kind,
        "part": part,
        "parts": parts,
        "chunks": [asdict(chunk) for chunk in made.chunks],
        "kept_energy": made.kept_energy,
        "seconds": {stage: round(seconds, 6) for stage, seconds in made.seconds.items()},
    }
