"""The quality gate on the shipped nano pair: which adapters pass, and how long a check takes.

    python -m benchmarks.quality_gate

Needs no server. Held-out documents of 1, 2, 4 and 8 facts, whose names and values never occur in training, become part
adapters as on the server. The gate judges three for each part, by probes on the part's text: its own, one of another
document of as many facts, and one of zeros. Also a few hand-made documents, by their first part.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.server import machine
from hypernet.documents import DocumentText
from hypernet.gate import REFERENCE_DOCUMENT, THRESHOLD, Gate, GateReport, GateSettings
from hypernet.generate import HypernetGenerator
from hypernet.lora import LoraAdapter
from hypernet.nano import base_dir, hypernet_dir
from hypernet.probes import make_probes
from hypernet.training.corpus.documents import Split, sample_document
from serve.deployments.generator_gate import FEW_PARTS, PROBES_OF_MANY_PARTS

FACTS, SEED = (1, 2, 4, 8), 31
THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5)
HAND_MADE = (
    DocumentText("Harbour Pool: visitor notice",
                 "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde."),
    DocumentText("", "The Mill Bakery closes at 18:30."),
    DocumentText("", "# Kestrel 40 pump\n\n- Weight: 14 kg\n- Warranty: 3 years\n- Service line: 555-0192"),
    DocumentText("Ferry", "The night ferry to Ostmark leaves at 22:40. Bicycles cost 6 euros."),
)


@dataclass(frozen=True)
class Judged:
    """The gate's reports on one part of a document: its own adapter, another document's, and one of zeros."""

    facts: int
    document: int
    own: GateReport
    other: GateReport
    zeros: GateReport


def documents(facts: int, count: int) -> list[DocumentText]:
    """Held-out documents of exactly so many facts."""
    rng = Random(f"{SEED}-{facts}")
    found: list[DocumentText] = []
    while len(found) < count:
        document = sample_document(rng, facts, Split.HELD_OUT)
        if len(document.facts) == facts:
            found.append(DocumentText("", document.text))
    return found


def zeros(lora: LoraAdapter) -> LoraAdapter:
    """An adapter of the same shape that changes nothing."""
    return replace(lora, tensors={path: (a, torch.zeros_like(b)) for path, (a, b) in lora.tensors.items()})


def judge(gate: Gate, generator: HypernetGenerator, facts: int, texts: Sequence[DocumentText]) -> list[Judged]:
    """Every part of every document against three adapters."""
    made = [document.parts for document in generator.generate(texts)]
    judged = []
    for i, (text, parts) in enumerate(zip(texts, made, strict=True)):
        others = made[(i + 1) % len(made)]
        limit = min(gate.settings.probes, PROBES_OF_MANY_PARTS) if len(parts) > FEW_PARTS else gate.settings.probes
        for j, part in enumerate(parts):
            spans = [(chunk.start, chunk.end) for chunk in part.chunks]
            probes = make_probes(text, spans, limit)
            three = (part.lora, others[j % len(others)].lora, zeros(part.lora))
            own, other, none = (gate.check(lora, text, spans, probes) for lora in three)
            judged.append(Judged(facts, i, own, other, none))
    return judged


def _passed(reports: Sequence[GateReport], threshold: float = THRESHOLD) -> float:
    """The share that would be ready at the threshold."""
    return sum(report.score is not None and report.score >= threshold and (report.margin or 0) > 0
               for report in reports) / len(reports)


def auroc(own: Sequence[float], other: Sequence[float]) -> float:
    """How often an own adapter's score is above another document's; ties count half."""
    return sum((a > b) + 0.5 * (a == b) for a in own for b in other) / (len(own) * len(other))


def _row(name: str, judged: Sequence[Judged]) -> dict[str, Any]:
    asked = [item for item in judged if "no_probes" not in item.own.reasons]
    own = [item.own.score or 0.0 for item in asked]
    other = [item.other.score or 0.0 for item in asked]
    seconds = sorted(item.own.seconds for item in judged)
    documents = len({(item.facts, item.document) for item in judged})
    return {"documents": name, "count": documents, "parts": len(judged), "without_probes": len(judged) - len(asked),
            "own_pass": _passed([item.own for item in asked]), "other_pass": _passed([item.other for item in asked]),
            "zeros_pass": sum(item.zeros.state == "ready" for item in judged) / len(judged),
            "auroc": auroc(own, other), "own_p05": sorted(own)[len(own) // 20], "own_p50": statistics.median(own),
            "other_p95": sorted(other)[-1 - len(other) // 20], "probes": statistics.mean(i.own.probes for i in asked),
            "seconds_p50": statistics.median(seconds), "seconds_p95": seconds[-1 - len(seconds) // 20]}


def report(judged: Sequence[Judged], hand_made: Sequence[Judged]) -> tuple[dict[str, Any], str]:
    """The tables as data and as Markdown."""
    rows = [_row("1 fact" if facts == 1 else f"{facts} facts", [item for item in judged if item.facts == facts])
            for facts in FACTS]
    rows.append(_row("all", judged))
    asked = [item for item in judged if "no_probes" not in item.own.reasons]
    sweep = [{"threshold": threshold, "own_pass": _passed([item.own for item in asked], threshold),
              "other_pass": _passed([item.other for item in asked], threshold)} for threshold in THRESHOLDS]
    hand: list[dict[str, Any]] = []
    for i, text in enumerate(HAND_MADE):
        first = next(item for item in hand_made if item.document == i)
        hand.append({"title": text.title or text.text.split("\n", 1)[0], "own": first.own.manifest(),
                     "other": first.other.manifest()})
    lines = [f"Machine: {machine()}. Model: nano, one thread. Threshold {THRESHOLD}, at most {GateSettings().probes} "
             "probes for a part. Held-out documents; other: an adapter of another document of as many facts. Shares "
             "are of the parts that have probes.", "",
             "| documents | count | parts | without probes | own passes | other passes | zeros pass | AUROC | "
             "own score 5% | own score 50% | other score 95% | probes used | seconds p50 | seconds p95 |",
             "|---" * 14 + "|"]
    for row in rows:
        counts = [str(row[key]) for key in ("documents", "count", "parts", "without_probes")]
        lines.append("| " + " | ".join(counts) + " | " + " | ".join(
            f"{row[key]:.3f}" for key in ("own_pass", "other_pass", "zeros_pass", "auroc", "own_p05", "own_p50",
                                          "other_p95")) + f" | {row['probes']:.1f} | {row['seconds_p50']:.2f} | "
            f"{row['seconds_p95']:.2f} |")
    lines += ["", "| threshold | own passes | other passes |", "|---|---|---|"]
    lines += [f"| {row['threshold']} | {row['own_pass']:.3f} | {row['other_pass']:.3f} |" for row in sweep]
    lines += ["", "| hand-made document | own score | own state | other score | other state |", "|---|---|---|---|---|"]
    for item in hand:
        lines.append(f"| {item['title'].strip('# ')} | {item['own']['score']} | {item['own']['state']} | "
                     f"{item['other']['score']} | {item['other']['state']} |")
    return {"threshold": THRESHOLD, "rows": rows, "sweep": sweep, "hand_made": hand}, "\n".join(lines)


def main() -> None:
    """Measure and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60, help="documents of each number of facts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.documents < 2:
        parser.error("--documents: at least 2 are needed")
    generator = HypernetGenerator.load(hypernet_dir(), base_dir(), threads=1)
    wrong = generator.generate([REFERENCE_DOCUMENT])[0].parts[0].lora
    # No budget: the figures must not depend on how busy the machine is.
    gate = Gate(generator.base, generator.tokenizer, wrong, GateSettings(budget_s=1e6))
    judged = [item for facts in FACTS for item in judge(gate, generator, facts, documents(facts, options.documents))]
    data, text = report(judged, judge(gate, generator, 0, HAND_MADE))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "quality_gate.md").write_text(text + "\n")
    (options.output / "quality_gate.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
