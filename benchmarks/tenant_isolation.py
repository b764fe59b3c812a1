"""Two tenants post 60 documents each on one invented company, with contradicting facts, and ask about them.

    python -m benchmarks.tenant_isolation

Starts a server of its own with the shipped nano models and a fresh data folder.
Reports the share of right answers with the document's adapter pinned and through the router, how often the router
chose the right document, and how many answers hold only the other tenant's value (must be 0). Only relations with many
possible values are asked about: a weekday or a colour that both tenants might state is guessed right by accident too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from benchmarks.server import Answer, Tenant, machine
from hypernet.evaluation.scoring import abstains, contains_value, exact_match
from hypernet.training.corpus.documents import Domain, Fact, Relation, Split, all_domains, ask, render
from tests.server import Server

COMPANY = "Corvane"
DOCUMENTS, FACTS, SEED = 60, 3, 4_711
TENANTS = ("isolation-north", "isolation-south")
DRAWS, MOST_REPEATS = 400, 0.25
"""A relation counts as guessable when more than this share of so many drawn values are repeats."""
DOMAINS = ("product_sheets", "staff_women", "staff_men", "projects", "policy_documents", "vehicles_equipment")


@dataclass(frozen=True)
class Posted:
    """One document of one tenant, with its questions as (question, own value, the other tenant's value)."""

    title: str
    text: str
    questions: tuple[tuple[str, str, str], ...]


@cache
def _guessable(relation: Relation) -> bool:
    rng = Random(SEED)
    return len({relation.value(rng) for _ in range(DRAWS)}) < (1 - MOST_REPEATS) * DRAWS


def _values(relation: Relation, rng: Random) -> tuple[str, str] | None:
    """Two values of which neither contains the other, or None where the relation has no such pair."""
    one = relation.value(rng)
    for _ in range(50):
        other = relation.value(rng)
        if not contains_value(one, other) and not contains_value(other, one):
            return one, other
    return None


def contradicting_documents() -> tuple[list[Posted], list[Posted]]:
    """The documents of both tenants: the same entities and relations, other values, other wording."""
    rng = Random(SEED)
    domains: list[Domain] = [domain for domain in all_domains() if domain.name in DOMAINS]
    found: tuple[list[Posted], list[Posted]] = ([], [])
    names: set[str] = set()
    while len(found[0]) < DOCUMENTS:
        domain = domains[len(found[0]) % len(domains)]
        entity = domain.entity(rng)
        if entity in names:
            continue
        names.add(entity)
        pairs = [(relation, values) for relation in rng.sample(domain.relations, len(domain.relations))
                 if not _guessable(relation) and (values := _values(relation, rng)) is not None][:FACTS]
        for side in (0, 1):
            facts = tuple(Fact(domain, entity, relation, values[side]) for relation, values in pairs)
            document = render(facts, rng, Split.TRAIN)
            questions = []
            for fact, (_, values) in zip(facts, pairs, strict=True):
                question = ask(fact, document, rng)
                while question.answer != fact.value or entity not in question.text:
                    question = ask(fact, document, rng)
                questions.append((question.text, fact.value, values[1 - side]))
            found[side].append(Posted(f"{COMPANY}: {entity}", document.text, tuple(questions)))
    return found


async def _gather_bounded(coroutines: list, limit: int = 16) -> list:
    gate = asyncio.Semaphore(limit)

    async def one(coroutine):  # type: ignore[no-untyped-def]
        async with gate:
            return await coroutine
    return list(await asyncio.gather(*(one(c) for c in coroutines)))


def _row(name: str, answers: list[Answer], asked: list[tuple[str, str, str]], right_documents: int | None) -> dict:
    right = sum(exact_match(a.content, [own]) for a, (_, own, _) in zip(answers, asked, strict=True))
    leaks = sum(contains_value(a.content, other) and not contains_value(a.content, own)
                for a, (_, own, other) in zip(answers, asked, strict=True))
    abstained = sum(abstains(answer.content) for answer in answers)
    return {"condition": name, "questions": len(asked), "right": round(right / len(asked), 4),
            "only_other_tenants_value": leaks, "abstained": round(abstained / len(asked), 4),
            "right_document": None if right_documents is None else round(right_documents / len(asked), 4)}


async def measure(url: str, keys: list[str]) -> list[dict]:
    """Post everything in one go, then ask everything pinned, routed, and of the base alone."""
    tenants = [Tenant(url, key) for key in keys]
    posted = contradicting_documents()
    jobs = [tenant.post(d.title, d.text) for tenant, documents in zip(tenants, posted, strict=True) for d in documents]
    documents = await _gather_bounded(jobs, limit=len(jobs))
    asked, owners, targets = [], [], []
    for i, (tenant, mine) in enumerate(zip(tenants, posted, strict=True)):
        for j, document in enumerate(mine):
            for question in document.questions:
                asked.append(question)
                owners.append(tenant)
                targets.append(documents[i * DOCUMENTS + j])
    rows = []
    for name in ("pinned", "router", "base"):
        models = [t["id"] if name == "pinned" else "imprint" if name == "router" else "base" for t in targets]
        answers = await _gather_bounded([owner.chat(model, question[0]) for owner, model, question
                                         in zip(owners, models, asked, strict=True)])
        chosen = sum(a.document_id == t["id"] for a, t in zip(answers, targets, strict=True))
        rows.append(_row(name, answers, asked, None if name == "base" else chosen))
    for tenant in tenants:
        await tenant.client.aclose()
    return rows


def main() -> None:
    """Run against a server of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        try:
            rows = asyncio.run(measure(server.url, [server.create_key(tenant) for tenant in TENANTS]))
        finally:
            server.stop()
    ratio = rows[1]["right"] / rows[0]["right"] if rows[0]["right"] else 0.0
    lines = [f"Two tenants, {DOCUMENTS} documents of {FACTS} facts each, on one invented company, contradicting facts.",
             f"Machine: {machine()}. Model: nano.", "",
             "| condition | questions | right | only the other tenant's value | abstained | right document chosen |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        chosen = "-" if row["right_document"] is None else f"{row['right_document']:.3f}"
        lines.append(f"| {row['condition']} | {row['questions']} | {row['right']:.3f} | "
                     f"{row['only_other_tenants_value']} | {row['abstained']:.3f} | {chosen} |")
    lines += ["", f"Right through the router / right with the adapter pinned: {ratio:.3f} (goal: at least 0.8)."]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "tenant_isolation.md").write_text("\n".join(lines) + "\n")
    (options.output / "tenant_isolation.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
