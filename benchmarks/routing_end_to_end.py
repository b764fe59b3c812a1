"""What routing costs in right answers: the router beside an oracle, beside the nearest centroid, and beside the base.

    python -m benchmarks.routing_end_to_end [--documents N] [--seed S] [--confidence X]

Starts an Imprint server with the shipped nano models and a fresh data folder; one tenant posts generated documents of
one to four facts. Half of them are pairs: of the same kind, with the same relations, asked in the same words, under
unlike names or under names that differ by one word. Each question is answered greedily

- by the router (model `imprint`);
- by an oracle that always picks right: the part of the question's own document that states the answer, or the base
  where no document does;
- by the candidate with the nearest centroid, and by the router's first one, whatever the question;
- by the base.

An answer is right if it matches the expected one exactly, as in `benchmarks.internalisation`. What the router would
choose at other settings of `router.confidence` follows from the confidences that it lists, and what would then be
answered is known. The nearest centroid is looked for among the candidates that the router lists.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from rich.progress import Progress

from benchmarks.router_calibration import VARIANTS
from benchmarks.server import Answer, Tenant, machine
from hypernet.evaluation.scoring import abstains, contains_value, exact_match
from hypernet.training.corpus.documents import (
    Fact,
    SampledDocument,
    Split,
    all_domains,
    ask,
    ask_elsewhere,
    ask_unanswerable,
    render,
    sample_document,
    sample_facts,
)
from hypernet.training.corpus.small_talk import GENERAL_QUESTIONS, SMALL_TALK
from router.calibrate import Calibration, features, sigmoid
from router.shipped import CALIBRATION_FILE, general_chat
from serve.config import RouterConfig
from tests.server import Server

SPLIT = Split.HELD_OUT
DOCUMENTS, MOST_FACTS, SEED = 60, 4, 5_201
LEAST_DOCUMENTS = 8
"""So that there is a pair of each kind."""
POOL = 2_000
"""Fact sets of which the names and values of pairs are drawn."""
WITHOUT_DOCUMENT = 40
"""Questions of each slice that no document answers, at most."""
CONCURRENCY, SETTLE_S, GATE_BUDGET_S = 16, 60.0, "60"
SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GOAL, RESAMPLES = 0.97, 2_000
ROUTED, ORACLE, NEAREST, BASE, FIRST = "routed", "oracle", "nearest centroid", "base", "first candidate"
T = TypeVar("T")
R = TypeVar("R")


class Slice(StrEnum):
    """What kind of question it is; the right answer is known of those up to `SMALL_TALK`."""

    SINGLE = "document alone of its kind"
    SAME_KIND = "near miss: other names"
    ALIKE = "near miss: names that differ by a word"
    SMALL_TALK = "small talk that the base answers"
    ABSENT = "fact that its document does not state"
    UNKNOWN = "name that no document mentions"
    GENERAL = "general questions"
    CHAT = "general chat that calibrations are fitted on"


ON_DOCUMENTS = (Slice.SINGLE, Slice.SAME_KIND, Slice.ALIKE)
ANSWERED = (*ON_DOCUMENTS, Slice.SMALL_TALK)
FACTUAL = (Slice.ABSENT, Slice.UNKNOWN)


@dataclass(frozen=True)
class Question:
    """A question; `answer` is None where no document and not the base answers it, `document` the place in the list of
    documents of the one that does."""

    slice: Slice
    text: str
    answer: str | None = None
    document: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a question.

    `chosen` is the document that answered through the router (None: the base) for the `reason`, `own_part` whether
    that was with the adapter of the oracle. Of the router's first candidate: `first`, its document, `confidence`, the
    `threshold` that it had to reach at the setting of the run, whether it is `usable`, and its `features` as in
    `router.calibrate`. `answers` by condition.
    """

    question: Question
    chosen: int | None
    own_part: bool
    reason: str
    first: int
    confidence: float
    threshold: float
    usable: bool
    features: tuple[float, ...]
    answers: Mapping[str, str]

    def right(self, condition: str) -> bool:
        """Whether the answer of a condition is the expected one."""
        return self.question.answer is not None and exact_match(self.answers[condition], [self.question.answer])

    @property
    def found(self) -> bool:
        """Whether the first candidate is of the question's own document."""
        return self.question.document is not None and self.first == self.question.document

    def taken(self, setting: float, run: float) -> bool:
        """Whether the router would take its first candidate at this `router.confidence`, where it was `run` in the run.

        An adapter's own offset moves its threshold by as many logits at any setting.
        """
        threshold = sigmoid(_logit(setting) + _logit(self.threshold) - _logit(run))
        return self.usable and self.confidence >= threshold


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


