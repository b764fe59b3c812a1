"""`imprint eval`: scores what the running server answers, adapter by adapter, through its own API.

Every case's document is posted by one tenant; its questions are then asked under six conditions. Nothing is computed
in torch: prompts go through the HTTP API to vLLM with the exported PEFT files.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
from rich.progress import Progress
from transformers import AutoTokenizer

from hypernet.evaluation.cases import FACT_COUNTS, Case, CaseQuestion, hand_written_cases, held_out_cases
from hypernet.evaluation.scoring import abstains, exact_match
from hypernet.training.corpus.documents import Split

CONDITIONS = ("base", "in_context", "adapter", "wrong_adapter", "in_context_wrong_adapter", "own_question_other_prompt")
"""Base alone; document in the prompt; adapter, closed book; another document's adapter, closed book; document in the
prompt with another document's adapter on; another document in the prompt with a question on the adapter's own."""
CONCURRENCY = 24
MAX_ANSWER_TOKENS = 40


@dataclass
class Asked:
    """One question under one condition, and what came back."""

    condition: str
    facts: int
    question: CaseQuestion
    answer: str


@dataclass
class SetResult:
    """The answers on one set of cases, and what could not be asked."""

    name: str
    cases: list[Case]
    asked: list[Asked] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


class Server:
    """The running server as the evaluation's tenant sees it."""

    def __init__(self, url: str, key: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=300)

    async def post(self, case: Case) -> str | None:
        """The ID of the document once its adapters are made; None where they could not be.

        Pinned by ID, a document that failed the quality gate answers too, so it counts like any other.
        """
        body = {"title": case.title, "text": case.text}
        response = await self._client.post("/v1/documents", params={"wait": 60}, json=body)
        response.raise_for_status()
        document = response.json()
        for _ in range(120):
            if document["status"] != "processing":
                break
            await asyncio.sleep(0.5)
            document = (await self._client.get(f"/v1/documents/{document['id']}")).raise_for_status().json()
        return str(document["id"]) if document["status"] in ("ready", "degraded") else None

    async def ask(self, model: str, content: str) -> str | None:
        """The greedy answer; None where the prompt is longer than the model takes."""
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0,
                "max_tokens": MAX_ANSWER_TOKENS}
        response = await self._client.post("/v1/chat/completions", json=body)
        if response.status_code == httpx.codes.BAD_REQUEST:
            return None
        return str(response.raise_for_status().json()["choices"][0]["message"]["content"] or "").strip()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _prompt(case: Case, question: str) -> str:
    return "\n\n".join(part for part in (case.title, case.text, question) if part)


async def _bounded(tasks: Sequence[Callable[[], Awaitable[None]]], step: Callable[[], None]) -> None:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(task: Callable[[], Awaitable[None]]) -> None:
        async with gate:
            await task()
            step()
    await asyncio.gather(*(one(task) for task in tasks))


async def evaluate_set(server: Server, result: SetResult, progress: Progress) -> None:
    """Post the cases, then ask every question under every condition."""
    documents: list[str | None] = [None] * len(result.cases)
    bar = progress.add_task(f"{result.name}: documents", total=len(result.cases))

    async def post(i: int) -> None:
        documents[i] = await server.post(result.cases[i])
        if documents[i] is None:
            result.dropped["document without adapter"] += 1
    await _bounded([lambda i=i: post(i) for i in range(len(result.cases))],  # type: ignore[misc]
                   lambda: progress.advance(bar))
    ready = [(case, document) for case, document in zip(result.cases, documents, strict=True) if document]
    plans: list[tuple[str, Case, CaseQuestion, str, str]] = []
    for i, (case, document) in enumerate(ready):
        other, other_document = ready[(i + 1) % len(ready)]
        for question in case.questions:
            closed, opened = question.text, _prompt(case, question.text)
            plans += [("base", case, question, "base", closed), ("in_context", case, question, "base", opened),
                      ("adapter", case, question, document, closed),
                      ("wrong_adapter", case, question, other_document, closed),
                      ("in_context_wrong_adapter", case, question, other_document, opened),
                      ("own_question_other_prompt", case, question, document, _prompt(other, question.text))]
    bar = progress.add_task(f"{result.name}: questions", total=len(plans))

    async def put(condition: str, case: Case, question: CaseQuestion, model: str, content: str) -> None:
        answer = await server.ask(model, content)
        if answer is None:
            result.dropped[f"{condition}: prompt too long"] += 1
        else:
            result.asked.append(Asked(condition, case.facts, question, answer))
    await _bounded([lambda plan=plan: put(*plan) for plan in plans],  # type: ignore[misc]
                   lambda: progress.advance(bar))


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None


