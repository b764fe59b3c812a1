"""`adapters` and `compose` over HTTP: what is resolved, what the engine is told, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.deployments.engine_context import composition_id
from serve.registry.records import ChangeEvent
from tests.serve.api_helpers import Api, error_of, events_of, make_api
from tests.serve.registry_helpers import make_ready, one_part, several_parts

MESSAGES = [{"role": "user", "content": "When does the pool open, and what does the sauna cost?"}]
RANK = 8  # of the adapters that the registry's helpers make


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path, engine={"max_lora_rank": 3 * RANK}, router={"max_composed": 4})
    yield api
    api.registry.close()


def document(api: Api, title: str, tenant: str = "acme", **make: Any) -> ChangeEvent:
    owner = api.registry.get_tenant(tenant)
    assert owner is not None
    return make_ready(api.registry, owner.id, title, **make)


async def ask(api: Api, path: str = "/v1/chat/completions", **body: Any) -> Any:
    async with api.client() as client:
        return await client.post(path, json={"model": "imprint", "messages": MESSAGES, **body})


async def test_named_adapters_are_composed(api: Api) -> None:
    pool, sauna, bar = (document(api, title) for title in ("Pool", "Sauna", "Bar"))
    api.registry.set_alias(bar.tenant_id, "bar", bar.document_id)
    named = [sauna.adapter_id, {"id": pool.document_id, "weight": 0.5}, "bar"]
    response = await ask(api, adapters=named, temperature=0)
    members = ((str(sauna.adapter_id), 1.0), (str(pool.adapter_id), 0.5), (str(bar.adapter_id), 1.0))
    ((_, body, context),) = api.engine.calls
    assert context.members == members and context.adapter_id == composition_id(members)
    assert set(body) == {"model", "messages", "temperature"} and not api.router.calls
    field = response.json()["imprint"]
    assert (field["reason"], field["adapter_id"], field["score"]) == ("pinned", sauna.adapter_id, None)
    assert field["adapters"] == [
        {"adapter_id": event.adapter_id, "document_id": event.document_id, "weight": weight, "score": None}
        for event, weight in ((sauna, 1.0), (pool, 0.5), (bar, 1.0))
    ]
    assert response.headers["x-imprint-adapter"] == ",".join(adapter_id for adapter_id, _ in members)
    assert response.headers["x-imprint-document"] == f"{sauna.document_id},{pool.document_id},{bar.document_id}"
    counted = 'imprint_route_decisions_total{answered_by="composition",reason="pinned"} 1.0'
    assert counted in api.services.metrics.text()


async def test_in_streams_and_completions_too(api: Api) -> None:
    named = [document(api, title).adapter_id for title in ("Pool", "Sauna")]
    response = await ask(api, adapters=named, stream=True)
    first, *_ = events_of(response.text)
    assert [one["adapter_id"] for one in first["imprint"]["adapters"]] == named
    async with api.client() as client:
        body = {"model": "imprint", "prompt": [1, 2, 3], "adapters": named}
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert [call[2].members for call in api.engine.calls] == [tuple((name, 1.0) for name in named)] * 2
    decision = (await ask(api, "/v1/route", adapters=named)).json()
    assert [one["adapter_id"] for one in decision["adapters"]] == named and len(api.engine.calls) == 2


async def test_one_adapter_as_it_is_needs_no_composing(api: Api) -> None:
    pool = document(api, "Pool", parts=one_part(state="degraded"))
    response = await ask(api, adapters=[pool.document_id])
    assert (api.engine.calls[-1][2].adapter_id, api.engine.calls[-1][2].members) == (pool.adapter_id, ())
    assert "adapters" not in response.json()["imprint"] and response.json()["imprint"]["degraded"]
    response = await ask(api, adapters=[{"id": pool.document_id, "weight": -2}])
    assert api.engine.calls[-1][2].members == ((pool.adapter_id, -2.0),)
    assert response.json()["imprint"]["adapters"][0]["weight"] == -2 and response.json()["imprint"]["degraded"]


async def test_the_router_selects_among_the_parts_of_a_named_document(api: Api) -> None:
    pool, manual = document(api, "Pool"), document(api, "Manual", parts=several_parts(3))
    parts = api.registry.resolve_model(manual.tenant_id, manual.document_id)
    assert parts is not None
    api.router.decision = {"adapter_id": parts.adapter_ids[1], "document_id": manual.document_id, "reason": "pinned"}
    await ask(api, adapters=[pool.adapter_id, manual.document_id])
    assert api.engine.calls[-1][2].members == ((pool.adapter_id, 1.0), (parts.adapter_ids[1], 1.0))
    (call,) = api.router.calls
    assert call["document_id"] == manual.document_id
    api.router.decision = {"adapter_id": None, "document_id": None, "reason": "no_candidates"}
    error = error_of(await ask(api, adapters=[pool.adapter_id, manual.document_id]), 409)
    assert (error["param"], error["code"]) == ("adapters.1", "model_not_ready")


async def test_what_another_tenant_has_does_not_exist(api: Api) -> None:
    mine, theirs = document(api, "Pool"), document(api, "Pool", "globex")
    for name in (theirs.adapter_id, theirs.document_id, "no-such-alias", "base"):
        error = error_of(await ask(api, adapters=[mine.adapter_id, {"id": name, "weight": 0.5}]), 404)
        assert (error["param"], error["code"]) == ("adapters.1", "model_not_found") and name in error["message"]
    assert not api.engine.calls


async def test_a_deleted_member_makes_it_unusable(api: Api) -> None:
    pool, sauna = document(api, "Pool"), document(api, "Sauna")
    named = [pool.adapter_id, sauna.adapter_id]
    assert (await ask(api, adapters=named)).status_code == 200
    api.registry.delete_document(sauna.tenant_id, sauna.document_id)
    assert error_of(await ask(api, adapters=named), 404)["param"] == "adapters.1"
    assert (await ask(api, adapters=named[:1])).status_code == 200


async def test_too_many(api: Api) -> None:
    named = [document(api, f"Document {i}").adapter_id for i in range(5)]
    error = error_of(await ask(api, adapters=named), 400)
    assert error["param"] == "adapters" and "5 entries; 1 to 4 are allowed" in error["message"]
    error = error_of(await ask(api, adapters=named[:4]), 400)
    assert error["param"] == "adapters" and "8 + 8 + 8 + 8 = 32; at most 24" in error["message"]
    assert (await ask(api, adapters=named[:3])).status_code == 200
    error = error_of(await ask(api, compose=5), 400)
    assert error["param"] == "compose" and "1 to 4 is allowed" in error["message"]


@pytest.mark.parametrize(
    ("adapters", "param", "said"),
    [
        ([], "adapters", "at least 1"),
        ("POOL", "adapters", "list"),
        ([7], "adapters.0", "an ID, an alias, or an object"),
        ([""], "adapters.0", "at least 1"),
        ([{"weight": 1}], "adapters.0.id", "Missing"),
        ([{"id": "POOL", "weight": 0}], "adapters.0", "must not be 0"),
        ([{"id": "POOL", "weight": 10.5}], "adapters.0.weight", "less than or equal to 10"),
        ([{"id": "POOL", "weight": -11}], "adapters.0.weight", "greater than or equal to -10"),
        ([{"id": "POOL", "weight": "1"}], "adapters.0.weight", "number"),
        ([{"id": "POOL", "scale": 1}], "adapters.0.scale", "Unknown"),
        (["POOL", "POOL"], "adapters.1", "named already"),
        (["POOL", "DOCUMENT"], "adapters.1", "named already"),
        (["POOL", "COLLECTION"], "adapters.1", "is a collection"),
    ],
)
async def test_what_is_refused(api: Api, adapters: Any, param: str, said: str) -> None:
    pool = document(api, "Pool", collection="baths")
    found = api.registry.get_document(pool.tenant_id, pool.document_id)
    assert found is not None and found.collection_id is not None
    names = {"POOL": pool.adapter_id, "DOCUMENT": pool.document_id, "COLLECTION": found.collection_id}

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(one) for one in value]
        if isinstance(value, dict):
            return {key: named(one) for key, one in value.items()}
        return names.get(value, value) if isinstance(value, str) else value

    error = error_of(await ask(api, adapters=named(adapters)), 400)
    assert error["param"] == param and said in error["message"], error
    assert not api.engine.calls


async def test_fields_that_do_not_go_together(api: Api) -> None:
    pool = document(api, "Pool", collection="baths")
    for model in ("base", pool.adapter_id):
        assert error_of(await ask(api, model=model, adapters=[pool.adapter_id]), 400)["param"] == "adapters"
        assert error_of(await ask(api, model=model, compose=2), 400)["param"] == "compose"
        assert (await ask(api, model=model, compose=1)).status_code == 200
    assert error_of(await ask(api, adapters=[pool.adapter_id], compose=2), 400)["param"] == "compose"
    assert error_of(await ask(api, adapters=[pool.adapter_id], collection="baths"), 400)["param"] == "collection"


async def test_the_router_composes(api: Api) -> None:
    pool = document(api, "Pool", collection="baths")
    chosen = [
        {"adapter_id": f"adp_{i}", "document_id": f"doc_{i}", "score": 0.7 - i / 10, "weight": 1.0, "degraded": False}
        for i in range(2)
    ]
    api.router.decision = {
        "adapter_id": "adp_0", "document_id": "doc_0", "reason": "matched", "score": 0.7, "part": 0, "parts": 3,
        "adapters": chosen,
    }
    response = await ask(api, compose=2)
    assert api.router.calls[-1]["compose"] == 2
    assert api.engine.calls[-1][2].members == (("adp_0", 1.0), ("adp_1", 1.0))
    assert response.json()["imprint"]["adapters"] == [
        {name: one[name] for name in ("adapter_id", "document_id", "weight", "score")} for one in chosen
    ]
    assert "part" not in response.json()["imprint"] and response.headers["x-imprint-adapter"] == "adp_0,adp_1"
    found = api.registry.get_document(pool.tenant_id, pool.document_id)
    assert found is not None
    await ask(api, model=found.collection_id, compose=2)
    assert (api.router.calls[-1]["collection"], api.router.calls[-1]["compose"]) == (found.collection_id, 2)
    api.router.decision = {**api.router.decision, "adapters": chosen[:1]}
    response = await ask(api, compose=2)
    assert api.engine.calls[-1][2].members == () and "adapters" not in response.json()["imprint"]


async def test_the_api_document_has_both_ways_to_name_an_adapter(api: Api) -> None:
    async with api.client() as client:
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    text, weighted = schemas["WeightedAdapter"]["anyOf"]
    assert text["type"] == "string" and set(weighted["properties"]) == {"id", "weight"}
    assert {"adapters", "compose"} <= set(schemas["ChatRequest"]["properties"])


def test_a_composition_is_named_by_its_content() -> None:
    name = composition_id([("adp_1", 1.0), ("adp_2", 0.5)])
    assert name == composition_id([("adp_2", 0.5), ("adp_1", 1)])
    others = [[("adp_1", 0.5), ("adp_2", 1.0)], [("adp_1", 1.0)], [("adp_1", 1.0), ("adp_2", 0.5000001)]]
    assert len({name, *map(composition_id, others)}) == 4
