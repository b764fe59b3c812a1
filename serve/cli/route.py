"""`imprint route`: who would answer a question, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.cli.client import connected
from serve.cli.options import DEFAULT_URL, JsonOption, KeyOption, TenantOption, UrlOption
from serve.cli.output import print_json, printable

_WIDTH = 120
"""Columns of a table that does not go to a terminal."""
_TITLE = 40


def route(
    message: Annotated[list[str], typer.Argument(metavar="MESSAGE", help="The question to route.")],
    explain: Annotated[bool, typer.Option("--explain", help="Show all candidates and what led to the choice.")] = False,
    model: Annotated[str, typer.Option(help="imprint, or the ID or alias of a document or collection.")] = "imprint",
    collection: Annotated[str, typer.Option(help="Let the router choose in this collection only.")] = "",
    compose: Annotated[int, typer.Option(min=1, help="Up to so many documents may answer together.")] = 1,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say which adapter would answer (`imprint route How heavy is …? --explain`), without asking the model."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": " ".join(message)}],
        "compose": compose,
        "explain": explain,
    }
    if collection:
        body["collection"] = collection
    with connected(url, key, tenant) as client:
        decision = client.call("POST", "/v1/route", json=body)
    if as_json:
        print_json(decision)
        return
    console = Console(soft_wrap=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(Text(summary(decision)))
    found = decision.get("explain")
    if found:
        _explain(console, found)


def summary(decision: Mapping[str, Any]) -> str:
    """One line: who answers, why, and by how much."""
    who = "the base model"
    if decision.get("adapter_id"):
        names = [one["document_id"] or one["adapter_id"] for one in decision.get("adapters") or ()]
        who = " + ".join(names) or decision.get("document_id") or decision["adapter_id"]
    parts = [f"{printable(str(who))}: {decision['reason']}"]
    value = decision.get("confidence") if decision.get("confidence") is not None else decision.get("score")
    if value is not None:
        name = "score" if decision.get("confidence") is None else "confidence"
        parts.append(f"{name} {_number(value)}, needed {_number(decision.get('threshold'))}")
    return ", ".join(parts)


def candidate_table(found: Mapping[str, Any]) -> Table:
    """The candidates of an explanation, best first."""
    table = Table(title="Candidates", title_justify="left")
    table.add_column("document", overflow="fold")
    for name in ("score", "cosine", "words", "margin", "confidence", "needed"):
        table.add_column(name, justify="right")
    for name in ("state", "where"):
        table.add_column(name)
    places = {one["adapter_id"]: one for one in found.get("residency") or ()}
    for one in found.get("candidates") or ():
        title = printable(one["title"])
        title = title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…"
        part = f" (part {one['part'] + 1} of {one['parts']})" if one["parts"] > 1 else ""
        numbers = (one["score"], one["similarity"], one["word_share"], one["margin"], one["confidence"],
                   one["threshold"])
        table.add_row(
            Text(f"{title}{part}\n{one['document_id']}"),
            *(_number(value) for value in numbers),
            one["state"],
            _place(places.get(one["adapter_id"])),
        )
    return table


def _explain(console: Console, found: Mapping[str, Any]) -> None:
    if found.get("candidates"):
        console.print(candidate_table(found))
    if found.get("policy"):
        table = Table(title="Policy", title_justify="left")
        names = list(dict.fromkeys(name for step in found["policy"] for name in step))
        for name in names:
            table.add_column(name, overflow="fold")
        for step in found["policy"]:
            table.add_row(*(Text(printable(str(step.get(name, "")))) for name in names))
        console.print(table)
    calibration = found.get("calibration")
    if calibration:
        which = "shipped" if calibration["version"] == 0 else f"version {calibration['version']}"
        console.print(Text(f"calibration: {which}, {calibration['method']}"))
    elif found.get("candidates"):
        console.print(Text("calibration: none, so the score itself is compared"))
    if found.get("timings"):
        times = ", ".join(f"{name.removesuffix('_s')} {1000 * s:.1f} ms" for name, s in found["timings"].items())
        console.print(Text(f"time: {times}"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _place(found: Mapping[str, Any] | None) -> str:
    """Where an adapter is, the fastest place first, and on how many of the engine's replicas."""
    if found is None:
        return "-"
    for tier in ("slot", "cpu", "disk"):
        if found[tier]:
            return tier if found["replicas"] == 1 else f"{tier} ({found[tier]} of {found['replicas']})"
    return "store"