def summarise(result: SetResult) -> dict:
    """Exact match by condition, what unanswerable questions got, chance rate, answer lengths, what was dropped."""
    answerable = [one for one in result.asked if one.question.answerable]
    absent = [one for one in result.asked if not one.question.answerable]
    chance = [statistics.fmean(exact_match(value, q.answers) for value in case.values)
              for case in result.cases for q in case.questions if q.answerable]
    return {
        "set": result.name, "documents": len(result.cases),
        "questions": len(answerable) // len(CONDITIONS), "unanswerable": len(absent) // len(CONDITIONS),
        "exact_match": {c: _share([exact_match(one.answer, one.question.answers) for one in answerable
                                   if one.condition == c]) for c in CONDITIONS},
        "abstained_on_unanswerable": {c: _share([abstains(one.answer) for one in absent if one.condition == c])
                                      for c in CONDITIONS},
        "abstained_on_answerable": {c: _share([abstains(one.answer) for one in answerable if one.condition == c])
                                    for c in CONDITIONS},
        "chance": round(statistics.fmean(chance), 4) if chance else None,
        "answer_words": {c: dict(sorted(Counter(min(len(one.answer.split()), 12) for one in answerable
                                                if one.condition == c).items())) for c in CONDITIONS},
        "dropped": dict(result.dropped),
    }


def answer_length_table(results: Sequence[SetResult]) -> dict[str, dict[str, float | int | None]]:
    """Exact match of the adapter by the length of the right answer in tokens, over all sets."""
    from hypernet.nano import base_dir

    tokenizer = AutoTokenizer.from_pretrained(base_dir())
    groups: dict[int, list[bool]] = {}
    for one in (one for result in results for one in result.asked if one.condition == "adapter"):
        if one.question.answerable:
            length = min(len(tokenizer.encode(one.question.answers[0], add_special_tokens=False)), 12)
            groups.setdefault(length, []).append(exact_match(one.answer, one.question.answers))
    return {str(length): {"questions": len(hits), "exact_match": _share(hits)}
            for length, hits in sorted(groups.items())}


def _table(rows: list[dict]) -> str:
    names = {"base": "base alone", "in_context": "in context", "adapter": "adapter", "wrong_adapter": "wrong adapter",
             "in_context_wrong_adapter": "in context, wrong adapter on",
             "own_question_other_prompt": "adapter, other document in prompt"}
    head = "| set | questions | " + " | ".join(names.values()) + " | chance |"
    lines = [head, "|" + "---|" * (len(names) + 3)]
    for row in rows:
        cells = ["-" if row["exact_match"][c] is None else f"{row['exact_match'][c]:.3f}" for c in names]
        lines.append(f"| {row['set']} | {row['questions']} | " + " | ".join(cells) + f" | {row['chance']:.3f} |")
    lines += ["", "Unanswerable questions that got an abstention / answerable ones that wrongly did:", "",
              "| set | in context | adapter |", "|---|---|---|"]
    for row in rows:
        right, wrong = row["abstained_on_unanswerable"], row["abstained_on_answerable"]
        cell = [f"{right[c] if right[c] is not None else '-'} / {wrong[c]}" for c in ("in_context", "adapter")]
        lines.append(f"| {row['set']} | " + " | ".join(cell) + " |")
    return "\n".join(lines) + "\n"


async def _evaluate(url: str, key: str, sets: list[SetResult]) -> None:
    server = Server(url, key)
    try:
        with Progress() as progress:
            for result in sets:
                await evaluate_set(server, result, progress)
    finally:
        await server.close()


def run_evaluation(url: str, key: str, output: Path, documents: int = 60, hand_written: Path | None = None) -> str:
    """Evaluate and write `nano_eval.json`, `nano_eval.md` and every answer (`nano_eval_answers.jsonl`) into `output`.

    `key` is a tenant's key. Returns the Markdown table. Raises httpx.HTTPError where the server refuses.
    """
    sets = []
    for facts in FACT_COUNTS:
        sets.append(SetResult(f"held-out, {facts} facts", held_out_cases(documents, facts, Split.HELD_OUT)))
    for facts in FACT_COUNTS:
        sets.append(SetResult(f"unseen phrasing, {facts} facts",
                              held_out_cases(documents // 2, facts, Split.UNSEEN_PHRASING)))
    if hand_written is not None:
        sets.append(SetResult("hand-written", hand_written_cases(hand_written)))
    asyncio.run(_evaluate(url, key, sets))
    rows = [summarise(result) for result in sets]
    report = {"machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores", "sets": rows,
              "by_answer_tokens": answer_length_table(sets)}
    output.mkdir(parents=True, exist_ok=True)
    (output / "nano_eval.json").write_text(json.dumps(report, indent=1) + "\n")
    table = _table(rows)
    (output / "nano_eval.md").write_text(table)
    with (output / "nano_eval_answers.jsonl").open("w") as file:
        for result in sets:
            for one in result.asked:
                file.write(json.dumps({"set": result.name, **asdict(one)}) + "\n")
    return table
