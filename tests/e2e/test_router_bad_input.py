"""What nobody should send to be routed: a clear error, or the base with a reason; never another tenant's document."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Tenant

pytestmark = pytest.mark.e2e

TITLE = "Norvia Corvo data sheet"
TEXT = "The Norvia Corvo weighs 3 kg. It costs 40 euros."
QUESTION = "How heavy is the Norvia Corvo?"
PATHS = ROUTE, CHAT = "/v1/route", "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
JSON = {"Content-Type": "application/json"}
YAML = {"Content-Type": "application/yaml"}
LONG = "word " * 100_000


def user(content: Any) -> dict[str, Any]:
    """A body with one user message."""
    return {"messages": [{"role": "user", "content": content}]}


def ask(tenant: Tenant, path: str, body: dict[str, Any]) -> httpx.Response:
    """Ask for a decision, or for a short answer."""
    brief = {"max_tokens": 2} if path == CHAT else {}
    return tenant.http.post(path, json={"model": "imprint", **brief, **body})


def refused(response: httpx.Response, status: int, param: str, code: str, says: str = "") -> None:
    """Check status, OpenAI's form, the field that is named, and what is said of it."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] and error["message"] and says in error["message"], error


def left_to_base(response: httpx.Response, reason: str) -> dict[str, Any]:
    """Check that the base answers, or would; the decision."""
    assert response.status_code == 200, response.text
    answer = response.json()
    decision: dict[str, Any] = answer.get("imprint", answer)
    assert (decision["adapter_id"], decision["document_id"], decision["reason"]) == (None, None, reason)
    if "imprint" in answer:
        assert response.headers["x-imprint-adapter"] == "base" and response.headers["x-imprint-reason"] == reason
        assert answer["choices"][0]["message"]["role"] == "assistant"
    return decision


@pytest.fixture
def theirs(other_tenant: Tenant) -> dict[str, Any]:
    """Somebody else's document that answers the question, in a collection of theirs."""
    return other_tenant.post(TITLE, TEXT, external_id="theirs", collection="theirs")


def test_nothing_to_compare_goes_to_the_base(tenant: Tenant) -> None:
    tenant.post(TITLE, TEXT)
    for body in (
        user(""),
        user(" \n\t"),
        user([]),
        user([{"type": "text", "text": " "}]),
        {"messages": [{"role": "system", "content": QUESTION}]},
        {"messages": [{"role": "assistant", "content": QUESTION}]},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": QUESTION}]},
    ):
        for path in PATHS:
            assert left_to_base(ask(tenant, path, body), "empty_query")["score"] is None
    for text in ("\x00", "\u200b", "\U0001f600" * 500):
        for path in PATHS:
            left_to_base(ask(tenant, path, user(text)), "below_threshold")


def test_parts_that_are_no_text(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT)
    text = {"type": "text", "text": QUESTION}
    left_to_base(ask(tenant, ROUTE, user([IMAGE])), "empty_query")
    assert ask(tenant, ROUTE, user([IMAGE, text])).json()["adapter_id"] == document["adapter_id"]
    for content, place in (([IMAGE], 0), ([text, IMAGE], 1), ([text, {"type": "input_audio", "input_audio": {}}], 1)):
        says = "the base model reads text alone"
        refused(ask(tenant, CHAT, user(content)), 400, f"messages.0.content.{place}", "invalid_value", says)
    response = tenant.http.post(
        "/v1/responses",
        json={"model": "imprint", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
    )
    refused(response, 400, "input.0.content.0", "invalid_value", "input_image")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("part", "param", "code"),
    [
        ({"type": "nonsense", "text": QUESTION}, "messages.0.content.1.type", "invalid_value"),
        ({"type": "prompt_embeds", "data": "x"}, "messages.0.content.1.type", "invalid_value"),
        ({"text": QUESTION}, "messages.0.content.1.type", "missing_field"),
        ({"type": "text"}, "messages.0.content.1", "invalid_value"),
        ({"type": "text", "text": 5}, "messages.0.content.1.text", "invalid_value"),
        (QUESTION, "messages.0.content.1", "invalid_value"),
    ],
)
def test_broken_parts(tenant: Tenant, path: str, part: Any, param: str, code: str) -> None:
    refused(ask(tenant, path, user([{"type": "text", "text": "x"}, part])), 400, param, code)


def test_100000_tokens(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT)
    left_to_base(ask(tenant, ROUTE, user(LONG)), "below_threshold")
    # What stands at the end of a long message, as questions do, still counts.
    assert ask(tenant, ROUTE, user(f"{LONG}\n{QUESTION}")).json()["candidates"][0]["document_id"] == document["id"]
    left_to_base(ask(tenant, ROUTE, {"messages": user("and its?")["messages"] * 20_000}), "below_threshold")
    for fields in ({}, {"stream": True}, {"model": "base"}, {"model": document["id"]}):
        refused(ask(tenant, CHAT, {**user(LONG), **fields}), 400, "messages", "context_length_exceeded", "2048 tokens")
    # Too long for the model by a little, which only counting its tokens tells.
    refused(ask(tenant, CHAT, user("word " * 3000)), 400, "messages", "context_length_exceeded", "2048 tokens")
    for path, param in (("/v1/completions", "prompt"), ("/v1/responses", "input")):
        response = tenant.http.post(path, json={"model": "imprint", param: LONG})
        refused(response, 400, param, "context_length_exceeded", "2048 tokens")


