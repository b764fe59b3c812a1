"""The hypernetwork: a document's activations in, LoRA A and B for every target module out, in one pass.

After Doc-to-LoRA (arXiv 2602.15902) and Perceiver (arXiv 2103.03206), in a small form: activations are projected to
`width`, read by bidirectional self-attention blocks, and cross-attended by one learned latent for each (layer, rank).
A linear head for each layer and module turns a latent into one row of A and one column of B.

Shapes: B documents, T tokens, L layers, r rank, W width, F features of the base's activations.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Target:
    """A module of each layer that gets a LoRA: its name inside the layer, and its input and output widths."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class HypernetConfig:
    """The shape of a hypernetwork. `chunk_tokens` is how many tokens it reads best at once, `max_tokens` at most;
    `chunks_per_part` is how many chunks' adapters it is best to join in one, None: as many as the rank cap allows."""

    features: int
    layers: int
    targets: tuple[Target, ...]
    rank: int = 16
    width: int = 256
    heads: int = 4
    reader_blocks: int = 2
    perceiver_blocks: int = 2
    max_tokens: int = 512
    chunk_tokens: int = 96
    chunks_per_part: int | None = None
    base_fingerprint: str = ""

    @staticmethod
    def read(path: Path) -> HypernetConfig:
        """From a JSON file."""
        fields = json.loads(path.read_text())
        fields["targets"] = tuple(Target(**target) for target in fields["targets"])
        return HypernetConfig(**fields)

    def write(self, path: Path) -> None:
        """To a JSON file."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


class Attention(nn.Module):
    """Multi-head attention from `x` `[B, Q, W]` to `context` `[B, K, W]`, keys hidden where `bias` is -inf."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        """`bias` is `[B, 1, 1, K]`."""
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        # Plain matmul and softmax: on a CPU faster at these sizes than the fused kernel.
        weights = ((q @ k.mT) / math.sqrt(q.size(-1)) + bias).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm attention and a GELU feed-forward of twice the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_x, self.norm_context, self.norm_mlp = (nn.RMSNorm(width) for _ in range(3))
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, context: Tensor | None, bias: Tensor, self_bias: Tensor | None = None) -> Tensor:
        """`context=None`: self-attention; else attention to `context` and `x` together."""
        own = self.norm_x(x)
        if context is None:
            x = x + self.attention(own, own, bias)
        else:
            both = torch.cat([self.norm_context(context), own], dim=1)
            x = x + self.attention(own, both, torch.cat([bias, bias.new_zeros(*bias.shape[:-1], x.size(1))], dim=-1))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Heads(nn.Module):
    """For one target module: latents `[B, L, r, W]` to A `[B, L, r, d_in]` and B `[B, L, r, d_out]`."""

    def __init__(self, config: HypernetConfig, target: Target) -> None:
        super().__init__()
        bound = 1 / math.sqrt(config.width)
        self.a = nn.Parameter(torch.randn(config.layers, config.width, target.d_in) * bound)
        self.b = nn.Parameter(torch.randn(config.layers, config.width, target.d_out) * bound)
        self.scale_a = nn.Parameter(torch.full((config.layers, config.rank, 1), target.d_in ** -0.5))
        self.scale_b = nn.Parameter(torch.full((config.layers, config.rank, 1), 0.05))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        a = torch.einsum("blrw,lwd->blrd", latents, self.a) * self.scale_a
        b = torch.einsum("blrw,lwd->blrd", latents, self.b) * self.scale_b
        return a, b


Factors = dict[str, tuple[Tensor, Tensor]]
"""Module name to A `[B, L, r, d_in]` and B `[B, L, r, d_out]`; the update of a weight is `B^T A` (alpha = r)."""


class Hypernetwork(nn.Module):
    """See the module."""

    def __init__(self, config: HypernetConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.features, config.width)
        self.positions = nn.Parameter(torch.randn(config.max_tokens, config.width) * 0.02)
        self.latents = nn.Parameter(torch.randn(config.layers * config.rank, config.width) * 0.5)
        self.reader = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.reader_blocks))
        self.perceiver = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.perceiver_blocks))
        self.norm = nn.RMSNorm(config.width)
        self.heads = nn.ModuleDict({target.name: Heads(config, target) for target in config.targets})

    def forward(self, activations: Tensor, mask: Tensor) -> Factors:
        """`activations` `[B, T, F]` float32, `mask` `[B, T]` bool, true on tokens; T at most `max_tokens`."""
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -1e9)[:, None, None, :].to(activations)
        x = self.project(activations) + self.positions[:activations.size(1)]
        for block in self.reader:
            x = block(x, None, bias)
        latents = self.latents.expand(x.size(0), -1, -1)
        for block in self.perceiver:
            latents = block(latents, x, bias)
        latents = self.norm(latents).unflatten(1, (self.config.layers, self.config.rank))
        return {name: head(latents) for name, head in self.heads.items()}

    def save(self, folder: Path) -> None:
        """Weights as safetensors and the shape as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        self.config.write(folder / "config.json")

    @staticmethod
    def load(folder: Path) -> Hypernetwork:
        """What `save` wrote, in evaluation mode. Raises FileNotFoundError, or RuntimeError where shapes differ."""
        model = Hypernetwork(HypernetConfig.read(folder / "config.json"))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


def concatenate_ranks(factors: Factors, chunks: int) -> Factors:
    """Adapters of `chunks` consecutive documents joined into one of `chunks * r` ranks: the sum of their updates."""
    def join(t: Tensor) -> Tensor:
        grouped = t.unflatten(0, (-1, chunks)).movedim(1, 2)  # [G, L, chunks, r, d]
        return grouped.flatten(2, 3)
    return {name: (join(a), join(b)) for name, (a, b) in factors.items()}
