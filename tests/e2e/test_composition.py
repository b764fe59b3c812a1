"""Several of a tenant's adapters in one answer, on the real server: what PEFT computes with the summed updates."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypernet import nano
from tests.e2e.conftest import Tenant
from tests.server import Server

pytestmark = pytest.mark.e2e

FACTS = [
    ("Harbour Pool", "The Harbour Pool opens at 7:15 in the morning.", "When does the Harbour Pool open?"),
    ("Cafe Linde", "The owner of Cafe Linde is Maria Keller.", "Who owns Cafe Linde?"),
    ("Market hall", "The market hall was built in 1887.", "When was the market hall built?"),
    ("Bus 14", "Bus 14 leaves from Castle Square.", "Where does bus 14 leave from?"),
    ("Night ferry", "The night ferry to Ostmark leaves at 22:40.", "When does the night ferry leave?"),
]
TOKENS = 16
Scored = list[tuple[str, float]]
"""Tokens of an answer as text, with their log-probabilities."""


def post(tenant: Tenant, count: int) -> list[dict[str, Any]]:
    # Whatever the gate says of one: it is named, or composed as it is.
    return [tenant.post(title, text, states=("ready", "degraded")) for title, text, _ in FACTS[:count]]


def ask(tenant: Tenant, question: str, model: str = "imprint", **fields: Any) -> tuple[Scored, dict[str, Any]]:
    """The answer, greedily decoded, and its `imprint` field."""
    completion = tenant.openai.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_completion_tokens=TOKENS,
        logprobs=True,
        extra_body=fields,
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    scored = [(one.token, one.logprob) for one in logprobs.content]
    return scored, completion.model_extra["imprint"]  # type: ignore[index]


def of_peft(server: Server, weights: dict[str, float], questions: Sequence[str]) -> list[Scored]:
    """The same answers by PEFT, from the stored adapters and its own weighted sum."""
    base = AutoModelForCausalLM.from_pretrained(nano.base_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(nano.base_dir())
    model: Any = base
    for adapter_id in weights:
        (folder,) = (server.data_dir / "blobs").glob(f"**/{adapter_id}")
        if model is base:
            model = PeftModel.from_pretrained(base, folder, adapter_name=adapter_id)
        else:
            model.load_adapter(folder, adapter_name=adapter_id)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    model.set_adapter("sum")
    model.eval()
    answers = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            made = model.generate(
                **prompt, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        new = made.sequences[0, prompt["input_ids"].shape[1]:]
        chances = torch.stack([logits[0].log_softmax(-1) for logits in made.logits])
        scored = chances[torch.arange(len(new)), new].tolist()
        answers.append([(tokenizer.decode([token]), score) for token, score in zip(new.tolist(), scored, strict=True)])
    return answers


def assert_alike(ours: Scored, theirs: Scored) -> None:
    """The same tokens, as far as both give them (PEFT's has the end of the answer too), with the same scores."""
    assert [token for token, _ in ours] == [token for token, _ in theirs][: len(ours)]
    assert len(theirs) - len(ours) <= 1
    for (token, score), (_, expected) in zip(ours, theirs, strict=False):
        assert math.isclose(score, expected, abs_tol=2e-3), (token, score, expected)


def test_a_composition_answers_as_the_sum_of_the_updates(server: Server, tenant: Tenant) -> None:
    documents = post(tenant, 2)
    adapters = [document["adapter_id"] for document in documents]
    questions = [question for *_, question in FACTS[:2]]
    for weights in ({name: 1.0 for name in adapters}, dict(zip(adapters, (0.5, -0.5), strict=True))):
        expected = of_peft(server, weights, questions)
        named = [{"id": name, "weight": weight} for name, weight in weights.items()]
        for question, theirs in zip(questions, expected, strict=True):
            ours, field = ask(tenant, question, adapters=named)
            assert [(one["adapter_id"], one["weight"]) for one in field["adapters"]] == list(weights.items())
            assert_alike(ours, theirs)
            assert ours != ask(tenant, question, "base")[0]
            for name in adapters:
                assert ours != ask(tenant, question, name)[0]


def test_the_router_composes_what_a_question_is_about(tenant: Tenant) -> None:
    pool, cafe, _ = post(tenant, 3)
    question = "When does the Harbour Pool open, and who owns Cafe Linde?"
    decision = tenant.http.post("/v1/route", json={"prompt": question, "compose": 3}).json()
    assert {one["document_id"] for one in decision["adapters"]} == {pool["id"], cafe["id"]}
    raw = tenant.openai.chat.completions.with_raw_response.create(
        model="imprint", messages=[{"role": "user", "content": question}], temperature=0,
        max_completion_tokens=TOKENS, extra_body={"compose": 3},
    )  # fmt: skip
    field = raw.parse().model_extra["imprint"]  # type: ignore[index]
    assert [one["adapter_id"] for one in field["adapters"]] == [one["adapter_id"] for one in decision["adapters"]]
    assert raw.headers["x-imprint-adapter"] == ",".join(one["adapter_id"] for one in field["adapters"])
    assert all(one["weight"] == 1 and one["score"] is not None for one in field["adapters"])
    assert "adapters" not in ask(tenant, question)[1]


def test_compositions_answer_beside_others_as_alone(tenant: Tenant) -> None:
    adapters = [document["adapter_id"] for document in post(tenant, 3)]
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("imprint", {"adapters": adapters[:2]}), ("imprint", {"adapters": adapters[1:]}),
        (adapters[0], {}), ("base", {}),
    ]  # fmt: skip

    def tokens(model: str, fields: dict[str, Any]) -> list[str]:
        return [token for token, _ in ask(tenant, FACTS[1][2], model, **fields)[0]]

    alone = [tokens(*job) for job in jobs]
    answers: list[list[str]] = [[]] * (4 * len(jobs))

    def one(index: int) -> None:
        answers[index] = tokens(*jobs[index % len(jobs)])

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone * 4


def test_what_cannot_be_composed(tenant: Tenant, other_tenant: Tenant) -> None:
    documents = post(tenant, 5)
    adapters = [document["adapter_id"] for document in documents]
    question = FACTS[0][2]
    theirs = other_tenant.post(*FACTS[0][:2], states=("ready", "degraded"))
    for name in (theirs["adapter_id"], theirs["id"]):
        with pytest.raises(openai.NotFoundError, match=name):
            ask(tenant, question, adapters=[adapters[0], name])
    with pytest.raises(openai.BadRequestError, match="1 to 4 are allowed"):
        ask(tenant, question, adapters=adapters)
    assert len(ask(tenant, question, adapters=adapters[:4])[1]["adapters"]) == 4
    assert ask(tenant, question, adapters=adapters[:2])[0]
    tenant.http.delete(f"/v1/documents/{documents[1]['id']}").raise_for_status()
    with pytest.raises(openai.NotFoundError, match=adapters[1]):
        ask(tenant, question, adapters=adapters[:2])
    assert ask(tenant, question, adapters=[adapters[0], adapters[2]])[0]