@pytest.mark.parametrize("path", PATHS)
def test_collections_that_are_not_there(tenant: Tenant, path: str) -> None:
    for name in ("nowhere", "col_nowhere", "a\x00b"):
        response = ask(tenant, path, {**user(QUESTION), "collection": name})
        refused(response, 404, "collection", "collection_not_found", name)
    for value in ("", "x" * 201, 5):
        refused(ask(tenant, path, {**user(QUESTION), "collection": value}), 400, "collection", "invalid_value")


def test_what_others_have_is_not_there(tenant: Tenant, theirs: dict[str, Any]) -> None:
    for path in PATHS:
        decision = left_to_base(ask(tenant, path, {**user(QUESTION), "explain": True}), "no_candidates")
        assert decision["explain"]["candidates"] == [] and decision["explain"]["residency"] == []
        for name in (theirs["id"], theirs["adapter_id"], theirs["collection_id"], "theirs"):
            refused(ask(tenant, path, {**user(QUESTION), "model": name}), 404, "model", "model_not_found", name)
            response = ask(tenant, path, {**user(QUESTION), "adapters": [name]})
            refused(response, 404, "adapters.0", "model_not_found", name)
        for name in (theirs["collection_id"], "theirs"):
            response = ask(tenant, path, {**user(QUESTION), "collection": name})
            refused(response, 404, "collection", "collection_not_found", name)
    # A question that only their document answers, beside one of one's own.
    mine = tenant.post("Leave policy of Harrow Ltd", "Staff of Harrow Ltd get 28 days of annual leave.")
    for path in PATHS:
        decision = left_to_base(ask(tenant, path, {**user(QUESTION), "explain": True}), "below_threshold")
        assert {one["document_id"] for one in decision["explain"]["candidates"]} == {mine["id"]}


@pytest.mark.parametrize("path", PATHS)
def test_not_utf8(tenant: Tenant, path: str) -> None:
    for raw, param, code in (
        (b'{"model": "imprint", "messages": [{"role": "user", "content": "caf\xe9"}]}', "messages.0.content", ""),
        (b'{"model": "imprint", "messages": [{"role": "user", "content": "\\ud800"}]}', "messages.0.content", ""),
        (b'{"messages": [{"role": "user", "content": "x"}], "collection": "\xe9"}', "collection", ""),
        (b"\xff\xfe{\x00}\x00", "body", ""),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "body", "invalid_json"),
    ):
        refused(tenant.http.post(path, content=raw, headers=JSON), 400, param, code or "invalid_utf8")
    # Policies may look at such headers, so they must not be stumbled over.
    body = {"model": "imprint", "max_tokens": 2, **user(QUESTION)} if path == CHAT else user(QUESTION)
    headers: Any = {"X-Role": b"\xff\xfe"}
    left_to_base(tenant.http.post(path, json=body, headers=headers), "no_candidates")


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("9 ** 9 ** 9 > 1", "no arithmetic"),
        ("'a' * 10000000000 == 'a'", "no arithmetic"),
        (" and ".join(["True"] * 210), "names, literals and operators"),
        ("not " * 300 + "True", "deep"),
        ("True" + " and True" * 1000, "2000 characters"),
        ("[x for x in [1]] == [1]", ""),
    ],
)
def test_conditions_without_end_are_not_saved(tenant: Tenant, when: str, says: str) -> None:
    policy = f'version: 1\nrules:\n  - name: endless\n    when: "{when}"\n    forbid: true\n'
    for method, path in (("PUT", "/v1/policy"), ("POST", "/v1/policy/check")):
        response = tenant.http.request(method, path, content=policy, headers=YAML)
        refused(response, 400, "rules.0.when", "invalid_policy", says)
        assert "line 4" in response.json()["error"]["message"]
    assert tenant.http.get("/v1/policy").status_code == 404


def test_a_policy_that_costs_too_much_leaves_the_question_to_the_base(tenant: Tenant) -> None:
    for name in ("Corvo", "Merle"):
        tenant.post(f"Norvia {name} data sheet", f"The Norvia {name} weighs 3 kg.", metadata={"long": "w" * 1024})
    assert ask(tenant, CHAT, user(QUESTION)).json()["imprint"]["reason"] == "matched"
    costly = f"contains({'lower(' * 15}candidate.metadata['long']{')' * 15}, 'z')"
    rule = f'{{when: "{" or ".join([costly] * 9)}", prefer: 0.1, name: '
    policy = "version: 1\nrules:\n" + "".join(f"  - {rule}costly {number}}}\n" for number in range(8))
    assert tenant.http.post("/v1/policy/check", content=policy, headers=YAML).status_code == 200
    assert tenant.http.put("/v1/policy", content=policy, headers=YAML).status_code == 200
    for path in PATHS:
        decision = left_to_base(ask(tenant, path, {**user(QUESTION), "explain": True}), "policy_base")
        step = decision["explain"]["policy"][-1]
        assert step["rule"].startswith("costly") and "more than 100,000 steps" in step["effect"], step
        assert decision["explain"]["candidates"] == [] and decision["explain"]["timings"]["total_s"] < 5
