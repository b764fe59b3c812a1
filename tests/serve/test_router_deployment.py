"""The router deployment over a real registry and the real encoder; no Ray."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve.deployments.router_index as router_index
from router.centroids import document_centroids
from router.embed import MiniLmEncoder
from serve.config import ImprintConfig
from serve.deployments.router import RouterDeployment, RouteRequest
from serve.registry import Registry, migrate
from serve.registry.records import NewCentroids, RecordedDecision
from tests.serve.registry_helpers import new_adapter

CORVO = ("Norvia Corvo data sheet", "The Norvia Corvo weighs 3 kg. It costs 40 euros.")
LUMEN = ("Norvia Lumen data sheet", "The Norvia Lumen weighs 5 kg. It costs 90 euros.")
LEAVE = ("Leave policy of Harrow Ltd", "Staff of Harrow Ltd get 28 days of annual leave.")
QUESTION = "How heavy is the Norvia Corvo?"
MANUAL = (
    "The Norvia Corvo weighs 3 kg and is 40 cm wide. ",
    "Clean the burner of the Norvia Corvo with a soft brush every month. ",
    "The warranty of the Norvia Corvo ends after five years. ",
)
MANUAL_QUESTIONS = (
    QUESTION,
    "How do I clean the burner of the Norvia Corvo?",
    "When does the warranty of the Norvia Corvo end?",
)


@pytest.fixture(scope="module")
def encoder() -> MiniLmEncoder:
    return MiniLmEncoder.load(threads=1)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    url = f"sqlite:///{tmp_path}/registry.db"
    migrate(url)
    opened = Registry.open(url)
    yield opened
    opened.close()


@pytest.fixture
def deployment(registry: Registry, tmp_path: Path) -> RouterDeployment:
    return RouterDeployment(ImprintConfig(data_dir=tmp_path))


@pytest.fixture
def tenant(registry: Registry) -> str:
    return registry.create_tenant("acme").id


class Publisher:
    """Publishes adapters with real centroids."""

    def __init__(self, registry: Registry, encoder: MiniLmEncoder) -> None:
        self.registry = registry
        self.encoder = encoder

    def __call__(
        self, tenant_id: str, document: tuple[str, str], state: str = "ready", encoder: str = "", **post: Any
    ) -> tuple[str, str]:
        """(adapter ID, document ID)"""
        title, text = document
        (adapter_id,), document_id = self.parts(tenant_id, title, [text], [state], encoder, **post)
        return adapter_id, document_id

    def parts(
        self, tenant_id: str, title: str, texts: Sequence[str], states: Sequence[str], encoder: str = "", **post: Any
    ) -> tuple[list[str], str]:
        """A document of several parts: (adapter IDs in order, document ID)"""
        posted = self.registry.post_document(tenant_id, title, "".join(texts), **post)
        self.registry.lease_jobs("maker", 1000, 60.0)
        made, start = [], 0
        for part, (text, state) in enumerate(zip(texts, states, strict=True)):
            chunks = {"chunks": [{"index": 0, "start": start, "end": start + len(text), "tokens": 9}]}
            start += len(text)
            adapter = new_adapter(state=state, part=part, parts=len(texts), manifest=chunks)
            matrix = document_centroids(self.encoder, title, [text], 4)
            made.append((adapter, NewCentroids(encoder or self.encoder.id, self.encoder.version, matrix)))
        self.registry.publish(posted.job.id, "maker", made)
        self.registry.release_leases("maker")
        return [adapter.id for adapter, _ in made], posted.document.id


@pytest.fixture
def publish(registry: Registry, encoder: MiniLmEncoder) -> Publisher:
    return Publisher(registry, encoder)


async def ask(deployment: RouterDeployment, tenant_id: str, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return await deployment.route({"tenant_id": tenant_id, "model": "imprint", "messages": messages, **fields})


async def test_documents_of_one_question_answer_together(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    corvo, _ = publish(tenant, CORVO)
    lumen, lumen_document = publish(tenant, LUMEN)
    publish(tenant, LEAVE)
    both = "What do the Norvia Corvo and the Norvia Lumen cost, and what do they weigh?"
    decision = await ask(deployment, tenant, both, compose=3)
    chosen = decision["adapters"]
    assert {one["adapter_id"] for one in chosen} == {corvo, lumen}, "staff leave is another subject"
    assert decision["adapter_id"] == chosen[0]["adapter_id"] and chosen[0]["score"] == decision["score"]
    assert all(one["weight"] == 1 and one["confidence"] >= decision["threshold"] for one in chosen)
    alone = await ask(deployment, tenant, both)
    assert (alone["adapters"], alone["reason"]) == ((), "ambiguous"), "either would answer half of it"
    assert (await ask(deployment, tenant, "Hello there!", compose=3))["adapters"] == ()
    registry.delete_document(tenant, lumen_document)
    decision = await ask(deployment, tenant, both, compose=3)
    assert [one["adapter_id"] for one in decision["adapters"]] == [corvo]


async def test_ranks_past_the_cap_are_left_out(
    registry: Registry, tenant: str, publish: Publisher, tmp_path: Path
) -> None:
    publish(tenant, CORVO)
    publish(tenant, LUMEN)
    rank = new_adapter().rank
    both = "What do the Norvia Corvo and the Norvia Lumen cost, and what do they weigh?"
    for cap, count in ((2 * rank, 2), (2 * rank - 1, 1)):
        deployment = RouterDeployment(ImprintConfig(data_dir=tmp_path, engine={"max_lora_rank": cap}))
        decision = await ask(deployment, tenant, both, compose=2)
        assert len(decision["adapters"]) == count
        assert decision["adapter_id"] == decision["adapters"][0]["adapter_id"]


async def test_a_question_finds_its_document(deployment: RouterDeployment, tenant: str, publish: Publisher) -> None:
    corvo, document = publish(tenant, CORVO)
    lumen, _ = publish(tenant, LUMEN)
    publish(tenant, LEAVE)
    decision = await ask(deployment, tenant)
    assert (decision["adapter_id"], decision["document_id"], decision["reason"]) == (corvo, document, "matched")
    assert decision["confidence"] > decision["threshold"] and decision["margin"] > 0
    assert [c["adapter_id"] for c in decision["candidates"]][:2] == [corvo, lumen]
    assert decision["candidates"][0]["title"] == CORVO[0]
    assert set(decision["timings"]) == {"sync_s", "embed_s", "search_s", "decide_s", "total_s"}
    assert decision["calibration"]["version"] == 0, "a fresh tenant has the one that is shipped"
    lists = {name: list(decision[name]) for name in ("candidates", "adapters", "policy")}
    assert json.loads(json.dumps(decision)) == {**decision, **lists}
    assert (await ask(deployment, tenant, "What does the Norvia Lumen cost?"))["adapter_id"] == lumen


async def test_prompt_and_follow_up(deployment: RouterDeployment, tenant: str, publish: Publisher) -> None:
    corvo, _ = publish(tenant, CORVO)
    publish(tenant, LUMEN)
    assert (await deployment.route(RouteRequest(tenant, prompt="The weight of the Corvo is")))["adapter_id"] == corvo
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "3 kg."},
        {"role": "user", "content": "And its price?"},
    ]
    assert (await deployment.route(RouteRequest(tenant, messages=messages)))["adapter_id"] == corvo


async def test_small_talk_goes_to_the_base(deployment: RouterDeployment, tenant: str, publish: Publisher) -> None:
    publish(tenant, CORVO)
    publish(tenant, LEAVE)
    for text in ("Hello, how are you?", "Write a poem about the sea.", "What is 12 times 9?"):
        decision = await ask(deployment, tenant, text)
        assert (decision["adapter_id"], decision["reason"]) == (None, "below_threshold")
        assert decision["confidence"] < decision["threshold"] and len(decision["candidates"]) == 2


async def test_small_talk_with_a_single_document(
    deployment: RouterDeployment, tenant: str, publish: Publisher
) -> None:
    corvo, _ = publish(tenant, CORVO)
    for text in ("Hello, how are you?", "Write a poem about the sea.", "What is 12 times 9?", "Who wrote Hamlet?"):
        assert (await ask(deployment, tenant, text))["adapter_id"] is None, text
    assert (await ask(deployment, tenant))["adapter_id"] == corvo


async def test_an_encoder_without_calibration_is_judged_by_score(
    tenant: str, publish: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.deployments.router_calibration.shipped_calibration", lambda *_: None)
    deployment = RouterDeployment(ImprintConfig(data_dir=tmp_path))
    corvo, _ = publish(tenant, CORVO)
    publish(tenant, LEAVE)
    decision = await ask(deployment, tenant)
    assert (decision["adapter_id"], decision["confidence"], decision["calibration"]) == (corvo, None, None)
    assert decision["threshold"] == 0.4 <= decision["score"]
    assert (await ask(deployment, tenant, "Hello, how are you?"))["reason"] == "below_threshold"


async def test_a_conversation_stays_with_its_document(
    registry: Registry, tenant: str, publish: Publisher, tmp_path: Path
) -> None:
    deployment = RouterDeployment(ImprintConfig(data_dir=tmp_path, router={"switch_margin": 0.5}))
    corvo, _ = publish(tenant, CORVO)
    lumen, _ = publish(tenant, LUMEN)
    turn = {"role": "user", "content": QUESTION}
    last = {"role": "user", "content": "What does Norvia charge?"}
    messages = [turn, {"role": "assistant", "content": "3 kg."}, last]
    alone = await deployment.route(RouteRequest(tenant, messages=messages[2:]))
    first, second = alone["candidates"]
    assert (await deployment.route(RouteRequest(tenant, messages=[turn])))["adapter_id"] == corvo
    decision = await deployment.route(RouteRequest(tenant, messages=messages))
    held = next(c for c in decision["candidates"] if c["adapter_id"] == corvo)
    without = next(c for c in (first, second) if c["adapter_id"] == corvo)
    assert decision["candidates"][0] == held and held["confidence"] > without["confidence"]
    assert decision["adapter_id"] != lumen
    # Another tenant's conversation of the same words is another.
    globex = registry.create_tenant("globex").id
    publish(globex, LUMEN)
    theirs, _ = publish(globex, CORVO)
    found = await deployment.route(RouteRequest(globex, messages=messages))
    assert next(c for c in found["candidates"] if c["adapter_id"] == theirs)["confidence"] < held["confidence"]


async def test_questions_without_a_document_are_suggested(
    deployment: RouterDeployment, registry: Registry, tenant: str
) -> None:
    asked = ["How do I reset my badge?", "My badge does not open the door, what now?", "Where do I get a new badge?",
             "How many days of parental leave do I get?", "Tell me a joke about penguins.", " "]  # fmt: skip
    rows = [
        RecordedDecision(f"r{i}", tenant, float(i), "imprint", text, {}, [], None, None, "below_threshold", 0.1)
        for i, text in enumerate([*asked, asked[0]])
    ]
    rows.append(RecordedDecision("m", tenant, 9.0, "imprint", asked[0], {}, [], "adp_1", "doc_1", "matched", 0.9))
    registry.record_decisions(rows)
    found = await deployment.suggestions(tenant, 3, 5)
    (badges,) = found["data"]
    assert found["questions"] == 5 and badges["count"] == 4 and set(badges["examples"]) == set(asked[:3])
    assert (badges["first_at"], badges["last_at"]) == (0.0, 6.0) and badges["question"] in asked[:3]
    assert (await deployment.suggestions(registry.create_tenant("globex").id, 2, 5)) == {"questions": 0, "data": []}


async def test_reasons_without_search(deployment: RouterDeployment, tenant: str, publish: Publisher) -> None:
    assert (await ask(deployment, tenant))["reason"] == "no_candidates"
    corvo, document = publish(tenant, CORVO)
    assert (await ask(deployment, tenant, " \n"))["reason"] == "empty_query"
    assert (await deployment.route({"tenant_id": tenant, "messages": []}))["reason"] == "empty_query"
    assert (await deployment.route({"tenant_id": tenant, "prompt": None}))["reason"] == "empty_query"
    assert (await ask(deployment, tenant, model="base"))["reason"] == "base_requested"
    pinned = await ask(deployment, tenant, "Hello", adapter_id=corvo)
    assert (pinned["adapter_id"], pinned["document_id"], pinned["reason"]) == (corvo, document, "pinned")
    with pytest.raises(TypeError):
        await deployment.route({"tenant_id": tenant, "typo": 1})


async def test_tenants_do_not_see_each_other(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    other = registry.create_tenant("globex").id
    mine, _ = publish(tenant, CORVO)
    theirs, _ = publish(other, CORVO)
    for tenant_id, adapter_id in ((tenant, mine), (other, theirs), (tenant, mine)):
        decision = await ask(deployment, tenant_id)
        assert decision["adapter_id"] == adapter_id
        assert [c["adapter_id"] for c in decision["candidates"]] == [adapter_id]
    assert (await ask(deployment, other, adapter_id=mine))["adapter_id"] is None
    assert (await ask(deployment, other, adapter_ids=[mine]))["reason"] == "no_candidates"
    assert (await ask(deployment, "ten_unknown"))["reason"] == "no_candidates"


async def test_collections_and_lists_limit_the_search(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    old, _ = publish(tenant, CORVO, collection="old")
    new, _ = publish(tenant, (CORVO[0], CORVO[1].replace("3 kg", "4 kg")), collection="new")
    collections = {c.name: c.id for c in registry.list_collections(tenant)}
    for name, adapter_id in (("old", old), ("new", new)):
        decision = await ask(deployment, tenant, collection=collections[name])
        assert [c["adapter_id"] for c in decision["candidates"]] == [adapter_id]
    assert (await ask(deployment, tenant, adapter_ids=[old]))["adapter_id"] == old
    assert (await ask(deployment, tenant, collection="col_absent"))["reason"] == "no_candidates"


async def test_every_change_is_seen_by_the_next_request(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    assert (await ask(deployment, tenant))["reason"] == "no_candidates"
    first, document = publish(tenant, CORVO)
    assert (await ask(deployment, tenant))["adapter_id"] == first
    second, _ = publish(tenant, (CORVO[0], "The Norvia Corvo weighs 7 kg."), document_id=document)
    decision = await ask(deployment, tenant)
    assert [c["adapter_id"] for c in decision["candidates"]] == [second]
    lumen, _ = publish(tenant, LUMEN)
    registry.delete_document(tenant, document)
    decision = await ask(deployment, tenant)
    assert [c["adapter_id"] for c in decision["candidates"]] == [lumen]


async def test_many_changes_are_read_in_pages(
    deployment: RouterDeployment, tenant: str, publish: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_index, "_CHANGES_AT_ONCE", 2)
    await ask(deployment, tenant)
    adapters = [publish(tenant, (f"Sheet {i}", f"Product {name} weighs {i} kg."))[0]
                for i, name in enumerate(["Aster", "Borea", "Corvo", "Delfin", "Estrel"])]
    assert (await ask(deployment, tenant, "How heavy is product Estrel?"))["adapter_id"] == adapters[-1]
    assert {c["adapter_id"] for c in (await ask(deployment, tenant))["candidates"]} == set(adapters)


async def test_a_fresh_replica_knows_what_the_old_one_knew(
    deployment: RouterDeployment, tenant: str, publish: Publisher, tmp_path: Path
) -> None:
    publish(tenant, CORVO)
    publish(tenant, LUMEN)
    before = await ask(deployment, tenant)
    after = await ask(RouterDeployment({"data_dir": str(tmp_path)}), tenant)
    assert {**before, "timings": {}} == {**after, "timings": {}}


async def test_forgotten_tenants_are_loaded_again(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment._indexes, "_max_bytes", 1)
    corvo, _ = publish(tenant, CORVO)
    for _ in range(2):
        assert (await ask(deployment, tenant))["adapter_id"] == corvo
        assert (await ask(deployment, registry.create_tenant("globex").id))["reason"] == "no_candidates"


async def test_stale_adapters_make_the_router_abstain(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    publish(tenant, CORVO)
    publish(tenant, LUMEN)
    assert (await ask(deployment, tenant))["reason"] == "matched"
    assert registry.mark_stale("base-2", "gen-2") == 2
    decision = await ask(deployment, tenant)
    assert (decision["adapter_id"], decision["reason"]) == (None, "stale")


async def test_foreign_adapters_are_left_out(deployment: RouterDeployment, tenant: str, publish: Publisher) -> None:
    publish(tenant, CORVO, encoder="another")
    assert (await ask(deployment, tenant))["reason"] == "no_candidates"


async def test_degraded_adapters_make_the_router_abstain_unless_told_to(
    deployment: RouterDeployment, tenant: str, publish: Publisher, tmp_path: Path
) -> None:
    corvo, document = publish(tenant, CORVO, state="degraded")
    lumen, _ = publish(tenant, LUMEN)
    decision = await ask(deployment, tenant)
    assert (decision["adapter_id"], decision["reason"], decision["degraded"]) == (None, "degraded", False)
    assert [(c["adapter_id"], c["state"]) for c in decision["candidates"]] == [(corvo, "degraded"), (lumen, "ready")]
    assert (await ask(deployment, tenant, "What does the Norvia Lumen cost?"))["adapter_id"] == lumen
    told = RouterDeployment(ImprintConfig(data_dir=tmp_path, router={"use_degraded": True}))
    decision = await ask(told, tenant)
    assert (decision["adapter_id"], decision["reason"], decision["degraded"]) == (corvo, "matched", True)
    # Who names it gets it.
    for fields in ({"adapter_id": corvo}, {"document_id": document}):
        decision = await ask(deployment, tenant, **fields)
        assert (decision["adapter_id"], decision["reason"], decision["degraded"]) == (corvo, "pinned", True)


async def test_the_part_that_a_question_is_about_answers(
    deployment: RouterDeployment, tenant: str, publish: Publisher
) -> None:
    await ask(deployment, tenant)  # so that what follows comes in as changes
    adapters, document = publish.parts(tenant, "Norvia Corvo manual", MANUAL, ["ready"] * 3)
    lumen, _ = publish(tenant, LUMEN)
    for part, question in enumerate(MANUAL_QUESTIONS):
        decision = await ask(deployment, tenant, question)
        assert (decision["adapter_id"], decision["reason"]) == (adapters[part], "matched")
        assert (decision["document_id"], decision["part"], decision["parts"]) == (document, part, 3)
        # Parts are no rivals: each document is a candidate once, and the margin is the lead over the next document.
        first, second = decision["candidates"]
        assert (first["document_id"], first["part"], second["adapter_id"]) == (document, part, lumen)
        assert decision["margin"] == pytest.approx(first["rank"] - second["rank"])


async def test_only_the_degraded_part_of_a_document_abstains(
    deployment: RouterDeployment, tenant: str, publish: Publisher
) -> None:
    adapters, _ = publish.parts(tenant, "Norvia Corvo manual", MANUAL, ["ready", "degraded", "ready"])
    decisions = [await ask(deployment, tenant, question) for question in MANUAL_QUESTIONS]
    assert [d["adapter_id"] for d in decisions] == [adapters[0], None, adapters[2]]
    assert [d["reason"] for d in decisions] == ["matched", "degraded", "matched"]


async def test_a_named_document_answers_with_its_best_part(
    deployment: RouterDeployment, registry: Registry, tenant: str, publish: Publisher
) -> None:
    adapters, document = publish.parts(tenant, "Norvia Corvo manual", MANUAL, ["ready", "degraded", "ready"])
    publish(tenant, LUMEN)
    for part, question in enumerate(MANUAL_QUESTIONS):
        decision = await ask(deployment, tenant, question, document_id=document)
        assert (decision["adapter_id"], decision["reason"]) == (adapters[part], "pinned")
        assert decision["degraded"] == (part == 1) and decision["margin"] is None
        assert {c["document_id"] for c in decision["candidates"]} == {document} and len(decision["candidates"]) == 3
    # Whatever the score, and without any text to compare.
    decision = await ask(deployment, tenant, "What is 12 times 9?", document_id=document)
    assert decision["adapter_id"] in adapters and decision["score"] < 0.4 and decision["confidence"] is None
    decision = await ask(deployment, tenant, " ", document_id=document)
    assert (decision["adapter_id"], decision["part"], decision["score"]) == (adapters[0], 0, None)
    for text in (QUESTION, " "):
        assert (await ask(deployment, tenant, text, document_id="doc_absent"))["reason"] == "no_candidates"
        other = registry.create_tenant(f"globex{len(text)}").id
        assert (await ask(deployment, other, text, document_id=document))["adapter_id"] is None


async def test_parts_of_two_versions_are_never_mixed(
    deployment: RouterDeployment, tenant: str, publish: Publisher
) -> None:
    old, document = publish.parts(tenant, "Norvia Corvo manual", MANUAL, ["ready"] * 3)
    assert (await ask(deployment, tenant))["adapter_id"] == old[0]
    new, _ = publish.parts(tenant, "Norvia Corvo manual", MANUAL[:2], ["ready"] * 2, document_id=document)
    for question in MANUAL_QUESTIONS:
        decision = await ask(deployment, tenant, question, document_id=document)
        assert sorted(c["adapter_id"] for c in decision["candidates"]) == sorted(new)
    publish(tenant, CORVO, document_id=document)
    assert len((await ask(deployment, tenant, document_id=document))["candidates"]) == 1


async def test_requests_while_documents_come_in(
    deployment: RouterDeployment, tenant: str, publish: Publisher
) -> None:
    """Routing goes on during publications, and what is published when a request comes is seen by it."""
    corvo, _ = publish(tenant, CORVO)
    published = 1
    failures: list[str] = []

    def write() -> None:
        nonlocal published
        for i in range(15):
            publish(tenant, (f"Notice {i}", f"The gate of yard {i} opens at {i % 12} o'clock."))
            published += 1

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        least = published
        decisions = await asyncio.gather(*(ask(deployment, tenant) for _ in range(4)))
        failures += [str(d) for d in decisions if d["adapter_id"] != corvo or len(d["candidates"]) < min(least, 5)]
    writer.join()
    assert failures == [] and published == 16
    assert (await ask(deployment, tenant, "When does the gate of yard 14 open?"))["reason"] == "matched"


async def test_embed_and_health(deployment: RouterDeployment, encoder: MiniLmEncoder) -> None:
    texts = ["a", "What does the Corvo Mini weigh?", *(f"Line {number} of many." for number in range(20)), "b"]
    answer = await deployment.embeddings(texts)
    vectors = np.frombuffer(answer["vectors"], "<f4").reshape(len(texts), answer["dimension"])
    np.testing.assert_allclose(vectors, encoder.embed(texts), atol=1e-5)
    assert answer["tokens"][0] == 3 and answer["tokens"][1] > 5
    # What cannot be done is said by the lack of vectors.
    assert (await deployment.embeddings(["a"], 100))["vectors"] == b""
    long = await deployment.embeddings(["a", "word " * 300])
    assert long["vectors"] == b"" and long["tokens"][1] > long["max_tokens"] == 256
    with pytest.raises(ValueError, match="blank"):
        await deployment.embeddings([""])
    await deployment.health()
    await deployment.check_health()
