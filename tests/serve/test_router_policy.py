"""Policies in the router deployment, over a real registry and the real encoder; no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.config import ImprintConfig
from serve.deployments import router_policy
from serve.deployments.router import RouterDeployment
from serve.deployments.router_policy import TenantPolicies
from serve.registry import Registry, migrate
from serve.registry.records import RecordedDecision
from tests.serve.registry_helpers import make_ready
from tests.serve.test_router_deployment import (  # noqa: F401
    CORVO,
    LEAVE,
    LUMEN,
    QUESTION,
    Publisher,
    ask,
    encoder,
    publish,
)

# ruff: noqa: F811


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    url = f"sqlite:///{tmp_path}/registry.db"
    migrate(url)
    opened = Registry.open(url)
    yield opened
    opened.close()


@pytest.fixture
def deployment(registry: Registry, tmp_path: Path) -> RouterDeployment:
    return RouterDeployment(ImprintConfig(data_dir=tmp_path, router={"calibrate_every_s": 0}))


@pytest.fixture
def tenant(registry: Registry) -> str:
    return registry.create_tenant("acme").id


def put(registry: Registry, tenant: str, *rules: str) -> int:
    """Put rules, each given as YAML in braces, in force; the version."""
    lines = "".join(f"\n- {{name: rule {number}, {rule}}}" for number, rule in enumerate(rules))
    return registry.put_policy(tenant, f"version: 1\nrules:{lines or ' []'}", "key_a").number


async def test_a_change_is_seen_by_the_next_request_at_every_replica(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher, tmp_path: Path
) -> None:
    corvo, document = publish(tenant, CORVO)
    replicas = [deployment, RouterDeployment(ImprintConfig(data_dir=tmp_path, router={"calibrate_every_s": 0}))]
    for replica in replicas:
        decision = await ask(replica, tenant)
        assert (decision["adapter_id"], decision["policy"]) == (corvo, ())
    put(registry, tenant, 'when: candidate.title == "Norvia Corvo data sheet", forbid: true')
    for replica in replicas:
        decision = await ask(replica, tenant)
        assert (decision["adapter_id"], decision["reason"]) == (None, "policy_forbids")
        (step,) = decision["policy"]
        assert (step["rule"], step["action"], step["documents"]) == ("rule 0", "forbid", (document,))
    put(registry, tenant)
    for replica in replicas:
        assert (await ask(replica, tenant))["adapter_id"] == corvo
    registry.rollback_policy(tenant, 1, "key_a")
    for replica in replicas:
        assert (await ask(replica, tenant))["reason"] == "policy_forbids"
    # Whoever names the document is not routed.
    assert (await ask(deployment, tenant, document_id=document))["reason"] == "pinned"


async def test_policies_of_others_do_nothing(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    corvo, _ = publish(tenant, CORVO)
    put(registry, registry.create_tenant("globex").id, "fall_back: base")
    assert (await ask(deployment, tenant))["adapter_id"] == corvo


async def test_facts_of_documents_and_requests(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    corvo, document = publish(
        tenant, CORVO, external_id="corvo/sheet", collection="products", metadata={"stage": "draft", "rank": 3}
    )
    products = registry.list_collections(tenant)[0].id
    holds = [
        'candidate.metadata["stage"] == "draft" and candidate.metadata["rank"] > 2',
        'candidate.external_id == "corvo/sheet" and candidate.collection == "products"',
        "candidate.age >= 0 and candidate.age < 1",
        'candidate.score > 0.4 and candidate.confidence > 0.5 and candidate.state == "ready"',
        f'candidate.document_id == "{document}"',
        'contains(lower(request.text), "how heavy") and request.model == "imprint" and request.compose == 1',
        'request.headers["x-role"] == "guest"',
    ]
    for condition in holds:
        put(registry, tenant, f"when: '{condition}', forbid: true")
        decision = await ask(deployment, tenant, headers={"x-role": "guest"})
        assert decision["reason"] == "policy_forbids", condition
        put(registry, tenant, f"when: 'not ({condition})', forbid: true")
        assert (await ask(deployment, tenant, headers={"x-role": "guest"}))["adapter_id"] == corvo, condition
    put(registry, tenant, """when: 'request.collection == "products"', fall_back: base""")
    assert (await ask(deployment, tenant, collection=products))["reason"] == "policy_base"
    assert (await ask(deployment, tenant))["adapter_id"] == corvo


async def test_changed_metadata_is_seen(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    _, document = publish(tenant, CORVO, metadata={"stage": "draft"})
    put(registry, tenant, """when: 'candidate.metadata["stage"] == "draft"', forbid: true""")
    assert (await ask(deployment, tenant))["reason"] == "policy_forbids"
    registry.post_document(tenant, *CORVO, document_id=document, metadata={"stage": "released"})
    assert (await ask(deployment, tenant))["reason"] == "matched"


async def test_what_is_forbidden_leaves_the_next_best(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    old, _ = publish(tenant, CORVO, collection="old")
    new, _ = publish(tenant, (CORVO[0], CORVO[1].replace("3 kg", "4 kg")), collection="new")
    for collection, left in (("old", new), ("new", old)):
        put(registry, tenant, f"""when: 'candidate.collection == "{collection}"', forbid: true""")
        decision = await ask(deployment, tenant)
        assert (decision["adapter_id"], [c["adapter_id"] for c in decision["candidates"]]) == (left, [left])


async def test_a_preference_chooses_between_versions(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    adapters = {
        edition: publish(tenant, (CORVO[0], CORVO[1] + f" Edition {edition}."), collection=f"edition-{edition}")[0]
        for edition in (1, 2)
    }
    for edition, adapter in adapters.items():
        put(registry, tenant, f"""when: 'candidate.collection == "edition-{edition}"', prefer: 0.2""")
        decision = await ask(deployment, tenant)
        assert (decision["adapter_id"], decision["reason"]) == (adapter, "matched")
        assert decision["margin"] > 0.1 and decision["policy"][0]["effect"] == "preferred by +0.2"


async def test_a_preference_never_makes_the_base_answer(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    corvo, _ = publish(tenant, CORVO)
    publish(tenant, LEAVE, collection="personnel")
    put(registry, tenant, """when: 'candidate.collection == "personnel"', prefer: 1""")
    decision = await ask(deployment, tenant)
    assert (decision["adapter_id"], decision["reason"]) == (corvo, "matched")
    assert [step["effect"][:9] for step in decision["policy"]] == ["preferred", "set aside"]


async def test_a_rule_names_the_document(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    corvo, document = publish(tenant, CORVO)
    leave, _ = publish(tenant, LEAVE, external_id="leave", collection="personnel")
    monkeypatch.setattr(router_policy, "DEPTHS", (1,))  # so that it is not among the candidates
    put(registry, tenant, """when: 'contains(request.text, "Corvo")', use: leave""")
    decision = await ask(deployment, tenant)
    assert (decision["adapter_id"], decision["reason"]) == (leave, "policy_pinned")
    # Within the collection that the client asked for, it is not there.
    publish(tenant, LUMEN, collection="products")
    products = next(one.id for one in registry.list_collections(tenant) if one.name == "products")
    decision = await ask(deployment, tenant, collection=products)
    assert decision["adapter_id"] != leave and "no document 'leave'" in decision["policy"][0]["effect"]
    put(registry, tenant, "use: leave", """when: 'candidate.external_id == "leave"', forbid: true""")
    decision = await ask(deployment, tenant)
    assert decision["adapter_id"] == corvo
    assert "rule 'rule 1' forbids it" in decision["policy"][0]["effect"]
    put(registry, tenant, f"use: {document}")
    assert (await ask(deployment, tenant, "When do staff of Harrow get leave?"))["adapter_id"] == corvo
    registry.delete_document(tenant, document)
    assert (await ask(deployment, tenant, "How many days of annual leave?"))["reason"] != "policy_pinned"


async def test_required_confidence(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    corvo, _ = publish(tenant, CORVO)
    plain = await ask(deployment, tenant)
    assert plain["adapter_id"] == corvo and plain["confidence"] < 1
    put(registry, tenant, "require_confidence: 1")
    decision = await ask(deployment, tenant)
    assert (decision["adapter_id"], decision["reason"]) == (None, "below_required")
    put(registry, tenant, "require_confidence: 0.01")
    assert (await ask(deployment, tenant))["adapter_id"] == corvo


async def test_a_cap_bounds_a_composition(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    for name in ("Corvo", "Lumen", "Aster"):
        publish(tenant, (f"Norvia {name} data sheet", f"The Norvia {name} weighs 3 kg."), collection="products")
    question = "How heavy are the Norvia Corvo, the Norvia Lumen and the Norvia Aster?"
    plain = await ask(deployment, tenant, question, compose=3)
    assert len(plain["adapters"]) > 1, plain
    put(registry, tenant, """when: 'candidate.collection == "products"', cap: 1""")
    capped = await ask(deployment, tenant, question, compose=3)
    assert [one["adapter_id"] for one in capped["adapters"]] == [plain["adapters"][0]["adapter_id"]]
    assert "over the cap of 1" in capped["policy"][0]["effect"]


async def test_a_stored_policy_that_cannot_be_read_lets_nothing_through(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    publish(tenant, CORVO)
    registry.put_policy(tenant, "version: 2\nrules: [{name: from the future, allow: some}]", "key_a")
    decision = await ask(deployment, tenant)
    assert (decision["reason"], decision["policy"][0]["rule"]) == ("policy_base", "this policy cannot be read")


def test_the_registry_is_read_only_after_changes(registry: Registry, tenant: str, monkeypatch: Any) -> None:
    reads: list[str] = []
    read = registry.current_policy
    monkeypatch.setattr(registry, "current_policy", lambda tenant_id: reads.append(tenant_id) or read(tenant_id))
    policies = TenantPolicies(registry)
    for _ in range(3):
        assert policies.current(tenant, registry.head(tenant)) is None
    assert len(reads) == 1
    put(registry, tenant, "fall_back: base")
    first = policies.current(tenant, registry.head(tenant))
    assert first is not None and policies.current(tenant, registry.head(tenant)) is first and len(reads) == 2
    make_ready(registry, tenant, "T")
    second = policies.current(tenant, registry.head(tenant))
    assert second is not None and second is not first and second.compiled is first.compiled
    put(registry, tenant)
    assert policies.current(tenant, registry.head(tenant)) is None


async def test_a_dry_run_says_what_would_change(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    corvo, document = publish(tenant, CORVO)
    lumen, other = publish(tenant, LUMEN, external_id="lumen")
    questions = [QUESTION, "What does the Norvia Lumen cost?", "Who wrote Hamlet?"]
    for number, question in enumerate(questions):
        decided = await ask(deployment, tenant, question)
        registry.record_decisions(
            [
                RecordedDecision(
                    f"chatcmpl-{number}", tenant, 1000.0 + number, "imprint", question, {"x-role": "guest"},
                    decided["candidates"], decided["adapter_id"], decided["document_id"], decided["reason"],
                    decided["confidence"],
                )
            ]
        )  # fmt: skip
    same = await deployment.check_policy(tenant, "version: 1\nrules: []", 10)
    assert same == {"compared": 3, "changes": []}
    rule = "when: 'request.headers[\"x-role\"] == \"guest\" and contains(candidate.title, \"Corvo\")', forbid: true"
    found = await deployment.check_policy(tenant, f"version: 1\nrules:\n- {{name: a, {rule}}}", 10)
    assert found["compared"] == 3
    by_question = {change["text"]: change for change in found["changes"]}
    changed = by_question[QUESTION]
    assert (changed["before"]["adapter_id"], changed["before"]["reason"]) == (corvo, "matched")
    assert changed["after"]["adapter_id"] != corvo and changed["steps"][0]["documents"] == (document,)
    assert changed["response_id"] == "chatcmpl-0"
    assert by_question.get(questions[1]) is None
    assert (await deployment.check_policy(tenant, f"version: 1\nrules:\n- {{name: a, {rule}}}", 0))["compared"] == 0
    # Against the policy in force, newest first, and no more than asked for.
    put(registry, tenant, "use: lumen")
    found = await deployment.check_policy(tenant, "version: 1\nrules: []", 2)
    assert found["compared"] == 2 and [c["text"] for c in found["changes"]] == [questions[2], questions[1]]
    assert {c["before"]["adapter_id"] for c in found["changes"]} == {lumen}
