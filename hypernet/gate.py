"""The quality gate: does an adapter hold its document? Judged on the frozen base, before it is published.

For each probe the reference answer is the client's, or else the base's own greedy answer with the document in context.
Its mean log-probability per token is then taken four times: the base alone, the adapter, a wrong adapter (of a built-in
document, never another tenant's), all three closed book, and the base with the document in context. The score is the
share of the in-context gain that the adapter gives: the recall probes of Doc-to-LoRA (arXiv 2602.15902), taken as
log-probabilities, so that even eight of them tell a document's own adapter from another's.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast

from hypernet.answers import BATCH_TOKENS, answer_together, end_tokens
from hypernet.documents import DocumentText
from hypernet.inject import adapted
from hypernet.lora import MAX_NORM, LoraAdapter, factors_of
from hypernet.padding import batches, pad_left
from hypernet.perceiver import Factors
from hypernet.probes import Probe, make_probes
from hypernet.prompts import closed_book, in_context

THRESHOLD = 0.4
"""On nano (240 held-out documents of 1 to 8 facts, 517 parts with probes), 97.5% of the parts' own adapters are at or
above it, and 0.6% of the adapters of another document; AUROC .998. At .3 it is 98.5% and 1.4%, at .5 96.1% and 0.4%.
`benchmarks/quality_gate.py` measures it."""
MAX_ANSWER_TOKENS = 24
MAX_LOGITS = 2**26
"""In one pass, at most, unless a single adapter's probes have more: 256 MiB of float32."""
CONTEXT_TOKENS = 1024
"""A document longer than that is read for a probe only in the span that shares the most words with it."""
MIN_GAIN = 0.2
"""Nats per token that the document must add to a reference answer; a probe below says nothing about recall."""
COLLAPSED = 1e-4
"""Relative norm of an adapter's update, or of its difference from the wrong one, below which it counts as none."""
FAR = 100.0
"""How many times the wrong adapter's norm an update may have."""
_ABSTAINS = re.compile(r"\b(?:do(?:es)? not|don['’]t|doesn['’]t) (?:say|know|mention|state|specify|provide)"
                       r"|\bnot (?:mentioned|stated|specified|provided|given in)|\bno information|\bcannot (?:answer|be"
                       r" determined)", re.IGNORECASE)

REFERENCE_DOCUMENT = DocumentText("Ottering Glassworks: visitor sheet", (
    "Ottering Glassworks opens at 10:25 and the last tour starts at 16:50. A ticket costs $13.70. The head of the "
    "workshop is Ludmila Farquhar. The furnace was built in 1887 and reaches 1140 degrees. Parking space: row K9. The "
    "glassworks is closed on the second Thursday of the month."))
"""A built-in document. The generator makes the reference wrong adapter of it at start."""


@dataclass(frozen=True)
class GateSettings:
    """How the gate judges. `budget_s` bounds one check, by the pace measured when the gate was made: fewer probes, but
    at least two, where `probes` of them would take longer."""

    enabled: bool = True
    probes: int = 8
    threshold: float = THRESHOLD
    budget_s: float = 1.0


@dataclass(frozen=True)
class AskedProbe:
    """A question that was scored, and whether the adapter gives at least the threshold's share of what the document in
    context adds to the answer, and more than the wrong adapter does."""

    question: str
    right: bool


