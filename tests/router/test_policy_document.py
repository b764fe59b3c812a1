"""Policy documents: what is read, and where what is wrong stands, however it was written."""

from __future__ import annotations

import json
import time

import pytest

from router.policy import InvalidPolicy, compile_policy
from router.policy.document import MAX_RULES, MAX_TOTAL_NODES
from router.policy.source import MAX_CHARACTERS

CONDITION = 'request.headers["x-role"] == "staff" and candidate.scor > 1'


def failure(text: str) -> InvalidPolicy:
    with pytest.raises(InvalidPolicy) as caught:
        compile_policy(text)
    return caught.value


def test_rules_are_read_in_order() -> None:
    policy = compile_policy(
        """
version: 1
rules:
  - {name: a, when: candidate.score < 0.2, forbid: true}
  - {name: b, use: handbook}
  - {name: c, when: 'length(request.text) < 3', fall_back: base}
  - {name: d, prefer: -0.25}
  - {name: e, cap: 2}
  - {name: f, require_confidence: 0.9}
  - {name: g, use: handbook}
"""
    )
    assert [(rule.name, rule.action, rule.value) for rule in policy.rules] == [
        ("a", "forbid", True), ("b", "use", "handbook"), ("c", "fall_back", "base"), ("d", "prefer", -0.25),
        ("e", "cap", 2), ("f", "require_confidence", 0.9), ("g", "use", "handbook"),
    ]  # fmt: skip
    assert [rule.when.uses_candidate for rule in policy.rules[:4]] == [True, False, False, False]
    assert policy.targets == ("handbook",)
    assert compile_policy('{"version": 1,\t"rules": []}').rules == ()


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (f"    when: {CONDITION}\n", 4),
        (f"    when: '{CONDITION}'\n", 4),
        ("    when: " + json.dumps(CONDITION) + "\n", 4),
        (f"    when: |\n        {CONDITION}\n", 5),
        (f"    when: |2-\n      {CONDITION}\n", 5),
        (f"    when: >-\n\n      {CONDITION}\n", 6),
        (f"    when:\n      {CONDITION.replace('and ', 'and' + chr(10) + '      ')}\n", 6),
        (f"    when: >\n      {CONDITION.replace('and ', 'and' + chr(10) + '        ')}\n", 6),
        (f"    when: |\n      {CONDITION.replace('and ', '# why' + chr(10) + '      and ')}\n", 6),
        ("    'when': " + json.dumps(CONDITION.replace(" and", "\tand")) + "\n", 4),
        ("    when: " + json.dumps(CONDITION.replace("staff", "stäff")) + "\n", 4),
        ("    when: '" + CONDITION.replace('"', "''") + "'\n", 4),
    ],
)
def test_errors_of_conditions_point_into_the_document(rule: str, line: int) -> None:
    text = f"version: 1\nrules:\n  - name: a\n{rule}    forbid: true\n"
    if "# why" in rule:
        text = text.replace("    when: |\n      request", "    when: |\n      (request").replace("> 1\n", "> 1)\n")
    error = failure(text)
    assert (error.path, error.rule, error.line) == ("rules.0.when", "a", line)
    assert text.split("\n")[line - 1][error.column - 1 :].startswith("candidate.scor"), error.column


def test_errors_in_json_point_into_the_text() -> None:
    document = {"version": 1, "rules": [{"name": "ä", "when": CONDITION, "forbid": True}]}
    for text in (json.dumps(document), json.dumps(document, indent=2), json.dumps(document, indent="\t")):
        error = failure(text)
        assert text.split("\n")[error.line - 1][error.column - 1 :].startswith("candidate.scor")


