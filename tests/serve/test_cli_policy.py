"""`imprint policy` over real HTTP against the API with a scripted router."""

from __future__ import annotations

import json
from pathlib import Path

from tests.serve.test_cli import Running, _no_settings, server  # noqa: F401

# ruff: noqa: F811

FIRST = "version: 1\nrules:\n  - {name: drafts, when: candidate.score < 0.5, forbid: true}\n"
SECOND = FIRST.replace("0.5", "0.6")


def test_a_policy_is_set_shown_and_rolled_back(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(FIRST)
    assert "no routing policy" in server.run("policy", "show").stderr
    result = server.run("policy", "set", str(file))
    assert (result.exit_code, result.stdout) == (0, "1\n"), result.stderr
    assert server.run("policy", "set", "-", "--expected-version", "1", text=SECOND).stdout == "2\n"
    result = server.run("policy", "set", str(file), "--expected-version", "1")
    assert result.exit_code == 1 and "at version 2 by now" in result.stderr
    result = server.run("policy", "show")
    assert result.stdout == SECOND and "version 2" in result.stderr
    assert server.run("policy", "show", "--version", "1").stdout == FIRST
    assert server.run("policy", "rollback").stdout == "3\n"
    assert json.loads(server.run("policy", "show", "--json").stdout)["restored_from"] == 1
    lines = server.run("policy", "history").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["VERSION", "3", "2", "1"]
    assert server.run("policy", "rollback", "--version", "2").stdout == "4\n"
    assert "no version 9" in server.run("policy", "rollback", "--version", "9").stderr


def test_mistakes_say_where(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(FIRST.replace("candidate", "candidat"))
    for command in ("set", "check"):
        result = server.run("policy", command, str(file))
        assert result.exit_code == 1 and "rules.0.when of rule 'drafts' (line 3, column 26)" in result.stderr
    result = server.run("policy", "set", str(tmp_path / "absent.yaml"))
    assert result.exit_code == 2 and "cannot be read" in result.stderr
    file.write_bytes(b"\xff")
    assert server.run("policy", "check", str(file)).exit_code == 2


def test_a_check_shows_what_would_change(server: Running) -> None:
    answer = {"adapter_id": "adp_1", "document_id": "doc_1", "reason": "matched", "confidence": 0.9}
    base = {"adapter_id": None, "document_id": None, "reason": "policy_forbids", "confidence": None}
    change = {"response_id": "req_1", "created_at": 5.0, "text": "How\x1b[31m heavy? " + "x" * 100,
              "steps": [{"rule": "drafts"}], "before": answer, "after": base}  # fmt: skip
    server.api.router.dry_run = {"compared": 12, "changes": [change]}
    text = FIRST + "  - {name: b, use: handbook}\n"
    result = server.run("policy", "check", "-", "--limit", "50", text=text)
    assert result.exit_code == 0, result.stderr
    assert "2 rules; 1 of 12 recent requests would change" in result.stderr
    assert "warning: There is no document 'handbook'" in result.stderr
    row = result.stdout.splitlines()[1]
    assert "doc_1 (matched)" in row and "base (policy_forbids)" in row and "drafts" in row and "\x1b" not in row
    assert server.api.router.calls[-1]["limit"] == 50
    assert json.loads(server.run("policy", "check", "-", "--json", text=text).stdout)["changed"] == 1
