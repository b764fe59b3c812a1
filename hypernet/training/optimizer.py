"""Muon for weight matrices, AdamW for the rest, one learning-rate schedule.

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of each matrix by a
Newton-Schulz iteration. torch's own class always iterates in bfloat16, which a CPU without bf16 instructions does 60
times slower than float32; this one takes the faster of the two.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hypernet.training.precision import bfloat16_is_faster


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly; `matrix` is `[..., rows, columns]`, floating point."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov, Newton-Schulz; parameters of two or more dimensions, leading ones batched."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(buffer, group["momentum"])
                update = orthogonalise(direction.bfloat16() if bfloat16_is_faster() else direction).to(p.dtype)
                scale = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
                p.add_(update, alpha=-group["lr"] * scale)


class Optimiser:
    """Both optimisers under a schedule: linear warm-up, constant, linear decay to a twentieth.

    `progress` runs from 0 to 1 over the whole training; the decay takes the last `decay` share of it.
    """

    def __init__(self, matrices: list[Tensor], others: list[Tensor], muon_lr: float, adam_lr: float,
                 warmup: float = 0.02, decay: float = 0.6) -> None:
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=muon_lr), torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]
        self.rates = (muon_lr, adam_lr)
        self.warmup, self.decay = warmup, decay
        self.parameters = matrices + others

    def step(self, progress: float) -> float:
        """Clip, update, clear the gradients; the gradient's norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1.0, progress / self.warmup + 0.01, max(0.05, (1 - progress) / self.decay))
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> list[dict]:
        """The states of both optimisers."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