# --- documents and questions ------------------------------------------------------------------------------------------


def _named(fact: Fact, document: SampledDocument, seed: int) -> str:
    """A question for the fact's value that names its entity; of one seed, in the same words for the same relation."""
    rng = Random(seed)
    while True:
        question = ask(fact, document, rng, SPLIT)
        if question.answer == fact.value and fact.entity.lower() in question.text.lower():
            return question.text


class _Pool:
    """Held-out names and values, by domain and relation."""

    def __init__(self, rng: Random) -> None:
        self.names: dict[str, list[str]] = defaultdict(list)
        self.values: dict[tuple[str, str], list[str]] = defaultdict(list)
        for _ in range(POOL):
            for fact in sample_facts(rng, 12, SPLIT):
                for found, value in ((self.names[fact.domain.name], fact.entity),
                                     (self.values[fact.domain.name, fact.relation.name], fact.value)):
                    if value not in found:
                        found.append(value)

    def pair(self, rng: Random, alike: bool, taken: set[str]) -> tuple[SampledDocument, SampledDocument] | None:
        """Two documents that state the same relations, with other values, of two things; None where names or values
        run out. Names that differ by a word are those of things, not of people."""
        domain = rng.choice([one for one in all_domains() if not alike or one.pronouns[0] == "it"])
        relations = [one for one in domain.relations if len(self.values[domain.name, one.name]) > 1]
        free = [name for name in self.names[domain.name] if name not in taken]
        count = rng.randint(1, MOST_FACTS)
        if len(relations) < count or len(free) < 2:
            return None
        names = rng.sample(free, 2)
        if alike:
            names[1] = f"{names[0]}{rng.choice(VARIANTS[1:])}"
        facts: tuple[list[Fact], list[Fact]] = ([], [])
        for relation in rng.sample(relations, count):
            values = rng.sample(self.values[domain.name, relation.name], 2)
            if any(contains_value(*pair) for pair in (values, values[::-1])):
                return None
            for side in (0, 1):
                facts[side].append(Fact(domain, names[side], relation, values[side]))
        first, second = (render(tuple(side), rng, SPLIT) for side in facts)
        return first, second


