"""`imprint route` prints what the server decided."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from serve.cli import app, client, route
from serve.cli.client import Client

CANDIDATE = {"adapter_id": "adp_1", "document_id": "doc_1", "title": "Pool \x1b[31mrules", "score": 0.71,
             "similarity": 0.7, "word_share": 0.72, "rank": 0.7, "part": 1, "parts": 3, "state": "ready",
             "margin": 0.2, "confidence": 0.913, "threshold": 0.5}  # fmt: skip
EXPLAIN = {
    "candidates": [CANDIDATE, {**CANDIDATE, "adapter_id": "adp_2", "document_id": "doc_2", "title": "Sauna [rules]",
                               "confidence": None, "margin": None, "parts": 1}],
    "calibration": {"version": 3, "method": "isotonic"},
    "policy": [{"rule": "no-drafts", "effect": "forbids doc_9"}],
    "residency": [{"adapter_id": "adp_1", "replicas": 2, "slot": 1, "cpu": 0, "disk": 1},
                  {"adapter_id": "adp_2", "replicas": 1, "slot": 0, "cpu": 0, "disk": 0}],
    "timings": {"embed_s": 0.0071, "total_s": 0.0092},
}  # fmt: skip
DECISION: dict[str, Any] = {
    "adapter_id": "adp_1", "document_id": "doc_1", "reason": "matched", "score": 0.71, "confidence": 0.913,
    "threshold": 0.5, "adapters": [{"adapter_id": "adp_1", "document_id": "doc_1"}], "explain": None,
}  # fmt: skip


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The requests that the command makes; it is answered with DECISION."""
    import json

    found: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        found.append({"path": request.url.path, **json.loads(request.content)})
        return httpx.Response(200, json={**DECISION, "explain": EXPLAIN if found[-1]["explain"] else None})

    monkeypatch.setattr(
        client, "Client", lambda url, key, tenant: Client(url, key, tenant, httpx.MockTransport(answer))
    )
    return found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["route", *arguments], env={"IMPRINT_KEY": "imp_x"})


def test_one_line_says_who_answers(sent: list[dict[str, Any]]) -> None:
    result = run("When", "does", "it", "open?", "--collection", "wiki", "--compose", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout == "doc_1: matched, confidence 0.913, needed 0.500\n"
    assert sent == [{
        "path": "/v1/route", "model": "imprint", "messages": [{"role": "user", "content": "When does it open?"}],
        "compose": 2, "explain": False, "collection": "wiki",
    }]  # fmt: skip


def test_explain_prints_a_table(sent: list[dict[str, Any]]) -> None:
    result = run("When?", "--explain")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    row = next(line for line in lines if "Pool" in line)
    assert "(part 2 of 3)" in row and "\x1b" not in result.stdout
    for text in ("0.710", "0.700", "0.720", "0.200", "0.913", "0.500", "ready", "slot (1 of 2)"):
        assert text in row, row
    other = next(line for line in lines if "Sauna [rules]" in line)
    assert "store" in other and "-" in other and any("doc_2" in line for line in lines)
    assert any("no-drafts" in line and "forbids doc_9" in line for line in lines)
    assert "calibration: version 3, isotonic" in lines and "time: embed 7.1 ms, total 9.2 ms" in lines


def test_json_and_failures(sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert '"reason": "matched"' in run("When?", "--json").stdout
    refuse = httpx.MockTransport(lambda _: httpx.Response(404, json={"error": {"message": "No such model."}}))
    monkeypatch.setattr(client, "Client", lambda url, key, tenant: Client(url, key, tenant, refuse))
    result = run("When?")
    assert result.exit_code == 1 and "No such model." in result.stderr


def test_the_base_is_named() -> None:
    line = route.summary({**DECISION, "adapter_id": None, "reason": "below_threshold", "confidence": None})
    assert line == "the base model: below_threshold, score 0.710, needed 0.500"
