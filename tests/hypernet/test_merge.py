"""Merging past the rank cap, against a dense SVD of the summed update by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hypernet.lora import AdapterInvalid, LoraAdapter, concatenate
from hypernet.merge import merge, truncate
from tests.hypernet.helpers import HIDDEN, deltas, random_lora


@pytest.mark.parametrize("rank", [1, 5, 16, 31])
def test_the_merged_adapter_is_the_nearest_one(rank: int) -> None:
    adapters = [random_lora(seed) for seed in range(8)]
    merged, share = merge(adapters, rank)
    assert merged.rank == rank
    kept, whole = 0.0, 0.0
    summed = [deltas(adapter) for adapter in adapters]
    for path, update in deltas(merged).items():
        dense = np.sum([one[path].double().numpy() for one in summed], axis=0)
        u, values, vh = np.linalg.svd(dense)
        best = (u[:, :rank] * values[:rank]) @ vh[:rank]
        assert np.allclose(update.numpy(), best, atol=1e-4)
        kept, whole = kept + float(np.square(values[:rank]).sum()), whole + float(np.square(values).sum())
    assert share == pytest.approx((kept / whole) ** 0.5, abs=1e-5) and share < 1


def test_the_share_is_what_the_merged_update_has() -> None:
    adapters = [random_lora(seed) for seed in range(5)]
    merged, share = merge(adapters, 7)

    def norm(lora: LoraAdapter) -> float:
        return sum(float(update.square().sum()) for update in deltas(lora).values()) ** 0.5
    assert share == pytest.approx(norm(merged) / norm(concatenate(adapters)), abs=1e-5)


def test_within_the_rank_nothing_changes() -> None:
    adapter = random_lora(1)
    same, share = truncate(adapter, 4)
    assert same is adapter and share == 1


def test_redundant_adapters_merge_without_loss() -> None:
    adapter = random_lora(1)
    merged, share = merge([adapter] * 6, 4)
    assert share == pytest.approx(1)
    for path, update in deltas(merged).items():
        assert torch.allclose(update, 6 * deltas(adapter)[path], atol=1e-4)


def test_a_sum_above_the_width_of_a_module_is_whole() -> None:
    """20 x 4 ranks of a 64-wide module: the sum has 64 at most, and no factor is larger than asked for."""
    adapters = [random_lora(seed) for seed in range(20)]
    merged, share = merge(adapters, HIDDEN + 6)
    assert share == pytest.approx(1)
    for path, update in deltas(merged).items():
        assert merged.tensors[path][0].size(0) == merged.tensors[path][1].size(1) == HIDDEN + 6
        assert torch.allclose(update, torch.stack([deltas(one)[path] for one in adapters]).sum(0), atol=1e-3)


def test_zeros_stay_zeros() -> None:
    adapter = random_lora(1, strength=0.0)
    merged, share = merge([adapter, adapter], 4)
    assert share == 1 and all(not update.any() for update in deltas(merged).values())


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    adapter = random_lora(1)
    adapter.tensors["model.layers.1.self_attn.q_proj"][0][0, 0] = float("nan")
    with pytest.raises(AdapterInvalid, match="model.layers.1.self_attn.q_proj: .* not finite"):
        merge([adapter, random_lora(2)], 4)


def test_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank: is 0; at least 1"):
        merge([random_lora(1)], 0)
