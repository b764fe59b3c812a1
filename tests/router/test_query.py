"""Which text of a request is compared."""

from __future__ import annotations

from typing import Any

import pytest

from router.query import MAX_CHARACTERS, is_follow_up, query_text


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_the_last_user_message() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("How heavy is the Corvo?"),
        assistant("3 kg."),
        user("What does the Lumen cost?"),
    ]
    assert query_text(messages) == "What does the Lumen cost?"


def test_a_follow_up_takes_earlier_user_turns_along() -> None:
    messages = [user("How heavy is the Corvo?"), assistant("3 kg."), user("And its price?")]
    assert query_text(messages) == "How heavy is the Corvo?\nAnd its price?"


def test_a_chain_of_follow_ups_reaches_back_to_the_name_and_no_further() -> None:
    messages = [
        user("Tell me about the Lumen."),
        user("How heavy is the Corvo?"),
        user("and its price?"),
        user("is it red?"),
    ]
    assert query_text(messages) == "How heavy is the Corvo?\nand its price?\nis it red?"


def test_the_chain_is_bounded() -> None:
    assert query_text([user(f"and its part {c}?") for c in "abcdefgh"]).count("\n") == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("and its price?", True),
        ("What about the colour?", True),
        ("Is it available in blue?", True),
        ("Who designed that?", True),
        ("What is the price of the Corvo Mini?", False),
        ("How much is it for the Corvo?", False),
        ("what is its weight, I mean the t100?", False),
        ("Where is the office?", False),
        ("", False),
        ("I would like to know whether it is at all possible to bring my old dog along for a week in summer", False),
    ],
)
def test_follow_ups(text: str, expected: bool) -> None:
    assert is_follow_up(text) is expected


def test_content_parts() -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "image_url"}, {"type": "text", "text": "this?"}, {}, 3]
    assert query_text([user(parts)]) == "What is\nthis?"


@pytest.mark.parametrize("content", [None, "", "  \n", [], {}, 7, [{"type": "text"}], [{"type": "text", "text": None}]])
def test_no_text(content: Any) -> None:
    assert query_text([user(content)]) == ""
    assert query_text([user("Real question?"), assistant("Yes."), user(content)]) == "Real question?"


def test_no_user_message() -> None:
    assert query_text([]) == query_text([{"role": "system", "content": "x"}, {}]) == ""


def test_long_messages_keep_start_and_end() -> None:
    text = query_text([user("START " + "word " * 5000 + "END?")])
    assert text.startswith("START") and text.endswith("END?") and len(text) <= MAX_CHARACTERS + 1
