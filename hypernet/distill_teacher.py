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
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast

from hypernet.answers import BATCH_TOKENS, answer_together, end_tokens
from hypernet.evaluation.scoring import contains_value
from hypernet.padding import batches, pad_left
from hypernet.prompts import answer_ids, closed_book, in_context


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


def answer_with_likeliest(base: PreTrainedModel, prompts: Sequence[list[int]], ends: Sequence[int], most: int, k: int,
                          cancelled: Callable[[], bool] = lambda: False) -> list[tuple[list[int], Tensor, Tensor]]:
    """For each prompt the greedy answer, as `hypernet.answers` gives it, and the `k` most probable tokens at each of
    its places with their probabilities among themselves: `[A, k]` int64 and float32."""
    found: dict[int, tuple[list[int], Tensor, Tensor]] = {}
    for group in batches([len(prompt) + most for prompt in prompts], BATCH_TOKENS):
        notes = _TopTokens(k)
        answers = answer_together(base, [prompts[i] for i in group], ends, most, [notes], cancelled)
        top, probabilities = torch.stack(notes.top, 1), torch.stack(notes.probabilities, 1)
        for row, (i, answer) in enumerate(zip(group, answers, strict=True)):
            found[i] = answer, top[row, :len(answer)], probabilities[row, :len(answer)]
    return [found[i] for i in range(len(prompts))]


def _certain(answer: list[int], like: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """An answer as `answer_with_likeliest` gives them, of which every token is certain; k and the device are those of
    `like` `[*, k]`."""
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
    answered = answer_with_likeliest(base, [in_context(tokenizer, one.context, one.question) for one in exercises],
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
    of them the student's most probable token is the teacher's.

    Not one with `hypernet.adaptation.losses.top_k_divergence`: that has the teacher's logits over the whole vocabulary,
    while here only the k are kept, whose probabilities are made to add up to 1.
    """
    logits = logits[targets.taught].float()
    chances = targets.probabilities[targets.taught]
    found = F.log_softmax(logits, -1).gather(-1, targets.top[targets.taught])
    right = int((logits.argmax(-1) == targets.answers[targets.taught]).sum())
    return F.kl_div(found, chances, reduction="sum"), right