@pytest.mark.parametrize(
    ("text", "path", "line", "column", "says"),
    [
        ("", "", 1, 1, "empty"),
        ("[]", "", 1, 1, "mapping"),
        ("rules: []", "version", 1, 1, "missing"),
        ("version: 1", "rules", 1, 1, "missing"),
        ("version: true\nrules: []", "version", 1, 10, "integer"),
        ("version: 1\nrules: {}", "rules", 2, 1, "list"),
        ("version: 1\nrules: []\nrule: []", "rule", 3, 1, "no field"),
        ("version: 1\nversion: 1\nrules: []", "version", 2, 1, "twice"),
        ('{"version": 1, "version": 1, "rules": []}', "", 1, 1, "twice"),
        ("version: 1\nrules:\n  - 3", "rules.0", 3, 5, "mapping"),
        ("version: 1\nrules:\n  - name: a", "rules.0", 3, 5, "has none"),
        ("version: 1\nrules:\n  - name: a\n    cap: 1\n    use: b", "rules.0", 3, 5, "has use, cap"),
        ("version: 1\nrules:\n  - cap: 1", "rules.0.name", 3, 5, "missing"),
        ("version: 1\nrules:\n  - {name: '', cap: 1}", "rules.0.name", 3, 12, "at least 1 character"),
        ("version: 1\nrules:\n  - {name: 7, cap: 1}", "rules.0.name", 3, 12, "string"),
        ("version: 1\nrules:\n  - {name: a, cap: 1.5}", "rules.0.cap", 3, 20, "integer"),
        ("version: 1\nrules:\n  - {name: a, prefer: .nan}", "rules.0.prefer", 3, 23, "finite"),
        ("version: 1\nrules:\n  - {name: a, prefer: 2}", "rules.0.prefer", 3, 23, "less than or equal"),
        ("version: 1\nrules:\n  - {name: a, require_confidence: yes}", "rules.0.require_confidence", 3, 35, "number"),
        ("version: 1\nrules:\n  - {name: a, fall_back: adapter}", "rules.0.fall_back", 3, 26, "'base'"),
        ("version: 1\nrules:\n  - {name: a, cap: 1}\n  - {name: a, cap: 1}", "rules.1.name", 4, 12, "another rule"),
        ("version: 1\nrules: &all\n  - *all", "", 3, 5, "aliases"),
        ("version: 1\nrules: !!python/object:os.system x", "", 2, 8, "tags"),
        ("a: b: c", "", 1, 5, "not YAML"),
        ("version: 1\nrules: [\x01]", "", 2, 9, "not allowed"),
        ("version: 1\n--- \nrules: []", "", 2, 1, "not YAML"),
        ("[" * 100, "", 1, 9, "deep"),
        ('version: 1\nrules:\n  - {name: "a\\ud800", cap: 1}', "", 1, 1, "surrogate"),
        ('{"version": 1, "\\ud800": 1, "\\ud800": 2}', "", 1, 1, "'?' is there twice"),
        ('version: 1\nrules:\n  - {name: a, use: "b\\0"}', "rules.0.use", 3, 20, "pattern"),
        ("x" * (MAX_CHARACTERS + 1), "", 1, 1, "characters"),
    ],
)
def test_errors_name_field_and_place(text: str, path: str, line: int, column: int, says: str) -> None:
    error = failure(text)
    assert says in error.message, error
    assert (error.path, error.line, error.column) == (path, line, column), error
    assert f"(line {line}, column {column})" in str(error)


def test_bounds_on_rules() -> None:
    rule = "\n  - {{name: r{}, when: '{}', cap: 1}}"
    many = "version: 1\nrules:" + "".join(rule.format(i, "True") for i in range(MAX_RULES + 1))
    assert f"at most {MAX_RULES}" in failure(many).message
    large = " or ".join(["candidate.score > 1"] * 30)
    count = MAX_TOTAL_NODES // 91 + 1
    error = failure("version: 1\nrules:" + "".join(rule.format(i, large) for i in range(count)))
    assert error.path == f"rules.{count - 1}.when" and f"{MAX_TOTAL_NODES} are allowed" in error.message


def test_the_largest_text_is_read_in_a_moment() -> None:
    started = time.process_time()
    for text in ("- " * 4 + "a\n" * (MAX_CHARACTERS // 3), "{" + '"a":1,' * 9000 + '"b":1}', "'" + "\\" * 65_000):
        failure(text)
    assert time.process_time() - started < 10
