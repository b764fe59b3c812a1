"""The loss of Doc-to-LoRA (arXiv 2602.15902): distillation from the base with the document, and small factors."""

from __future__ import annotations

import torch
from torch import Tensor

from hypernet.perceiver import Factors


def top_k_divergence(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Sum over N tokens of KL(teacher || student), on the teacher's `k` likeliest tokens each; logits `[N, V]`.

    Probabilities are normalised over the whole vocabulary, and what lies beyond the k is left out.
    """
    k = min(k, teacher.size(-1))
    wanted, tokens = teacher.log_softmax(-1).topk(k, dim=-1)
    found = student.log_softmax(-1).gather(-1, tokens)
    return (wanted.exp() * (wanted - found)).sum()


def factor_size(factors: Factors) -> Tensor:
    """mean|A| + mean|B|, averaged over the target modules: the L1 term, a scalar."""
    sizes = [a.abs().mean() + b.abs().mean() for a, b in factors.values()]
    return torch.stack(sizes).mean()