def sample(documents: int, seed: int) -> tuple[list[SampledDocument], list[Question]]:
    """So many documents, of which a quarter are pairs of each kind, and all questions, shuffled. No name stands in two
    documents."""
    rng = Random(seed)
    pool, taken = _Pool(rng), set[str]()
    found: list[SampledDocument] = []
    questions: list[Question] = []

    def add(slice_: Slice, document: SampledDocument, seeds: Sequence[int]) -> None:
        questions.extend(Question(slice_, _named(fact, document, seed), fact.value, len(found))
                         for fact, seed in zip(document.facts, seeds, strict=True))
        taken.update(fact.entity for fact in document.facts)
        found.append(document)

    unknown: list[str] = []
    for slice_ in (Slice.SAME_KIND, Slice.ALIKE):
        for _ in range(documents // 8):
            while (pair := pool.pair(rng, slice_ is Slice.ALIKE, taken)) is None:
                pass
            seeds = [rng.getrandbits(32) for _ in pair[0].facts]
            for document in pair:
                add(slice_, document, seeds)
            if slice_ is Slice.ALIKE:
                names = [document.facts[0].entity for document in pair]
                other = names[0] + next(word for word in VARIANTS[1:] if names[0] + word != names[1])
                unknown.append(questions[-1].text.replace(names[1], other))
                taken.add(other)
    while len(found) < documents:
        document = sample_document(rng, rng.randint(1, MOST_FACTS), SPLIT)
        if not taken & {fact.entity for fact in document.facts}:
            add(Slice.SINGLE, document, [rng.getrandbits(32) for _ in document.facts])
    questions += _without_document(rng, found, unknown, taken)
    rng.shuffle(questions)
    return found, questions


def _without_document(rng: Random, documents: Sequence[SampledDocument], unknown: list[str],
                      taken: set[str]) -> list[Question]:
    most = min(WITHOUT_DOCUMENT, len(documents))
    found = [Question(Slice.SMALL_TALK, rng.choice(ways), reply) for ways, reply in rng.sample(SMALL_TALK, most)]
    asked = [ask_unanswerable(document, rng, SPLIT) for document in rng.sample(documents, most)]
    found += [Question(Slice.ABSENT, one.text) for one in asked if one is not None]
    # Some names differ by a word from those of documents, the rest are new.
    while len(unknown) < most:
        text = ask_elsewhere(rng, SPLIT)
        if not any(name in text for name in taken):
            unknown.append(text)
    found += [Question(Slice.UNKNOWN, text) for text in unknown[:most]]
    chat = general_chat()
    general = [text for text in GENERAL_QUESTIONS if text not in chat]
    found += [Question(Slice.GENERAL, text) for text in rng.sample(general, most)]
    return [*found, *(Question(Slice.CHAT, text) for text in rng.sample(chat, most))]


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Posted:
    """A document of the tenant, and its part adapters with the text that each covers."""

    id: str
    parts: tuple[tuple[str, str], ...]

    def holding(self, value: str) -> str:
        """The adapter of the only part whose text states the value; the document where that is open."""
        held = [adapter for adapter, text in self.parts if contains_value(text, value)]
        return held[0] if len(held) == 1 else self.id


async def _each(work: Iterable[T], do: Callable[[T], Awaitable[R]], progress: Progress, name: str) -> list[R]:
    """`do` for everything, `CONCURRENCY` at a time."""
    items, gate = list(work), asyncio.Semaphore(CONCURRENCY)
    task = progress.add_task(name, total=len(items))

    async def one(item: T) -> R:
        async with gate:
            result = await do(item)
        progress.advance(task)
        return result
    return list(await asyncio.gather(*(one(item) for item in items)))


async def _post(tenant: Tenant, document: SampledDocument) -> _Posted:
    made = await tenant.post("", document.text)
    response = await tenant.client.get("/v1/adapters", params={"document_id": made["id"], "limit": 100})
    parts = []
    for adapter in response.raise_for_status().json()["data"]:
        spans = [(chunk["start"], chunk["end"]) for chunk in adapter["manifest"]["chunks"]]
        parts.append((adapter["id"], "\n".join(document.text[start:end] for start, end in spans)))
    return _Posted(made["id"], tuple(parts))


async def _route(tenant: Tenant, text: str) -> dict[str, Any]:
    body = {"model": "imprint", "messages": [{"role": "user", "content": text}], "explain": True}
    return dict((await tenant.client.post("/v1/route", json=body)).raise_for_status().json()["explain"])


async def _settled(tenant: Tenant, text: str) -> int:
    """Wait until the tenant's own calibration is in force, or has not come although there was time; its version."""
    end = time.monotonic() + SETTLE_S
    while (version := int((await _route(tenant, text))["calibration"]["version"])) == 0 and time.monotonic() < end:
        await asyncio.sleep(0.5)
    return version


async def ask_all(tenant: Tenant, documents: Sequence[SampledDocument], questions: Sequence[Question],
                  progress: Progress) -> tuple[list[Outcome], dict[str, Any]]:
    """Post the documents, then ask every question in all conditions. Also what the run was like: the version of the
    calibration, how many part adapters there were, and seconds of each stage."""
    clock = [time.perf_counter()]
    posted = await _each(documents, lambda document: _post(tenant, document), progress, "documents")
    clock.append(time.perf_counter())
    # The router fits a tenant's calibration once it has been asked for, so only now, to all of its documents.
    version = await _settled(tenant, questions[0].text)
    clock.append(time.perf_counter())
    listed = await _each([one.text for one in questions], lambda text: _route(tenant, text), progress, "routes")
    models = [_models(question, posted, explained["candidates"])
              for question, explained in zip(questions, listed, strict=True)]
    # Neighbours in the list share an adapter, so that few of them change places in the engine.
    work = sorted({(model, question.text) for question, mine in zip(questions, models, strict=True)
                   for model in mine.values()})
    answers = dict(zip(work, await _each(work, lambda one: tenant.chat(*one), progress, "answers"), strict=True))
    routed = await _each(questions, lambda one: tenant.chat("imprint", one.text), progress, "routed answers")
    clock.append(time.perf_counter())
    places = {one.id: place for place, one in enumerate(posted)}
    outcomes = [_outcome(question, explained["candidates"][0], answer, places,
                         {name: answers[model, question.text] for name, model in mine.items()})
                for question, explained, answer, mine in zip(questions, listed, routed, models, strict=True)]
    seconds = {name: end - begin for name, begin, end in zip(("post", "calibrate", "ask"), clock, clock[1:],
                                                             strict=False)}
    return outcomes, {"calibration": version, "parts": sum(len(one.parts) for one in posted), "seconds": seconds}


def _models(question: Question, posted: Sequence[_Posted], candidates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What to name in `model` for each condition but the router's."""
    nearest = max(candidates, key=lambda one: float(one["similarity"]))
    own = "base"
    if question.document is not None and question.answer is not None:
        own = posted[question.document].holding(question.answer)
    return {ORACLE: own, NEAREST: nearest["adapter_id"], FIRST: candidates[0]["adapter_id"], BASE: "base"}


def _outcome(question: Question, first: Mapping[str, Any], routed: Answer, places: Mapping[str, int],
             pinned: Mapping[str, Answer]) -> Outcome:
    if first["confidence"] is None:
        raise RuntimeError("the router lists no confidence: it has no calibration for its encoder")
    return Outcome(
        question=question,
        chosen=None if routed.document_id is None else places[routed.document_id],
        own_part=routed.adapter_id is not None and routed.adapter_id == pinned[ORACLE].adapter_id,
        reason=routed.reason,
        first=places[first["document_id"]],
        confidence=first["confidence"],
        threshold=first["threshold"],
        usable=first["state"] == "ready",
        features=features(first["similarity"], first["word_share"], first["score"] - first["rank"], first["margin"]),
        answers={ROUTED: routed.content, **{name: answer.content for name, answer in pinned.items()}},
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def _share(of: Iterable[bool]) -> float | None:
    found = list(of)
    return statistics.mean(found) if found else None


def _ratio(outcomes: Sequence[Outcome], condition: str) -> float | None:
    oracle = sum(one.right(ORACLE) for one in outcomes)
    return sum(one.right(condition) for one in outcomes) / oracle if oracle else None


def interval(outcomes: Sequence[Outcome], condition: str) -> tuple[float, float] | None:
    """The middle 95% of the ratio to the oracle over resampled documents (bootstrap by clusters: questions on one
    document share its adapter). None where nothing can be divided by."""
    clusters: dict[object, list[Outcome]] = defaultdict(list)
    for place, one in enumerate(outcomes):
        document = one.question.document
        clusters[("question", place) if document is None else document].append(one)
    counts = [(sum(one.right(condition) for one in some), sum(one.right(ORACLE) for one in some))
              for some in clusters.values()]
    rng, ratios = Random(0), []
    for _ in range(RESAMPLES if counts else 0):
        drawn = rng.choices(counts, k=len(counts))
        if oracle := sum(pair[1] for pair in drawn):
            ratios.append(sum(pair[0] for pair in drawn) / oracle)
    if len(ratios) < 2:
        return None
    cuts = statistics.quantiles(ratios, n=40)
    return cuts[0], cuts[-1]


def answered_row(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Shares of right answers, and their ratios to the oracle's, of questions whose answer is known."""
    return {"slice": name, "questions": len(outcomes),
            **{condition: _share(one.right(condition) for one in outcomes)
               for condition in (ROUTED, ORACLE, NEAREST, FIRST, BASE)},
            "ratio_routed": _ratio(outcomes, ROUTED), "interval_routed": interval(outcomes, ROUTED),
            "ratio_nearest": _ratio(outcomes, NEAREST), "ratio_first": _ratio(outcomes, FIRST)}


def choice_row(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Who answered questions on documents, as shares of them; of the right first candidates how many the base stood in
    for; and of the adapters used how many were another document's."""
    used = [one for one in outcomes if one.chosen is not None]
    return {"slice": name, "questions": len(outcomes),
            "own_part": _share(_own(one) and one.own_part for one in outcomes),
            "other_part": _share(_own(one) and not one.own_part for one in outcomes),
            "other_document": _share(one.chosen is not None and not _own(one) for one in outcomes),
            "base": _share(one.chosen is None for one in outcomes),
            "right_first": _share(one.found for one in outcomes),
            "right_left_to_base": _share(one.chosen is None for one in outcomes if one.found),
            "wrong_of_used": _share(not _own(one) for one in used)}


def _own(outcome: Outcome) -> bool:
    return outcome.chosen is not None and outcome.chosen == outcome.question.document


def cause(outcome: Outcome) -> str:
    """Why the router may have lost an answer that the oracle has right."""
    if outcome.question.document is None:
        return "an adapter answered, none should" if outcome.chosen is not None else "the base, as it should"
    if outcome.chosen is None:
        which = "right" if outcome.found else "wrong"
        return f"left to the base ({outcome.reason}), first candidate {which}"
    if outcome.chosen != outcome.question.document:
        return "another document"
    return "the same adapter" if outcome.own_part else "another part of the document"


def sweep_row(outcomes: Sequence[Outcome], setting: float, run: float) -> dict[str, Any]:
    """What would be at another setting of `router.confidence`, from answers that are known.

    `net`: over questions on facts, the mean of 1 for a right answer, 0 for "I do not know" and -1 for anything else.
    """
    taken = [one.taken(setting, run) for one in outcomes]
    by = [FIRST if one else BASE for one in taken]
    rows = list(zip(outcomes, taken, by, strict=True))
    known = [row for row in rows if row[0].question.slice in ANSWERED]
    others = [row for row in rows if row[0].question.slice not in ANSWERED]
    on_documents = [row for row in known if row[0].question.document is not None]
    factual = [row for row in others if row[0].question.slice in FACTUAL]
    right = [one.right(name) for one, _, name in known]
    oracle = sum(one.right(ORACLE) for one, _, _ in known)
    net = [1 if one.right(name) else 0 if abstains(one.answers[name]) else -1
           for one, _, name in [*on_documents, *factual]]
    return {"confidence": setting, "right": _share(right), "ratio": sum(right) / oracle if oracle else None,
            "right_left_to_base": _share(not used for one, used, _ in on_documents if one.found),
            "wrong_document": _share(used and not one.found for one, used, _ in on_documents),
            "small_talk_to_adapter": _share(used for one, used, _ in known if one.question.document is None),
            "unanswerable_to_adapter": _share(used for _, used, _ in others),
            "unanswerable_stated": _share(not abstains(one.answers[name]) for one, _, name in factual),
            "net": statistics.mean(net) if net else None}


def with_calibration(outcomes: Sequence[Outcome], calibration: Calibration, run: float) -> list[Outcome]:
    """The same questions as another calibration would have judged their first candidates."""
    # The IDs of adapters are not kept: no calibration that is fitted elsewhere holds an offset of theirs.
    return [replace(one, confidence=calibration.probability(one.features), threshold=run) for one in outcomes]


def figures(outcomes: Sequence[Outcome], run: float) -> dict[str, Any]:
    """All that the tables show. `run` is the `router.confidence` of the run."""
    by_slice = {kind: [one for one in outcomes if one.question.slice is kind] for kind in Slice}
    documents = [one for kind in ON_DOCUMENTS for one in by_slice[kind]]
    known = [*documents, *by_slice[Slice.SMALL_TALK]]
    shipped = with_calibration(outcomes, Calibration.from_json(json.loads(CALIBRATION_FILE.read_text())), run)
    lost = Counter(cause(one) for one in known if one.right(ORACLE) and not one.right(ROUTED))
    gained = Counter(cause(one) for one in known if one.right(ROUTED) and not one.right(ORACLE))
    nobody = []
    for kind in (kind for kind in Slice if kind not in ANSWERED):
        some = by_slice[kind]
        stated = {name: _share(not abstains(one.answers[name]) for one in some) if kind in FACTUAL else None
                  for name in (ROUTED, NEAREST, BASE)}
        nobody.append({"slice": str(kind), "questions": len(some),
                       "adapter_used": _share(one.chosen is not None for one in some), "stated": stated})
    return {
        "answered": [*(answered_row(str(kind), by_slice[kind]) for kind in ANSWERED),
                     answered_row("on documents", documents), answered_row("all", known)],
        "choices": [*(choice_row(str(kind), by_slice[kind]) for kind in ON_DOCUMENTS),
                    choice_row("on documents", documents)],
        "lost": dict(lost.most_common()), "gained": dict(gained.most_common()), "nobody": nobody,
        "sweep": [sweep_row(outcomes, setting, run) for setting in SWEEP],
        "sweep_shipped": [sweep_row(shipped, setting, run) for setting in SWEEP],
    }


def report(result: dict[str, Any]) -> str:
    """The Markdown tables."""
    found, seconds = result["figures"], result["seconds"]
    overall = found["answered"][-1]
    reached = overall["ratio_routed"] is not None and overall["ratio_routed"] >= GOAL
    lines = [f"Machine: {result['machine']}. Model: nano. {result['documents']} documents of 1 to {MOST_FACTS} facts, "
             f"{result['parts']} part adapters, one tenant, calibration {result['calibration']} "
             f"(0: the shipped one), router.confidence {result['confidence']}, seed {result['seed']}. Greedy answers, "
             f"exact match. Seconds: {seconds['post']:.0f} to post, {seconds['ask']:.0f} to ask.", "",
             f"Routed / oracle: {_number(overall['ratio_routed'])} (goal: at least {GOAL}; "
             f"{'reached' if reached else 'not reached'}).", "",
             "## Right answers", "",
             "First candidate: the router's best one, taken always. 95%: of routed / oracle, over resampled documents.",
             "",
             "| questions on | number | routed | oracle | nearest centroid | first candidate | base | "
             "routed / oracle | 95% | nearest centroid / oracle | first candidate / oracle |", "|---" * 11 + "|"]
    for row in found["answered"]:
        ends = row["interval_routed"]
        shares = [_number(row[name]) for name in (ROUTED, ORACLE, NEAREST, FIRST, BASE, "ratio_routed")]
        ratios = [_number(row[name]) for name in ("ratio_nearest", "ratio_first")]
        between = "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
        lines.append(f"| {row['slice']} | {row['questions']} | {' | '.join([*shares, between, *ratios])} |")
    lines += ["", "## Who answered through the router", "", "Shares of the questions; the last two columns: of the "
              "right first candidates, and of the adapters used.", "",
              "| questions on | number | the right adapter | another part | another document | base | "
              "right document first | right ones left to the base | wrong ones used |", "|---" * 9 + "|"]
    lines += [f"| {row['slice']} | {row['questions']} | " + " | ".join(_number(row[name]) for name in (
        "own_part", "other_part", "other_document", "base", "right_first", "right_left_to_base", "wrong_of_used"))
        + " |" for row in found["choices"]]
    lines += ["", "Answers that the oracle has right and the router has not, by who answered; and the reverse:", "",
              "| who answered | lost | gained |", "|---|---|---|"]
    lines += [f"| {name} | {found['lost'].get(name, 0)} | {found['gained'].get(name, 0)} |"
              for name in dict.fromkeys([*found["lost"], *found["gained"]])]
    lines += ["", "## Questions without an answer", "", "How often an adapter was used, and how often something was "
              "stated instead of \"I do not know\".", "",
              "| questions | number | adapter used | stated, routed | stated, nearest centroid | stated, base |",
              "|---" * 6 + "|"]
    lines += [f"| {row['slice']} | {row['questions']} | {_number(row['adapter_used'])} | "
              + " | ".join(_number(row["stated"][name]) for name in (ROUTED, NEAREST, BASE)) + " |"
              for row in found["nobody"]]
    lines += ["", "## Other settings of router.confidence", "",
              "From the answers of the first candidate and the base. Wrong document: of the questions on documents. To "
              "an adapter: of the small talk, and of the questions without an answer. Stated: of those on a fact that "
              "is not stated or a name that is not mentioned. Net: over these and the questions on documents, the mean "
              "of 1 for a right answer, 0 for \"I do not know\" and -1 for anything else."]
    for title, rows in (("The confidences of this run:", found["sweep"]),
                        ("Those of the shipped calibration:", found["sweep_shipped"])):
        lines += ["", title, "",
                  "| router.confidence | right | / oracle | right ones left to the base | wrong document | "
                  "small talk to an adapter | unanswerable to an adapter | stated | net |", "|---" * 9 + "|"]
        lines += [f"| {row['confidence']} | " + " | ".join(_number(row[name]) for name in (
            "right", "ratio", "right_left_to_base", "wrong_document", "small_talk_to_adapter",
            "unanswerable_to_adapter", "unanswerable_stated", "net")) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


async def _measure(url: str, key: str, documents: int, seed: int, confidence: float) -> dict[str, Any]:
    sampled, questions = sample(documents, seed)
    tenant = Tenant(url, key)
    try:
        with Progress() as progress:
            outcomes, run = await ask_all(tenant, sampled, questions, progress)
    finally:
        await tenant.client.aclose()
    return {"machine": machine(), "documents": documents, "seed": seed, "confidence": confidence, **run,
            "figures": figures(outcomes, confidence), "outcomes": [asdict(one) for one in outcomes]}


def write(result: dict[str, Any], folder: Path) -> str:
    """Both files; in the JSON one every outcome is a line of its own. Returns the tables."""
    table = report(result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "routing_end_to_end.md").write_text(table)
    head = json.dumps({name: value for name, value in result.items() if name != "outcomes"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in result["outcomes"])
    (folder / "routing_end_to_end.json").write_text(f'{head[:-2]},\n "outcomes": [\n  {rows}\n ]\n}}\n')
    return table


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: it must lie between 0 and 1")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Run against a server of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help=f"at least {LEAST_DOCUMENTS}")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--confidence", type=_probability, default=RouterConfig().confidence, help="router.confidence")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.documents < LEAST_DOCUMENTS:
        parser.error(f"--documents: {options.documents}, but at least {LEAST_DOCUMENTS} are needed, "
                     "for a pair of each kind")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        # A gate without haste: what it asks must not depend on how busy the machine is.
        server.start(ROUTER__CONFIDENCE=str(options.confidence), ROUTER__CALIBRATE_EVERY_S="2",
                     GENERATOR__GATE__BUDGET_S=GATE_BUDGET_S)
        try:
            key = server.create_key("routing")
            result = asyncio.run(_measure(server.url, key, options.documents, options.seed, options.confidence))
        finally:
            server.stop()
    print(write(result, options.output))


if __name__ == "__main__":
    main()
