"""What the base says with a document in context, as targets for the same base without it.

Context distillation (Askell et al. 2021, arXiv 2112.00861; Snell et al. 2022, arXiv 2209.15189) with the top-k targets
of Doc-to-LoRA (arXiv 2602.15902): the base answers each question greedily with its document in the prompt, and the k
most probable tokens at every place of that answer are what the adapted base has to predict closed book. A small base
misreads its document or says that it does not know; where the text's own answer is known and the base's lacks it, the
text's own is taught. Shapes: Q questions, P prompt tokens, A answer tokens, k targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hypernet.evaluation.scoring import contains_value
from hypernet.prompts import answer_ids, closed_book, in_context

BATCH_TOKENS = 8192
"""Padded tokens in one pass, at most, unless a single row has more."""


@dataclass(frozen=True)
class Exercise:
    """A question, and the text that answers it. `answer`: the value that stands there, where that is known."""

    context: str
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Targets:
    """The answers to predict closed book, all on the base's device.

    `ids`, `mask` `[Q, P + A]` int64: closed-book prompts padded on the left, then answers padded on the right, so that
    every answer begins at the same place. `answers` `[Q, A]` int64 and `taught` `[Q, A]` bool, true on tokens.
    `top` `[Q, A, k]` int64 and `probabilities` `[Q, A, k]` float32, which add up to 1 over k.
    """

    ids: Tensor
    mask: Tensor
    answers: Tensor
    taught: Tensor
    top: Tensor
    probabilities: Tensor

    @property
    def tokens(self) -> int:
        """How many answer tokens there are to predict."""
        return int(self.taught.sum())

    def rows(self, part: slice) -> Targets:
        """The targets of some of the questions."""
        return Targets(self.ids[part], self.mask[part], self.answers[part], self.taught[part], self.top[part],
                       self.probabilities[part])


class _TopTokens(LogitsProcessor):
    """Notes the k most probable next tokens of each step of a greedy generation; changes nothing."""

    def __init__(self, k: int) -> None:
        self._k = k
        self.top: list[Tensor] = []
        self.probabilities: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        best = scores.float().topk(min(self._k, scores.size(-1)), dim=-1)
        self.top.append(best.indices)
        self.probabilities.append(best.values.softmax(-1))
        return scores


class _Cancelled(StoppingCriteria):
    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object) -> torch.BoolTensor:
        return torch.full((input_ids.size(0),), self._cancelled(), device=input_ids.device)  # type: ignore[return-value]


def pad_left(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask `[Q, T]` int64, padded on the left with 0 and masked with 0 there."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def end_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end the base's turn: its generation configuration's and its tokenizer's."""
    named = getattr(base.generation_config, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return sorted({int(token) for token in (*found, tokenizer.eos_token_id) if token is not None})


def batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices in groups of like length, so that padded to its longest each has at most `limit` tokens, or one row."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.no_grad()
def answer_greedily(base: PreTrainedModel, prompts: Sequence[list[int]], ends: Sequence[int], most: int, k: int = 1,
                    cancelled: Callable[[], bool] = lambda: False) -> list[tuple[list[int], Tensor, Tensor]]:
    """For each prompt the greedy answer (at most `most` tokens, with its end token where it has one), and the `k` most
    probable tokens at each of its places with their probabilities among themselves: `[A, k]` int64 and float32.

    Answers are cut short once `cancelled` says so. The base's own sampling settings and penalties do not apply.
    """
    found: dict[int, tuple[list[int], Tensor, Tensor]] = {}
    for group in batches([len(prompt) + most for prompt in prompts]):
        ids, mask = pad_left([prompts[i] for i in group], base.device)
        notes = _TopTokens(k)
        # What is not set here comes from the base's own generation configuration.
        settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=most, min_new_tokens=0, use_cache=True,
                                    repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=0,
                                    eos_token_id=list(ends) or None)
        output = base.generate(input_ids=ids, attention_mask=mask, generation_config=settings,
                               logits_processor=LogitsProcessorList([notes]),
                               stopping_criteria=StoppingCriteriaList([_Cancelled(cancelled)]))
        top, probabilities = torch.stack(notes.top, 1), torch.stack(notes.probabilities, 1)
        for row, i in enumerate(group):
            answer = output[row, ids.size(1):].tolist()
            length = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
            found[i] = (answer[:length], top[row, :length], probabilities[row, :length])
    return [found[i] for i in range(len(prompts))]


def _certain(answer: list[int], like: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """An answer as `answer_greedily` gives them, of which every token is certain; k and the device are those of `like`
    `[*, k]`."""
    top = torch.zeros((len(answer), like.size(1)), dtype=torch.long, device=like.device)
    top[:, 0] = torch.tensor(answer)
    probabilities = torch.zeros(top.shape, device=like.device)
    probabilities[:, 0] = 1.0
    return answer, top, probabilities


def teach(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, exercises: Sequence[Exercise], k: int,
          answer_tokens: int, cancelled: Callable[[], bool] = lambda: False) -> Targets:
    """The base's answers to `exercises` with their contexts in the prompt, or the text's own where those lack them, as
    closed-book targets.

    Raises ValueError without exercises or where the tokenizer has no chat template.
    """
    if not exercises:
        raise ValueError("questions: is empty; at least one is needed")
    answered = answer_greedily(base, [in_context(tokenizer, one.context, one.question) for one in exercises],
                               end_tokens(base, tokenizer), answer_tokens, k, cancelled)
    for i, one in enumerate(exercises):
        said = str(tokenizer.decode(answered[i][0], skip_special_tokens=True))
        if one.answer and not contains_value(said, one.answer):
            answered[i] = _certain(answer_ids(tokenizer, one.answer)[:answer_tokens], answered[i][1])
    prompts, prompt_mask = pad_left([closed_book(tokenizer, one.question) for one in exercises], base.device)
    size, longest = len(exercises), max(len(answer) for answer, _, _ in answered)
    width = answered[0][1].size(-1)
    answers = torch.zeros((size, longest), dtype=torch.long, device=base.device)
    taught = torch.zeros((size, longest), dtype=torch.bool, device=base.device)
    top = torch.zeros((size, longest, width), dtype=torch.long, device=base.device)
    probabilities = torch.zeros((size, longest, width), device=base.device)
    for i, (answer, best, chances) in enumerate(answered):
        answers[i, :len(answer)] = torch.tensor(answer, device=base.device)
        taught[i, :len(answer)] = True
        top[i, :len(answer)], probabilities[i, :len(answer)] = best, chances
    return Targets(torch.cat([prompts, answers], 1), torch.cat([prompt_mask, taught.long()], 1), answers, taught, top,
                   probabilities)


def predict(model: torch.nn.Module, targets: Targets) -> Tensor:
    """The model's logits `[Q, A, V]` at the places where the answers' tokens are due."""
    positions = (targets.mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=targets.ids, attention_mask=targets.mask, position_ids=positions, use_cache=False,
                   logits_to_keep=targets.answers.size(1) + 1)
    logits: Tensor = output.logits[:, :-1]
    return logits


def divergence(logits: Tensor, targets: Targets) -> tuple[Tensor, int]:
    """KL from the teacher's k tokens to the student, summed over the answers' tokens (float32 scalar), and at how many
    of them the student's most probable token is the teacher's."""
    logits = logits[targets.taught].float()
    chances = targets.probabilities[targets.taught]
    found = F.log_softmax(logits, -1).gather(-1, targets.top[targets.taught])
    right = int((logits.argmax(-1) == targets.answers[targets.taught]).sum())
    return F.kl_div(found, chances, reduction="sum"), right
