"""Fits the calibration that `router` ships, and measures it on tenants that it was not fitted to.

    python -m benchmarks.router_calibration            # writes benchmarks/results/router_calibration.{md,json}
    python -m benchmarks.router_calibration --ship     # and router/data/calibration.json

Tenants are sampled from the corpus of the nano model: half have documents of distinct names, half near misses (names
such as "Corvo", "Corvo Mini", "Corvo 2" of one domain). Of each tenant's questions about half are answered by a
document, a quarter were answered by a document that was taken out (so others of the tenant are the only candidates),
and the rest are about other things: general chat and questions on names unknown to the tenant. A candidate is right
where it is the document that the question was asked about.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from hypernet.training.corpus.documents import (
    Fact,
    SampledDocument,
    Split,
    all_domains,
    ask,
    ask_elsewhere,
    render,
    sample_document,
)
from router.calibrate import Calibration, Example, features_of, fit, quality_of
from router.centroids import document_centroids
from router.embed import MiniLmEncoder
from router.index import AdapterEntry, Scope, Scored, TenantIndex
from router.shipped import CALIBRATION_FILE, general_chat
from router.text import words

VARIANTS = ("", " Mini", " Pro", " 2")
FACTS = 5
SIZES = (1, 3)
QUESTIONS = 3
"""On each document."""
CENTROIDS = 4
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def near_misses(rng: Random, count: int) -> list[SampledDocument]:
    """Documents of one domain whose names differ by a word."""
    domain = rng.choice([one for one in all_domains() if len(one.relations) >= FACTS])
    documents: list[SampledDocument] = []
    while len(documents) < count:
        name = domain.entity(rng)
        for variant in VARIANTS[: count - len(documents)]:
            relations = rng.sample(domain.relations, FACTS)
            facts = tuple(Fact(domain, name + variant, relation, relation.value(rng)) for relation in relations)
            documents.append(render(facts, rng, Split.TRAIN))
    return documents


def tenant_examples(encoder: MiniLmEncoder, rng: Random, count: int, alike: bool) -> list[Example]:
    """The best candidate of each question to one tenant, and whether it is right."""
    documents = near_misses(rng, count) if alike else [sample_document(rng, FACTS) for _ in range(count)]
    index = TenantIndex("ten_x", encoder.dimension)
    index.update([
        AdapterEntry.of_document(
            adapter_id=f"adp_{i}", tenant_id="ten_x", document_id=f"doc_{i}", title="", text=document.text,
            centroids=document_centroids(encoder, "", [document.text], CENTROIDS),
        )
        for i, document in enumerate(documents)
    ])  # fmt: skip
    everything = [f"adp_{i}" for i in range(count)]
    asked: list[tuple[str, int | None, list[str]]] = []  # question, its document, the documents that are there

    def visible(own: str | None = None) -> list[str]:
        """All documents of the tenant, or as if it had one or three, `own` among them."""
        others = [name for name in everything if name != own]
        some = rng.sample(others, rng.choice(SIZES) - (own is not None)) if rng.random() < 0.4 else others
        return [*some, *([own] if own is not None else [])]

    for i, document in enumerate(documents):
        questions = [ask(fact, document, rng).text for fact in rng.sample(document.facts, QUESTIONS)]
        asked += [(text, i, visible(f"adp_{i}")) for text in questions]
        asked += [(text, None, [name for name in visible() if name != f"adp_{i}"]) for text in questions[:2]]
    asked += [(text, None, visible()) for text in rng.sample(general_chat(), count)]
    asked += [(ask_elsewhere(rng), None, visible()) for _ in range(count // 4)]
    rng.shuffle(asked)
    vectors = encoder.embed([text for text, _, _ in asked])
    examples = []
    for vector, (text, document_number, allowed) in zip(vectors, asked, strict=True):
        results = index.search(vector, words(text), Scope(adapter_ids=frozenset(allowed)), limit=2)
        if not results:
            continue
        right = document_number is not None and results[0].entry.adapter_id == f"adp_{document_number}"
        examples.append(Example(features_of(results[0], lead(results)), right))
    return examples


def lead(results: Sequence[Scored]) -> float | None:
    """The first result's lead in rank."""
    return results[0].rank - results[1].rank if len(results) > 1 else None


def measure(calibration: Calibration, examples: Sequence[Example]) -> tuple[dict[str, object], list[str]]:
    """Quality on examples, and for each threshold how many are served and how many of those wrongly."""
    p = np.array([calibration.probability(one.features) for one in examples])
    y = np.array([float(one.right) for one in examples])
    quality = quality_of(p, y)
    rows = []
    for threshold in THRESHOLDS:
        served = p >= threshold
        rows.append({
            "threshold": threshold,
            "right_served": float((served & (y > 0)).sum() / y.sum()),
            "served_wrong": float((served & (y == 0)).sum() / max(1, served.sum())),
        })  # fmt: skip
    lines = ["| questions | top-1 candidate right | ECE | AUROC | log loss |", "|---|---|---|---|---|",
             f"| {quality.examples} | {y.mean():.3f} | {quality.ece:.3f} | {quality.auroc:.3f} | "
             f"{quality.log_loss:.3f} |", "", "| confidence | right ones served | wrong among the served |",
             "|---|---|---|"]
    lines += [f"| {row['threshold']} | {row['right_served']:.3f} | {row['served_wrong']:.3f} |" for row in rows]
    return {"ece": quality.ece, "auroc": quality.auroc, "log_loss": quality.log_loss, "rows": rows}, lines


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=12, help="of them a third are held out")
    parser.add_argument("--documents", type=int, default=16, help="of each tenant")
    parser.add_argument("--ship", action="store_true", help="write router/data/calibration.json")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    encoder = MiniLmEncoder.load(threads=1)
    fitted: list[Example] = []
    held_out: list[Example] = []
    for number in range(options.tenants):
        rng = Random(20_000 + number)
        part = tenant_examples(encoder, rng, options.documents, alike=number % 2 == 0)
        (held_out if number % 6 in (4, 5) else fitted).extend(part)
    calibration = fit(fitted, encoder.id, encoder.version, "")
    data, lines = measure(calibration, held_out)
    text = "\n".join([f"Fitted to {len(fitted)} questions ({calibration.method}); measured on other tenants.", "",
                      *lines])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "router_calibration.md").write_text(text + "\n")
    (options.output / "router_calibration.json").write_text(
        json.dumps({**data, "calibration": calibration.to_json()}, indent=1) + "\n")
    if options.ship:
        CALIBRATION_FILE.write_text(json.dumps(replace(calibration, offsets={}).to_json(), indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