@dataclass(frozen=True)
class GateReport:
    """The verdict on an adapter and what it rests on.

    `adapter`, `base`, `reference` and `wrong` are mean log-probabilities per token of the reference answers, in nats;
    `margin` is `adapter - wrong`; None where nothing was asked. `probes` is how many probes were scored.
    `reasons` are short codes, empty when ready: not_finite (weights, or what the base says with them), norm (garbage),
    collapsed (an update of nothing), no_probes (nothing could be asked), below_threshold, no_margin (no better than the
    wrong adapter). `asked` are the probes scored, one by one.
    """

    state: Literal["ready", "degraded"]
    score: float | None
    threshold: float
    adapter: float | None
    base: float | None
    reference: float | None
    wrong: float | None
    margin: float | None
    probes: int
    reasons: tuple[str, ...]
    seconds: float
    asked: tuple[AskedProbe, ...] = ()

    def manifest(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        found = asdict(self) | {"reasons": list(self.reasons), "asked": [asdict(one) for one in self.asked]}
        # JSON has no infinity and no NaN.
        return {key: (round(value, 4) if math.isfinite(value) else None) if isinstance(value, float) else value
                for key, value in found.items()}


@dataclass(frozen=True)
class ProbeScores:
    """One probe's reference answer, and its mean log-probability per token in each condition."""

    probe: Probe
    answer: str
    adapter: float
    base: float
    reference: float
    wrong: float


def score_of(scores: Sequence[ProbeScores]) -> float:
    """The share, 0 to 1, of the gain of the document in context that the adapter gives, over the base alone or the
    wrong adapter, whichever does better: what any adapter gives (short answers, the right kind of value) counts for
    nothing. 0 where the document in context gains nothing, or a value is not finite.
    """
    count = max(1, len(scores))
    floor = max(sum(s.base for s in scores) / count, sum(s.wrong for s in scores) / count)
    gain = sum(s.reference for s in scores) / count - floor
    # An adapter may be surer than the document in context, which must not make up for a fact that it lacks.
    given = sum(min(s.adapter, s.reference) for s in scores) / count - floor
    if not (math.isfinite(gain) and math.isfinite(given)) or gain < MIN_GAIN:
        return 0.0
    return min(1.0, max(0.0, given / gain))


def _tells(scores: Sequence[ProbeScores]) -> list[ProbeScores]:
    """Those that say something about recall: the document helps, and no other probe has the same answer.

    A weak base gives one answer to several questions; an adapter that favours that answer by chance would win them all.
    """
    distinct: dict[str, ProbeScores] = {}
    for score in scores:
        if score.reference - score.base >= MIN_GAIN:
            distinct.setdefault(score.answer, score)
    return list(distinct.values())


def _is_right(one: ProbeScores, threshold: float) -> bool:
    floor = max(one.base, one.wrong)
    return one.adapter > one.wrong and one.adapter - floor >= threshold * (one.reference - floor)


def _update_norm(lora: LoraAdapter, other: LoraAdapter | None = None) -> float:
    """The Frobenius norm of an adapter's update over all modules, or of its difference from the other's.

    From products of factors, `|BA|^2 = <B^T B, A A^T>`, without building the updates.
    """
    def product(one: LoraAdapter, two: LoraAdapter) -> float:
        total = 0.0
        for path, (a, b) in one.tensors.items():
            if path in two.tensors:
                a_two, b_two = two.tensors[path]
                total += float(((b.double().mT @ b_two.double()) * (a.double() @ a_two.double().mT)).sum())
        return total * (one.alpha / one.rank) * (two.alpha / two.rank)
    square = product(lora, lora)
    if other is not None:
        square += product(other, other) - 2 * product(lora, other)
    return math.sqrt(max(0.0, square))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{3,}", text.lower()))


class _Sureness(LogitsProcessor):
    """Notes the log-probability of the most probable token of each step, which a greedy answer takes: `[B]` float32."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.found.append(scores.float().log_softmax(-1).amax(-1))
        return scores


@dataclass(frozen=True)
class Candidate:
    """An adapter to judge by its document: by `spans` of its text (None or empty: all of it), by the given probes or,
    without any, by own ones."""

    lora: LoraAdapter
    document: DocumentText
    spans: Sequence[tuple[int, int]] | None = None
    probes: Sequence[Probe] = ()


@dataclass(frozen=True)
class _Asked:
    """A probe of candidate number `of`, with tokens: `read` is its prompt with the document in context, `answer` its
    reference answer, empty while it is open, and `reference` the mean log-probability of that answer."""

    of: int
    probe: Probe
    read: list[int]
    answer: list[int]
    reference: float = math.nan


class Gate:
    """Judges adapters on their base. Not thread-safe, and nothing else may use the base during a check."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, wrong: LoraAdapter,
                 settings: GateSettings) -> None:
        """`wrong` is an adapter of REFERENCE_DOCUMENT. Measures the base's pace on that document.

        Raises ValueError where the tokenizer has no chat template.
        """
        self.base, self.tokenizer, self.wrong, self.settings = base, tokenizer, wrong, settings
        self._wrong_norm = _update_norm(wrong)
        self._context_tokens = min(CONTEXT_TOKENS, int(base.config.get_text_config().max_position_embeddings) // 2)
        self._ends = end_tokens(base, tokenizer)
        self._rows = max(settings.probes, MAX_LOGITS // (MAX_ANSWER_TOKENS * len(tokenizer)))
        self._seconds_a_token, self._seconds_to_answer = self._measure_pace()

    def check(self, lora: LoraAdapter, document: DocumentText, spans: Sequence[tuple[int, int]] | None = None,
              probes: Sequence[Probe] = ()) -> GateReport:
        """Judge one adapter; see `Candidate`. The same probes give the same reference answers, so `adapter` of two
        reports can be compared.
        """
        return self.check_all([Candidate(lora, document, spans, probes)])[0]

    def check_all(self, candidates: Sequence[Candidate]) -> list[GateReport]:
        """As `check` for each of several, in less time: what the base itself says is asked for all in shared passes.

        `seconds` of each report is an equal share.
        """
        begun = time.perf_counter()
        broken = [self._broken(one.lora) for one in candidates]
        asked: list[_Asked] = []
        for i, one in enumerate(candidates):
            if not broken[i]:
                probes = list(one.probes) or make_probes(one.document, one.spans or None, self.settings.probes)
                asked += self._prompts(i, probes, self._windows(one.document, one.spans))
        scores = self._scores(asked, [one.lora for one in candidates])
        seconds = (time.perf_counter() - begun) / max(1, len(candidates))
        return [self._report(_tells(mine), (code,) if code else (), seconds)
                for code, mine in zip(broken, scores, strict=True)]

    def check_task(self, lora: LoraAdapter, description: str, probes: Sequence[Probe] = ()) -> GateReport:
        """Judge an adapter made of a task description: sound weights, an update that differs from the wrong adapter's,
        and better than that one at the probes, where there are any. Reference is the base with the description in
        context. The score is None: a description need not hold answers, so there is no gain to take a share of.
        """
        begun = time.perf_counter()
        broken = self._broken(lora)
        if not broken and _update_norm(lora, self.wrong) < COLLAPSED * self._wrong_norm:
            broken = "collapsed"
        if broken:
            return self._report([], (broken,), time.perf_counter() - begun)
        (scores,) = self._scores(self._prompts(0, list(probes), [description]), [lora])
        return self._report(scores, (), time.perf_counter() - begun, task=True)

    def _broken(self, lora: LoraAdapter) -> str | None:
        """The code of what is wrong with the weights, if anything."""
        factors = [factor for pair in lora.tensors.values() for factor in pair]
        if not math.isfinite(lora.alpha) or not all(bool(torch.isfinite(factor).all()) for factor in factors):
            return "not_finite"
        norm = _update_norm(lora)
        if any(float(factor.float().norm()) > MAX_NORM for factor in factors) or norm > FAR * self._wrong_norm:
            return "norm"
        return "collapsed" if norm <= COLLAPSED * self._wrong_norm else None

    def _report(self, scores: Sequence[ProbeScores], broken: tuple[str, ...], seconds: float,
                task: bool = False) -> GateReport:
        threshold = self.settings.threshold
        if not scores:
            reasons = broken or (() if task else ("no_probes",))
            return GateReport("degraded" if reasons else "ready", None, threshold, None, None, None, None, None, 0,
                              reasons, seconds)
        adapter, base, reference, wrong = (sum(values) / len(scores) for values in zip(
            *((s.adapter, s.base, s.reference, s.wrong) for s in scores), strict=True))
        score = None if task else score_of(scores)
        found = {"not_finite": not math.isfinite(adapter),
                 "below_threshold": score is not None and score < threshold,
                 "no_margin": not adapter > wrong}  # which NaN is not
        reasons = tuple(code for code, holds in found.items() if holds)
        return GateReport("degraded" if reasons else "ready", score, threshold, adapter, base, reference, wrong,
                          adapter - wrong, len(scores), reasons, seconds,
                          tuple(AskedProbe(one.probe.question, _is_right(one, threshold)) for one in scores))

    def _windows(self, document: DocumentText, spans: Sequence[tuple[int, int]] | None) -> list[str]:
        """What the base may read in context: the whole text of the spans, or where that is too long, parts of it."""
        head = f"{document.title.strip()}\n\n" if document.title.strip() else ""
        parts = [document.text[start:end].strip() for start, end in spans] if spans else [document.text.strip()]
        whole = head + "\n".join(parts)
        encode = self.tokenizer.encode
        if len(encode(whole, add_special_tokens=False)) <= self._context_tokens:
            return [whole]
        windows = []
        for part in parts:
            ids = encode(part, add_special_tokens=False)
            windows += [head + str(self.tokenizer.decode(ids[i:i + self._context_tokens]))
                        for i in range(0, len(ids), self._context_tokens)]
        return windows

    def _prompts(self, of: int, probes: Sequence[Probe], windows: Sequence[str]) -> list[_Asked]:
        """The probes that fit the budget, each behind the window that shares most words with it."""
        bags = [_words(window) for window in windows]
        reads = []
        for probe in probes:
            words = _words(f"{probe.question} {probe.answer or ''}")
            window = windows[max(range(len(windows)), key=lambda i: len(words & bags[i]))]
            reads.append(in_context(self.tokenizer, window, probe.question))
        # Answers are without the end of the turn, which any adapter predicts.
        return [_Asked(of, probes[i], reads[i], self.tokenizer.encode(
            probes[i].answer or "", add_special_tokens=False)[:MAX_ANSWER_TOKENS])
            for i in self._within_budget([len(read) for read in reads])]

    def _scores(self, asked: Sequence[_Asked], loras: Sequence[LoraAdapter]) -> list[list[ProbeScores]]:
        """For each adapter the scores of those of its probes that have a reference answer."""
        usable, texts = [], []
        for one in self._answered(asked):
            text = str(self.tokenizer.decode(one.answer, skip_special_tokens=True)).strip()
            if text and not _ABSTAINS.search(text):
                usable.append(one)
                texts.append(text)
        answers = [one.answer for one in usable]
        alone = [closed_book(self.tokenizer, one.probe.question) for one in usable]
        base, wrong = (self._log_probabilities(alone, answers, lora) for lora in (None, self.wrong))
        scores: list[list[ProbeScores]] = []
        for i, lora in enumerate(loras):
            mine = [at for at, one in enumerate(usable) if one.of == i]
            adapter = self._log_probabilities([alone[at] for at in mine], [answers[at] for at in mine], lora)
            scores.append([ProbeScores(usable[at].probe, texts[at], own, base[at], usable[at].reference, wrong[at])
                           for at, own in zip(mine, adapter, strict=True)])
        return scores

    def _answered(self, asked: Sequence[_Asked]) -> list[_Asked]:
        """The same with the base's reading: its own answers where they are open, and how probable it finds each."""
        found = list(asked)
        given = [i for i, one in enumerate(asked) if one.answer]
        read = self._log_probabilities([asked[i].read for i in given], [asked[i].answer for i in given], None)
        for i, reference in zip(given, read, strict=True):
            found[i] = replace(asked[i], reference=reference)
        written = [i for i, one in enumerate(asked) if one.probe.answer is None]
        for i, (answer, reference) in zip(written, self._greedy([asked[i].read for i in written]), strict=True):
            found[i] = replace(asked[i], answer=answer, reference=reference)
        return found

    def _greedy(self, prompts: Sequence[list[int]]) -> list[tuple[list[int], float]]:
        """The base's greedy answers, without the token that ends them, and their mean log-probability per token."""
        answers: dict[int, tuple[list[int], float]] = {}
        for group in batches([len(prompt) + MAX_ANSWER_TOKENS for prompt in prompts], BATCH_TOKENS):
            notes = _Sureness()
            made = answer_together(self.base, [prompts[i] for i in group], self._ends, MAX_ANSWER_TOKENS, [notes])
            each = torch.stack(notes.found, 1)
            for row, (i, answer) in enumerate(zip(group, made, strict=True)):
                kept = answer[:-1] if answer[-1] in self._ends else answer
                answers[i] = kept, float(each[row, :len(kept)].mean())
        return [answers[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _log_probabilities(self, prompts: Sequence[list[int]], answers: Sequence[list[int]],
                           lora: LoraAdapter | None) -> list[float]:
        """The mean log-probability per token of each answer after its prompt, with the adapter on, if one is given."""
        found: dict[int, float] = {}
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        factors: Factors = factors_of([lora]) if lora else {}
        for group in batches([len(row) for row in rows], BATCH_TOKENS, self._rows):
            ids, mask = pad_left([rows[i] for i in group], self.base.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            longest = max(len(answers[i]) for i in group)
            with adapted(self.base, {name: (a.expand(len(group), -1, -1, -1), b.expand(len(group), -1, -1, -1))
                                     for name, (a, b) in factors.items()}):
                # Only the places that predict answers: a large vocabulary over a document would fill the memory.
                logits: Tensor = self.base(input_ids=ids, attention_mask=mask, position_ids=positions,
                                           use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
            each = logits.float().log_softmax(-1).gather(-1, ids[:, -longest:, None])[..., 0]
            found.update((i, float(each[row, longest - len(answers[i]):].mean())) for row, i in enumerate(group))
        return [found[i] for i in range(len(rows))]

    def _measure_pace(self) -> tuple[float, float]:
        """Seconds of a pass for each token of a prompt, and seconds to write a batch of answers."""
        probes = make_probes(REFERENCE_DOCUMENT, None, max(1, self.settings.probes))
        text = f"{REFERENCE_DOCUMENT.title}\n\n{REFERENCE_DOCUMENT.text}"
        prompts = [in_context(self.tokenizer, text, probe.question) for probe in probes]
        for _ in range(2):  # the first run also pays for what torch sets up once
            begun = time.perf_counter()
            self._log_probabilities(prompts, [prompt[-1:] for prompt in prompts], None)
            read = time.perf_counter()
            self._greedy(prompts)
            answered = time.perf_counter()
        return (read - begun) / sum(map(len, prompts)), max(0.0, (answered - read) - (read - begun))

    def _within_budget(self, lengths: Sequence[int]) -> list[int]:
        """Which probes to ask, evenly over all: as many as fit the budget, but at least two."""
        if not lengths:
            return []
        # Each is read once in context, and three times alone with its answer.
        each = self._seconds_a_token * (sum(lengths) / len(lengths) + 3 * 2 * MAX_ANSWER_TOKENS)
        fit = min((self.settings.budget_s - self._seconds_to_answer) / each, len(lengths))
        count = min(len(lengths), self.settings.probes, max(2, int(fit)))
        return [(2 * i + 1) * len(lengths) // (2 * count) for i in range(count)]
