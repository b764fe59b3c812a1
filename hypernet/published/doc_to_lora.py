"""The Doc-to-LoRA hypernetwork: the base's activations over a document in, LoRA factors out.

A perceiver reads the activations (of each layer for itself, with shared weights, or of one layer for all), and gives
one latent for each layer, module and rank. Residual blocks and a linear head turn a latent into one row of A and one
column of B. The names of the parts are the checkpoint's keys.

Shapes: B chunks, T tokens, L layers of the base, M modules, r rank, W width of a latent, D width of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernet.perceiver import Factors, Target
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.shapes import Tensors, count_children, dimensions, module_names

HEAD_WIDTH = 128
"""Width of an attention head in every published checkpoint; the keys tell only heads times width."""

_PERCEIVER = "aggregator.perceiver"


@dataclass(frozen=True)
class Blocks:
    """A resampler: how many latents, and for each block whether it attends to the context (else to the latents)."""

    latents: int
    crosses: tuple[bool, ...]


@dataclass(frozen=True)
class DocToLoraSizes:
    """Everything that the shapes of a checkpoint tell."""

    layers: int
    features: int
    targets: tuple[Target, ...]
    rank: int
    width: int
    projection: int
    heads: int
    key_heads: int
    encoder: Blocks
    decoder: Blocks
    residual_blocks: int
    per_layer_activations: bool
    per_layer_blocks: bool

    @staticmethod
    def of(tensors: Tensors) -> DocToLoraSizes:
        """Read from keys and shapes. Raises CheckpointInvalid where they fit no Doc-to-LoRA hypernetwork."""
        names = sorted(module_names(tensors, "bias_A", "a Doc-to-LoRA checkpoint has one tensor for each module"))
        layers, rank, _ = dimensions(tensors, f"bias_A.{names[0]}", 3)
        targets = tuple(Target(name, dimensions(tensors, f"bias_A.{name}", 3)[2],
                               dimensions(tensors, f"bias_B.{name}", 3)[2]) for name in names)
        projection, features = dimensions(tensors, f"{_PERCEIVER}.modality_projection.gate_proj.weight", 2)
        encoder, decoder = (_blocks(tensors, f"{_PERCEIVER}.{part}") for part in ("encoder", "decoder"))
        first = f"{_PERCEIVER}.encoder.layers.0.self_attn"
        queries, width = dimensions(tensors, f"{first}.q_proj.weight", 2)
        keys = dimensions(tensors, f"{first}.k_proj.weight", 2)[0]
        if queries % HEAD_WIDTH or keys % HEAD_WIDTH or queries % keys:
            raise CheckpointInvalid(f"{first}: has {queries} rows of queries and {keys} of keys; multiples of "
                                    f"{HEAD_WIDTH} are needed, the first a multiple of the second")
        each = len(names) * rank
        # With a base of one layer both kinds have the same shape, and do the same.
        if decoder.latents not in (each, each * layers):
            raise CheckpointInvalid(f"{_PERCEIVER}.decoder.latents_q: has {decoder.latents} rows; {each} (a layer's "
                                    f"modules times ranks) or {each * layers} (for all layers) are needed")
        return DocToLoraSizes(
            layers, features, targets, rank, width, projection, queries // HEAD_WIDTH, keys // HEAD_WIDTH, encoder,
            decoder, count_children(tensors, "layers"), decoder.latents == each,
            any(key.startswith("layers.0.layers.") for key in tensors))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> DocToLoraSizes:
        """What `to_json` gave. Raises KeyError or TypeError."""
        blocks = {part: Blocks(fields[part]["latents"], tuple(fields[part]["crosses"]))
                  for part in ("encoder", "decoder")}
        targets = tuple(Target(**target) for target in fields["targets"])
        return DocToLoraSizes(**{**fields, **blocks, "targets": targets})


def _blocks(tensors: Tensors, prefix: str) -> Blocks:
    latents = dimensions(tensors, f"{prefix}.latents_q", 2)[0]
    count = count_children(tensors, f"{prefix}.layers")
    if not count:
        raise CheckpointInvalid(f"{prefix}.layers: is missing; at least one block is needed")
    # Only a block that attends to the context normalises it.
    return Blocks(latents, tuple(f"{prefix}.layers.{i}.input_context_layernorm.weight" in tensors
                                 for i in range(count)))


class GatedMlp(nn.Module):
    """SiLU-gated feed-forward without biases."""

    def __init__(self, d_in: int, inner: int, d_out: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(d_in, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_in]` to `[..., d_out]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GroupedAttention(nn.Module):
    """Attention of `x` `[B, Q, W]` to `context` `[B, K, W]`; several query heads share a key head."""

    def __init__(self, sizes: DocToLoraSizes) -> None:
        super().__init__()
        queries, keys = sizes.heads * HEAD_WIDTH, sizes.key_heads * HEAD_WIDTH
        self.q_proj = nn.Linear(sizes.width, queries, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(sizes.width, keys, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(queries, sizes.width, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` `[B, K]` is true where a key may be seen."""
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
        seen = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(split(self.q_proj(x)), split(self.k_proj(context)),
                                               split(self.v_proj(context)), seen, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class ResamplerBlock(nn.Module):
    """Attention, then a feed-forward; each normalised before and after, and added."""

    def __init__(self, sizes: DocToLoraSizes, crosses: bool) -> None:
        super().__init__()
        self.crosses = crosses
        self.input_latents_layernorm, self.post_attention_layernorm, self.pre_ff_layernorm, self.post_ff_layernorm = (
            nn.RMSNorm(sizes.width, eps=1e-6) for _ in range(4))
        self.input_context_layernorm = nn.RMSNorm(sizes.width, eps=1e-6) if crosses else nn.Identity()
        self.self_attn = GroupedAttention(sizes)
        self.mlp = GatedMlp(sizes.width, 4 * sizes.width, sizes.width)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """New latents `[B, Q, W]`."""
        own = self.input_latents_layernorm(latents)
        other, seen = (self.input_context_layernorm(context), mask) if self.crosses else (own, None)
        latents = latents + self.post_attention_layernorm(self.self_attn(own, other, seen))
        return latents + self.post_ff_layernorm(self.mlp(self.pre_ff_layernorm(latents)))


class Resampler(nn.Module):
    """Learned latents that read a context block by block."""

    def __init__(self, sizes: DocToLoraSizes, blocks: Blocks) -> None:
        super().__init__()
        self.latents_q = nn.Parameter(torch.empty(blocks.latents, sizes.width))
        self.layers = nn.ModuleList(ResamplerBlock(sizes, crosses) for crosses in blocks.crosses)
        self.layernorm = nn.RMSNorm(sizes.width, eps=1e-6)

    def forward(self, context: Tensor, mask: Tensor | None) -> Tensor:
        """`context` `[B, K, W]` to `[B, latents, W]`."""
        latents = self.latents_q.expand(context.size(0), -1, -1)
        for block in self.layers:
            latents = block(latents, context, mask)
        return self.layernorm(latents)


class Perceiver(nn.Module):
    """Activations `[B, T, D]` to the decoder's latents `[B, queries, W]`."""

    def __init__(self, sizes: DocToLoraSizes) -> None:
        super().__init__()
        self.modality_projection = GatedMlp(sizes.features, sizes.projection, sizes.width)
        self.encoder, self.decoder = Resampler(sizes, sizes.encoder), Resampler(sizes, sizes.decoder)

    def forward(self, activations: Tensor, mask: Tensor) -> Tensor:
        """`mask` `[B, T]` is true on tokens."""
        return self.decoder(self.encoder(self.modality_projection(activations), mask), None)


class LayerwiseLinear(nn.Module):
    """A linear map of its own for each layer: `[B, L, M, r, d_in]` to `[B, L, M, r, d_out]`."""

    def __init__(self, layers: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, d_in, d_out))
        self.bias = nn.Parameter(torch.empty(1, layers, 1, 1, d_out))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.einsum("blmri,lio->blmro", x, self.weight) + self.bias


