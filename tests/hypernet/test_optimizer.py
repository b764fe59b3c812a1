"""The optimisers of training."""

from __future__ import annotations

import pytest
import torch

from hypernet.training.optimizer import Muon, Optimiser, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (3, 24, 12)])
def test_orthogonalise(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    found = orthogonalise(matrix)
    assert found.shape == matrix.shape
    # Five steps of this polynomial bring most singular values near one; it is not meant to converge further.
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3 and values.median() > 0.6 and (values > 0.5).float().mean() > 0.85
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_orthogonalise_does_not_depend_on_scale() -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(orthogonalise(matrix), orthogonalise(matrix * 1000), atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (2, 5, 5)])
def test_muon_reduces_a_quadratic(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(shape, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(shape))
    muon = Muon([weight], lr=0.1)
    losses = []
    for step in range(200):
        for group in muon.param_groups:
            group["lr"] = 0.1 * (1 - step / 200)
        muon.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        muon.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]


def test_muon_leaves_parameters_without_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    Muon([weight]).step()
    assert torch.equal(weight, torch.ones(3, 3))


def make_optimiser() -> tuple[torch.nn.Parameter, torch.nn.Parameter, Optimiser]:
    matrix, bias = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    return matrix, bias, Optimiser([matrix], [bias], muon_lr=0.02, adam_lr=0.001)


def test_schedule() -> None:
    *parameters, optimiser = make_optimiser()

    def rates(progress: float) -> list[float]:
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimiser.step(progress)
        return [part.param_groups[0]["lr"] for part in optimiser.parts]

    full = rates(0.3)
    assert full == [0.02, 0.001]
    assert rates(0.0) == pytest.approx([rate * 0.01 for rate in full])
    assert rates(0.7) == pytest.approx([rate * 0.5 for rate in full])
    assert rates(1.0) == pytest.approx([rate * 0.05 for rate in full])
    assert all(p.grad is None for p in parameters)


def test_gradients_are_clipped_and_the_norm_is_before_clipping() -> None:
    matrix, bias, optimiser = make_optimiser()
    matrix.grad, bias.grad = torch.full((4, 4), 100.0), torch.zeros(4)
    assert optimiser.step(0.5) == pytest.approx(400.0)


def test_state_goes_on_where_it_stood() -> None:
    def train(steps: int, states: tuple[list[dict], list[torch.Tensor]] | None = None) -> tuple[list, list]:
        *parameters, optimiser = make_optimiser()
        if states:
            optimiser.load_state_dict(states[0])
            with torch.no_grad():
                for p, saved in zip(parameters, states[1], strict=True):
                    p.copy_(saved)
        for _ in range(steps):
            sum((p - 0.1 * torch.arange(p.numel()).view_as(p)).square().sum() for p in parameters).backward()
            optimiser.step(0.5)
        return optimiser.state_dict(), [p.detach() for p in parameters]

    straight, halves = train(8)[1], train(4, train(4))[1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(straight, halves, strict=True))
