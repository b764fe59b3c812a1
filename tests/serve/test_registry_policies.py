"""Policies in the registry: versions, going back, the change log, writers side by side, facts of documents."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.registry import Conflict, InvalidInput, NotFound, Registry, VersionNotFound
from serve.registry.policies import MAX_TEXT
from tests.serve.registry_helpers import Clock, acme, clock, make_ready, registry, url  # noqa: F401

# ruff: noqa: F811

FIRST, SECOND = "version: 1\nrules: []\n", "version: 1\nrules: [] # newer\n"


def test_a_new_version_takes_the_place_of_the_old_one(registry: Registry, acme: str, clock: Clock) -> None:
    assert registry.current_policy(acme) is None
    first = registry.put_policy(acme, FIRST, "key_a")
    clock.now += 5
    second = registry.put_policy(acme, SECOND, "key_b")
    assert registry.current_policy(acme) == second and registry.get_policy(acme, 1) == first
    assert (second.number, second.text, second.created_by, second.restored_from) == (2, SECOND, "key_b", None)
    assert second.created_at == first.created_at + 5
    assert [registry.get_policy(acme, number) for number in (0, 3, 2**40)] == [None] * 3


def test_each_change_is_in_the_log_and_the_same_text_is_none(registry: Registry, acme: str) -> None:
    head = registry.head(acme)
    registry.put_policy(acme, FIRST, "key_a")
    assert registry.put_policy(acme, FIRST, "key_b").created_by == "key_a"
    registry.put_policy(acme, SECOND, "key_a")
    registry.rollback_policy(acme, None, "key_a")
    events = registry.changes_since(acme, head)
    assert [(event.kind, event.adapter_id, event.document_id) for event in events] == [("policy_changed", None, "")] * 3


def test_going_back_makes_a_new_version(registry: Registry, acme: str) -> None:
    for text in (FIRST, SECOND, "version: 1\nrules: [] # newest\n"):
        registry.put_policy(acme, text, "key_a")
    back = registry.rollback_policy(acme, 1, "key_b")
    assert (back.number, back.text, back.created_by, back.restored_from) == (4, FIRST, "key_b", 1)
    undone = registry.rollback_policy(acme, None, "key_a")
    assert (undone.number, undone.restored_from) == (5, 3)
    # To what is in force already: nothing happens.
    assert registry.rollback_policy(acme, 3, "key_b") == undone
    with pytest.raises(VersionNotFound, match="no version 9; it has versions 1 to 5"):
        registry.rollback_policy(acme, 9, "key_a")
    with pytest.raises(VersionNotFound):
        registry.rollback_policy(acme, -1, "key_a")


def test_nothing_to_go_back_to(registry: Registry, acme: str) -> None:
    with pytest.raises(NotFound):
        registry.rollback_policy(acme, None, "key_a")
    registry.put_policy(acme, FIRST, "key_a")
    with pytest.raises(Conflict, match="only one version"):
        registry.rollback_policy(acme, None, "key_a")
    assert registry.current_policy(acme) is not None


def test_an_expected_version_guards_against_lost_updates(registry: Registry, acme: str) -> None:
    registry.put_policy(acme, FIRST, "key_a", expected_version=0)
    with pytest.raises(Conflict, match="at version 1 by now, not 0"):
        registry.put_policy(acme, SECOND, "key_a", expected_version=0)
    assert registry.put_policy(acme, SECOND, "key_a", expected_version=1).number == 2


def test_writers_at_once_get_versions_of_their_own(registry: Registry, acme: str) -> None:
    head = registry.head(acme)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: registry.put_policy(acme, f"rules of {n}", "key_a"), range(4)))
    assert sorted(version.number for version in made) == [1, 2, 3, 4]
    assert {version.text for version in made} == {version.text for version in registry.list_policies(acme).items}
    assert registry.head(acme) == head + 4

    def guarded(n: int) -> bool:
        try:
            registry.put_policy(acme, f"guarded {n}", "key_a", expected_version=4)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(guarded, range(4))).count(True) == 1


def test_versions_are_listed_by_page(registry: Registry, acme: str) -> None:
    for number in range(1, 6):
        registry.put_policy(acme, f"text {number}", "key_a")
    numbers, cursor = [], None
    while True:
        page = registry.list_policies(acme, 2, cursor)
        numbers += [version.number for version in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert numbers == [5, 4, 3, 2, 1]
    for bad in ("x", "-1", "9" * 30, "²", ""):
        with pytest.raises(InvalidInput):
            registry.list_policies(acme, 2, bad)


def test_tenants_do_not_see_each_other(registry: Registry, acme: str) -> None:
    other = registry.create_tenant("globex").id
    registry.put_policy(acme, FIRST, "key_a")
    assert registry.current_policy(other) is None and registry.get_policy(other, 1) is None
    assert registry.list_policies(other).items == []
    with pytest.raises(NotFound):
        registry.rollback_policy(other, 1, "key_b")
    with pytest.raises(NotFound, match="no tenant"):
        registry.put_policy("ten_absent", FIRST, "key_a")


@pytest.mark.parametrize("text", ["a\x00b", "\ud800", "x" * (MAX_TEXT + 1)])
def test_text_that_cannot_be_stored(registry: Registry, acme: str, text: str) -> None:
    with pytest.raises(InvalidInput):
        registry.put_policy(acme, text, "key_a")
    assert registry.current_policy(acme) is None


def test_facts_of_documents(registry: Registry, acme: str, clock: Clock) -> None:
    given = {"product": "Corvo", "tags": ["a"]}
    first = make_ready(registry, acme, "T", external_id="ext", collection="manuals", metadata=given).document_id
    clock.now += 86_400
    plain = make_ready(registry, acme, "U", "another").document_id
    waiting = registry.post_document(acme, "V", "not served yet").document.id
    gone = make_ready(registry, acme, "W", "deleted").document_id
    registry.delete_document(acme, gone)
    found = {one.document_id: one for one in registry.document_facts(acme, [first, plain, waiting, gone])}
    assert found.keys() == {first, plain}
    assert (found[first].external_id, found[first].collection, found[first].metadata) == ("ext", "manuals", given)
    assert (found[plain].external_id, found[plain].collection, found[plain].metadata) == (None, None, {})
    # A version that is not served yet changes nothing.
    registry.post_document(acme, "T2", "newer text", external_id="ext")
    assert registry.document_facts(acme, [first])[0].posted_at == clock.now - 86_400
    assert registry.document_facts(registry.create_tenant("globex").id, [first]) == []
    assert registry.document_facts(acme, []) == []
