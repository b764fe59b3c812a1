"""Greedy answers: the same in any batch, ended and cut as asked, whatever the base's own settings."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet import answers
from hypernet.answers import answer_greedily, answer_together, end_tokens
from hypernet.prompts import closed_book

QUESTIONS = ("What is the opening time of Harbour Pool?", "Who?", "What is the code of the locker in the second room?")


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [closed_book(tokenizer, question) for question in QUESTIONS]


def test_each_prompt_is_answered_as_alone(llama: LlamaForCausalLM, prompts: list[list[int]],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [answer_together(llama, [prompt], [], 6)[0] for prompt in prompts]
    assert answer_together(llama, prompts, [], 6) == alone
    sizes: list[int] = []

    def count(base, prompts, *rest):  # type: ignore[no-untyped-def]
        sizes.append(len(prompts))
        return answer_together(base, prompts, *rest)

    monkeypatch.setattr(answers, "answer_together", count)
    assert answer_greedily(llama, prompts, [], 6) == alone
    assert answer_greedily(llama, prompts, [], 6, batch_tokens=1) == alone
    assert sizes == [3, 1, 1, 1]
    assert answer_greedily(llama, [], [], 6) == []


def test_an_answer_ends_with_its_end_token(llama: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    whole = answer_together(llama, prompts, [], 6)
    end = whole[0][2]
    cut = answer_together(llama, prompts, [end], 6)
    assert cut == [row[:row.index(end) + 1] if end in row else row for row in whole]
    assert len(cut[0]) <= 3


def test_cancelled_answers_are_short(llama: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    assert [len(answer) for answer in answer_together(llama, prompts, [], 6, cancelled=lambda: True)] == [1, 1, 1]


def test_penalties_of_the_base_do_not_apply(llama: LlamaForCausalLM, prompts: list[list[int]],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    (plain,) = answer_greedily(llama, prompts[:1], [], 12)
    own = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=3, do_sample=True)
    monkeypatch.setattr(llama, "generation_config", own)
    assert len(set(prompts[0] + plain)) < len(prompts[0] + plain)
    assert answer_greedily(llama, prompts[:1], [], 12) == [plain]


def test_end_tokens_are_those_of_model_and_tokenizer(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizer.eos_token_id in end_tokens(llama, tokenizer)
    for named, expected in (([7, 5], {5, 7}), (9, {9}), (None, set())):
        monkeypatch.setattr(llama, "generation_config", GenerationConfig(eos_token_id=named))
        assert end_tokens(llama, tokenizer) == sorted(expected | {tokenizer.eos_token_id})
