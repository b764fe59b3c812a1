"""The hypernetwork: files, shapes, and documents that do not see each other in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from hypernet.encoder import load_base, read, stack_activations
from hypernet.perceiver import HypernetConfig, Hypernetwork, Target
from tests.hypernet.helpers import HIDDEN, LAYERS

CONFIG = HypernetConfig(features=24, layers=3, targets=(Target("down_proj", 20, 12), Target("q_proj", 12, 16)), rank=5,
                        width=32, heads=4, max_tokens=40, chunk_tokens=20, base_fingerprint="ab" * 32)


@pytest.fixture(scope="module")
def network() -> Hypernetwork:
    torch.manual_seed(1)
    return Hypernetwork(CONFIG).eval()


def documents(lengths: list[int], width: int = 0, noise: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random activations, the same for a place in the list however wide the batch; `noise` fills the padding."""
    length = max(width, *lengths)
    generator = torch.Generator().manual_seed(100 + noise)
    activations = torch.randn(len(lengths), length, CONFIG.features, generator=generator) * 10
    mask = torch.zeros(len(lengths), length, dtype=torch.bool)
    for i, n in enumerate(lengths):
        activations[i, :n] = torch.randn(n, CONFIG.features, generator=torch.Generator().manual_seed(i))
        mask[i, :n] = True
    return activations, mask


@torch.no_grad()
def test_shapes(network: Hypernetwork) -> None:
    factors = network(*documents([7, 40]))
    assert list(factors) == ["down_proj", "q_proj"]
    assert [tuple(t.shape) for t in factors["down_proj"]] == [(2, 3, 5, 20), (2, 3, 5, 12)]
    assert [tuple(t.shape) for t in factors["q_proj"]] == [(2, 3, 5, 12), (2, 3, 5, 16)]
    assert all(torch.isfinite(t).all() for pair in factors.values() for t in pair)


@torch.no_grad()
def test_save_and_load(network: Hypernetwork, tmp_path: Path) -> None:
    network.save(tmp_path / "new" / "folder")
    again = Hypernetwork.load(tmp_path / "new" / "folder")
    assert again.config == CONFIG and not again.training
    batch = documents([9, 4])
    for name, pair in network(*batch).items():
        assert all(torch.equal(x, y) for x, y in zip(pair, again(*batch)[name], strict=True))


def test_other_shape_is_refused(network: Hypernetwork, tmp_path: Path) -> None:
    network.save(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"width": 32', '"width": 64'))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Hypernetwork.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Hypernetwork.load(tmp_path / "nowhere")


@torch.no_grad()
def test_neighbours_and_padding_do_not_matter(network: Hypernetwork) -> None:
    lengths = [6, 31, 17]
    whole = network(*documents(lengths))
    for width, noise in ((0, 1), (40, 2)):
        padded = network(*documents(lengths, width, noise))
        for name, pair in whole.items():
            assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(pair, padded[name], strict=True))
    activations, mask = documents(lengths)
    for i, n in enumerate(lengths):
        alone = network(activations[i:i + 1, :n], mask[i:i + 1, :n])
        for name, pair in whole.items():
            assert all(torch.allclose(x[i], y[0], atol=1e-5) for x, y in zip(pair, alone[name], strict=True))


@torch.no_grad()
def test_the_adapter_depends_on_the_document_and_its_order(network: Hypernetwork) -> None:
    activations, mask = documents([12])
    first, other = network(activations, mask), network(activations.flip(1), mask)
    assert (first["down_proj"][0] - other["down_proj"][0]).abs().max() > 1e-3


def test_activations_of_every_layer(pair: tuple[Path, Path], llama: LlamaForCausalLM) -> None:
    base, tokenizer = load_base(pair[0])
    assert not base.training and not any(p.requires_grad for p in base.parameters())
    ids = torch.tensor([tokenizer.encode("The lamp costs $4.20.")])
    found = read(base, ids, torch.ones_like(ids, dtype=torch.bool))
    assert found.shape == (1, ids.size(1), (LAYERS + 1) * HIDDEN)
    states = llama.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.allclose(found, stack_activations(states), atol=1e-5)
    each = found.unflatten(-1, (LAYERS + 1, HIDDEN))
    assert each.mean(-1).abs().max() < 1e-4 and (each.var(-1, correction=0) - 1).abs().max() < 1e-2


@torch.no_grad()
def test_reading_does_not_depend_on_padding(pair: tuple[Path, Path]) -> None:
    base, tokenizer = load_base(pair[0])
    ids = torch.tensor([tokenizer.encode("The lamp costs $4.20.")])
    wide = torch.cat([ids, torch.full((1, 5), 9)], dim=1)
    mask = torch.arange(wide.size(1))[None] < ids.size(1)
    alone, padded = read(base, ids, torch.ones_like(ids, dtype=torch.bool)), read(base, wide, mask)
    assert torch.allclose(alone, padded[:, :ids.size(1)], atol=1e-5)
