"""The quality gate as the worker uses it: which probes each part is asked, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.documents import DocumentText
from hypernet.gate import REFERENCE_DOCUMENT, THRESHOLD, Candidate, Gate, GateReport, GateSettings
from hypernet.generate import GeneratedDocument
from hypernet.lora import LoraAdapter
from hypernet.probes import Probe, make_probes
from router.text import words
from serve.config import GateConfig
from serve.deployments.generator_store import Span
from serve.metrics import GeneratorMetrics
from serve.registry.records import DocumentVersion

PROBES_OF_MANY_PARTS = 2
"""For each part of a document with so many parts that more would take minutes."""
FEW_PARTS = 4
Asked = tuple[DocumentVersion, LoraAdapter, Sequence[Span], Sequence[Probe]]
"""An adapter, the version and the spans of its text that it was made from, and the probes to ask it."""


class GatedGenerator(Protocol):
    """A generator whose base the gate can ask."""

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer."""
        ...

    def generate(self, documents: Sequence[DocumentText]) -> list[GeneratedDocument]:
        """Adapters of documents."""
        ...


def open_gate(config: GateConfig, generator: GatedGenerator) -> Gate | None:
    """The gate, with the reference wrong adapter made by the same generator; None where it is switched off.

    Raises ValueError where it cannot ask this base.
    """
    if not config.enabled:
        return None
    (made,) = generator.generate([REFERENCE_DOCUMENT])
    threshold = THRESHOLD if config.threshold is None else config.threshold
    settings = GateSettings(probes=config.probes, threshold=threshold, budget_s=config.budget_s)
    try:
        return Gate(generator.base, generator.tokenizer, made.parts[0].lora, settings)
    except ValueError as error:
        raise ValueError(f"generator.gate: cannot ask this base: {error}; with generator.gate.enabled and "
                         "generator.refine.enabled set to false it is served without a gate") from error


class AdapterGate:
    """Asks the gate about adapters and counts what it says. Use it on the thread that generates, for they share the
    base."""

    def __init__(self, gate: Gate | None, metrics: GeneratorMetrics) -> None:
        """Without a gate every adapter is ready."""
        self._gate = gate
        self._metrics = metrics

    def probes(self, version: DocumentVersion, parts: Sequence[Sequence[Span]]) -> list[list[Probe]]:
        """The probes of each part: the client's on that part, else questions made from the part's own text.

        `parts` are the spans of text that each covers, in characters; no spans: all of it.
        """
        if self._gate is None:
            return [[] for _ in parts]
        texts = [_text(version.text, spans) for spans in parts]
        chosen: list[list[Probe]] = [[] for _ in parts]
        for given in version.probes:
            probe = Probe(str(given["question"]), given.get("answer"))
            chosen[_part_of(probe, texts)].append(probe)
        limit = self._gate.settings.probes
        if len(parts) > FEW_PARTS:
            limit = min(limit, PROBES_OF_MANY_PARTS)
        document = DocumentText(version.title, version.text)
        return [mine or make_probes(document, list(spans) or None, limit)
                for mine, spans in zip(chosen, parts, strict=True)]

    def check(self, version: DocumentVersion, lora: LoraAdapter, spans: Sequence[Span], probes: Sequence[Probe],
              source: str | None) -> GateReport | None:
        """Judge an adapter of the version's spans; None where there is no gate.

        `source` is what made it, for the metrics; None: it was counted before.
        """
        return self.check_all([(version, lora, spans, probes)], source)[0]

    def check_all(self, asked: Sequence[Asked], source: str | None) -> list[GateReport | None]:
        """As `check` for each of several adapters, in less time."""
        if self._gate is None:
            return [None for _ in asked]
        candidates = [Candidate(lora, DocumentText(version.title, version.text), list(spans) or None, probes)
                      for version, lora, spans, probes in asked]
        return [self._counted(report, source) for report in self._gate.check_all(candidates)]

    def check_task(self, version: DocumentVersion, lora: LoraAdapter) -> GateReport | None:
        """Judge an adapter of a task's description; None where there is no gate."""
        if self._gate is None:
            return None
        probes = [Probe(str(given["question"]), given.get("answer")) for given in version.probes]
        return self._counted(self._gate.check_task(lora, version.text, probes), "task")

    def _counted(self, report: GateReport, source: str | None) -> GateReport:
        if source is None:
            return report
        self._metrics.gate_results.labels(source, report.state).inc()
        self._metrics.gate_seconds.observe(report.seconds)
        if report.score is not None:
            self._metrics.gate_score.labels(source).observe(report.score)
        return report


def _text(text: str, spans: Sequence[Span]) -> str:
    return "\n".join(text[start:end] for start, end in spans) or text


def _part_of(probe: Probe, texts: Sequence[str]) -> int:
    """The part that a probe asks about: one that holds the answer, then the one with most of the question's words."""
    asked = set(words(probe.question))
    answer = (probe.answer or "").casefold().strip()

    def fit(text: str) -> tuple[bool, int]:
        return bool(answer) and answer in text.casefold(), len(asked & set(words(text)))

    return max(range(len(texts)), key=lambda i: fit(texts[i]))
