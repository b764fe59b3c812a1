"""What conversations are remembered by, and that no text is."""

from __future__ import annotations

import gc
from typing import Any

from router.stickiness import Conversations

FIRST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How heavy is the zyzzyva?"}]
SECOND = [*FIRST, {"role": "assistant", "content": "3 kg."}, {"role": "user", "content": "And how wide?"}]
THIRD = [*SECOND, {"role": "assistant", "content": "9 cm."}, {"role": "user", "content": "Thanks!"}]


def test_the_previous_turns_document_is_held() -> None:
    conversations = Conversations()
    assert conversations.held("ten_a", "", FIRST) is None
    conversations.note("ten_a", "", FIRST, "doc_1")
    assert conversations.held("ten_a", "", SECOND) == "doc_1"
    assert conversations.held("ten_a", "", FIRST) is None, "a first turn has none before it"
    conversations.note("ten_a", "", SECOND, None)
    assert conversations.held("ten_a", "", THIRD) is None
    conversations.note("ten_a", "", SECOND, "doc_2")
    assert conversations.held("ten_a", "", THIRD) == "doc_2"


def test_only_the_same_tenant_scope_and_messages_find_it() -> None:
    conversations = Conversations()
    conversations.note("ten_a", "", FIRST, "doc_1")
    assert conversations.held("ten_b", "", SECOND) is None
    assert conversations.held("ten_a", "col_1", SECOND) is None
    other = [FIRST[0], {"role": "user", "content": "How heavy is the dog?"}, *SECOND[2:]]
    assert conversations.held("ten_a", "", other) is None
    assert conversations.held("ten_a", "", SECOND[1:]) is None, "another system message"


def test_old_conversations_are_forgotten() -> None:
    now = 0.0
    conversations = Conversations(most=2, forget_s=10, clock=lambda: now)
    for tenant in ("ten_a", "ten_b", "ten_c"):
        conversations.note(tenant, "", FIRST, "doc_1")
    assert [conversations.held(tenant, "", SECOND) for tenant in ("ten_a", "ten_b")] == [None, "doc_1"]
    now = 11.0
    assert conversations.held("ten_b", "", SECOND) is None


def test_requests_without_messages_and_odd_content() -> None:
    conversations = Conversations()
    for messages in (None, [], [{"role": "assistant", "content": "x"}]):
        conversations.note("ten_a", "", messages, "doc_1")
        assert conversations.held("ten_a", "", messages) is None
    assert len(conversations) == 0
    parts: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "a \ud800"}]}]
    conversations.note("ten_a", "", parts, "doc_1")
    assert conversations.held("ten_a", "", [*parts, {"role": "user", "content": None}]) == "doc_1"


def test_no_text_is_kept() -> None:
    conversations = Conversations()
    conversations.note("ten_a", "", FIRST, "doc_1")
    seen, waiting = set(), [conversations]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type) or type(thing).__module__ == "builtins" and callable(thing):
            continue
        seen.add(id(thing))
        assert not (isinstance(thing, str | bytes) and "zyzzyva" in str(thing))
        waiting += gc.get_referents(thing) if not isinstance(thing, dict) or "__builtins__" not in thing else []