class LayerwiseBlock(nn.Module):
    """Residual feed-forward with weights of its own for each layer."""

    def __init__(self, sizes: DocToLoraSizes) -> None:
        super().__init__()
        width = sizes.width
        self.layers = nn.Sequential(
            nn.LayerNorm(width), LayerwiseLinear(sizes.layers, width, 4 * width), nn.SiLU(),
            LayerwiseLinear(sizes.layers, 4 * width, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, M, r, W]` to the same shape."""
        return x + self.layers(x)


class SharedBlock(nn.Module):
    """Residual feed-forward that all layers share."""

    def __init__(self, sizes: DocToLoraSizes) -> None:
        super().__init__()
        width = sizes.width
        # Identity keeps the place of the dropout that numbers the keys.
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Identity(), nn.Linear(width, 4 * width), nn.SiLU(),
                                 nn.Identity(), nn.Linear(4 * width, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, M, r, W]` to the same shape."""
        return x + self.mlp(x)


class DocToLora(nn.Module):
    """See the module. Parameters are empty until a checkpoint's tensors are loaded."""

    def __init__(self, sizes: DocToLoraSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.aggregator = nn.ModuleDict({"perceiver": Perceiver(sizes)})
        block = LayerwiseBlock if sizes.per_layer_blocks else SharedBlock
        self.layers = nn.Sequential(*(block(sizes) for _ in range(sizes.residual_blocks)))
        both = max(target.d_in + target.d_out for target in sizes.targets)
        modules = () if len(sizes.targets) == 1 else (len(sizes.targets),)
        self.head = nn.ParameterDict({"weight": torch.empty(sizes.layers, *modules, sizes.width, both)})
        self.bias_A = nn.ParameterDict({t.name: torch.empty(sizes.layers, sizes.rank, t.d_in) for t in sizes.targets})
        self.bias_B = nn.ParameterDict({t.name: torch.empty(sizes.layers, sizes.rank, t.d_out) for t in sizes.targets})
        self.scaler_A, self.scaler_B = (
            nn.ParameterDict({t.name: torch.empty(1, sizes.layers, sizes.rank, 1) for t in sizes.targets})
            for _ in range(2))

    def forward(self, activations: Sequence[Tensor], mask: Tensor) -> Factors:
        """The adapters of B chunks, without the bias adapter: A `[B, L, r, d_in]` and B `[B, L, r, d_out]` by module.

        `activations` are L tensors `[B, T, D]` with per-layer activations, else one; `mask` `[B, T]` is true on tokens.
        """
        sizes, perceiver = self.sizes, self.aggregator["perceiver"]
        # Layer by layer: the projection is four times as wide as the base, for all layers at once it fills gigabytes.
        latents = torch.stack([perceiver(each.to(self.head["weight"].dtype), mask) for each in activations], dim=1)
        latents = latents.flatten(1, 2).unflatten(1, (sizes.layers, len(sizes.targets), sizes.rank))
        latents = self.layers(latents)
        latents = latents / latents.norm(dim=-1, keepdim=True)
        weight = self.head["weight"]
        weight = weight[:, None] if weight.dim() == 3 else weight
        rows = torch.einsum("blmrw,lmwd->blmrd", latents, weight)
        found = {}
        for i, target in enumerate(sizes.targets):
            a, b = rows[:, :, i, :, :target.d_in + target.d_out].split([target.d_in, target.d_out], dim=-1)
            found[target.name] = (a * self.scaler_A[target.name], b * self.scaler_B[target.name])
        return found

    def bias(self) -> Factors:
        """The learned adapter that is added once to whatever was read, with B = 1."""
        return {target.name: (self.bias_A[target.name][None], self.bias_B[target.name][None])
                for target in self.sizes.targets}
