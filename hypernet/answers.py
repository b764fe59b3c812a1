"""Greedy answers of a base to prompts, several in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hypernet.padding import batches, pad_left

BATCH_TOKENS = 8192
"""Padded tokens in one pass, at most, unless a single row has more."""


def _never() -> bool:
    return False


class _Cancelled(StoppingCriteria):
    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object) -> torch.BoolTensor:
        return torch.full((input_ids.size(0),), self._cancelled(), device=input_ids.device)  # type: ignore[return-value]


def end_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end the base's turn: its generation configuration's and its tokenizer's."""
    named = getattr(base.generation_config, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return sorted({int(token) for token in (*found, tokenizer.eos_token_id) if token is not None})


@torch.no_grad()
def answer_together(base: PreTrainedModel, prompts: Sequence[list[int]], ends: Sequence[int], most: int,
                    watching: Iterable[LogitsProcessor] = (),
                    cancelled: Callable[[], bool] = _never) -> list[list[int]]:
    """The greedy answer to each prompt, all in one pass: at most `most` tokens, with its end token where it has one.

    `watching` see each step's scores `[B, V]`, rows in the order of the prompts. Answers are cut short once `cancelled`
    says so. The base's own sampling settings and penalties do not apply.
    """
    ids, mask = pad_left(prompts, base.device)
    # What is not set here comes from the base's own generation configuration.
    settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=most, min_new_tokens=0, use_cache=True,
                                repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=0,
                                eos_token_id=list(ends) or None)
    output = base.generate(input_ids=ids, attention_mask=mask, generation_config=settings,
                           logits_processor=LogitsProcessorList(watching),
                           stopping_criteria=StoppingCriteriaList([_Cancelled(cancelled)]))
    answers = []
    for answer in output[:, ids.size(1):].tolist():
        length = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
        answers.append(answer[:length])
    return answers


def answer_greedily(base: PreTrainedModel, prompts: Sequence[list[int]], ends: Sequence[int], most: int,
                    batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """As `answer_together`, in as many passes as prompts with answers of at most `batch_tokens` padded tokens take."""
    found: dict[int, list[int]] = {}
    for group in batches([len(prompt) + most for prompt in prompts], batch_tokens):
        found.update(zip(group, answer_together(base, [prompts[i] for i in group], ends, most), strict=True))
    return [found[i] for i in range(len(prompts))]
