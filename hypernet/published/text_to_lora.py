"""The Text-to-LoRA hypernetwork: the embedding of a task description in, LoRA factors out.

For each layer and module the embedding is joined with a vector for the layer's depth and one for the module's kind;
a feed-forward with residual blocks and a head for each module give all of A and B at once. The names of the parts are
the checkpoint's keys.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernet.inject import module_path
from hypernet.lora import LoraAdapter
from hypernet.perceiver import Target
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.shapes import Tensors, dimensions, module_names

TRAININGS = ("sft", "recon")
"""What a network was trained on: tasks, or adapters to reconstruct."""

_VARIANTS = {"out_emb": "one head for A and B", "pos_emb": "ranks made one after the other", "vera_A": "VeRA"}


@dataclass(frozen=True)
class TextToLoraSizes:
    """What the shapes of a checkpoint tell. `targets` stand in the order in which the module kinds are numbered."""

    layers: int
    targets: tuple[Target, ...]
    rank: int
    embedding: int
    encoded: int
    depth: int
    kind: int
    head: int
    head_bias: bool

    @staticmethod
    def of(tensors: Tensors) -> TextToLoraSizes:
        """Read from keys and shapes. Raises CheckpointInvalid where they fit no supported Text-to-LoRA network."""
        for key, meaning in _VARIANTS.items():
            if any(name.split(".", 1)[0] == key for name in tensors):
                raise CheckpointInvalid(f"{key}: belongs to a variant ({meaning}) that is not supported")
        # In training modules were numbered by a set, whose order differs from run to run. The heads keep it.
        names = module_names(tensors, "heads", "a Text-to-LoRA checkpoint has one for each module")
        encoded, embedding = dimensions(tensors, "task_encoder.mlp.0.weight", 2)
        dimensions(tensors, "task_encoder.mlp.1.weight", 1)  # the other kinds of task encoder have something else here
        layers, depth = dimensions(tensors, "layer_depth_encoder.0.weight", 2)
        _, kind = dimensions(tensors, "layer_type_encoder.0.weight", 2)
        targets = tuple(Target(name, dimensions(tensors, f"AB_offset.A.{name}", 3)[2],
                               dimensions(tensors, f"AB_offset.B.{name}", 3)[1]) for name in names)
        rank = dimensions(tensors, f"AB_offset.A.{names[0]}", 3)[1]
        head = dimensions(tensors, f"heads.{names[0]}.weight", 2)[1]
        return TextToLoraSizes(layers, targets, rank, embedding, encoded, depth, kind, head,
                               f"heads.{names[0]}.bias" in tensors)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> TextToLoraSizes:
        """What `to_json` gave. Raises KeyError or TypeError."""
        return TextToLoraSizes(**{**fields, "targets": tuple(Target(**target) for target in fields["targets"])})


@dataclass(frozen=True)
class OutputScale:
    """How outputs become weights.

    Networks trained on tasks ("sft") add a learned offset. Networks trained to reconstruct adapters ("recon") either
    predict deviations in units of the targets' standard deviation (`z_score`), to which offset and mean are added, or
    weights without offset that are to be divided by `divisor`.
    """

    training: str = "sft"
    z_score: bool = False
    factorized: bool = False
    divisor: float = 1.0


class ResidualBlock(nn.Module):
    """Normalised feed-forward of four times the width, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Identity keeps the place of the dropout that numbers the keys; it does nothing after training.
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Identity(),
                                 nn.Linear(4 * width, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape."""
        return x + self.mlp(x)


class Sides(nn.Module):
    """Stored values for each module: A `[L, r, d_in]` and B `[L, d_out, r]`."""

    def __init__(self, sizes: TextToLoraSizes) -> None:
        super().__init__()
        self.A = nn.ParameterDict({t.name: torch.empty(sizes.layers, sizes.rank, t.d_in) for t in sizes.targets})
        self.B = nn.ParameterDict({t.name: torch.empty(sizes.layers, t.d_out, sizes.rank) for t in sizes.targets})

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of one module."""
        return self.A[name], self.B[name]


class TextToLora(nn.Module):
    """See the module. Parameters are empty until a checkpoint's tensors are loaded."""

    def __init__(self, sizes: TextToLoraSizes, scale: OutputScale | None = None) -> None:
        super().__init__()
        self.sizes, self.scale = sizes, scale or OutputScale()
        width = sizes.encoded + sizes.depth + sizes.kind
        self.AB_offset, self.mean_recon_target, self.std_recon_target = (Sides(sizes) for _ in range(3))
        self.task_encoder = nn.ModuleDict({
            "mlp": nn.Sequential(nn.Linear(sizes.embedding, sizes.encoded), nn.LayerNorm(sizes.encoded))})
        self.layer_depth_encoder = nn.Sequential(nn.Embedding(sizes.layers, sizes.depth), nn.LayerNorm(sizes.depth))
        self.layer_type_encoder = nn.Sequential(nn.Embedding(len(sizes.targets), sizes.kind),
                                                nn.LayerNorm(sizes.kind))
        self.mixer = nn.Sequential(nn.Identity(), nn.Linear(width, 4 * width), nn.SiLU(), nn.Identity(),
                                   nn.Linear(4 * width, width), nn.SiLU())
        self.mlp1, self.mlp2 = ResidualBlock(width), ResidualBlock(width)
        self.mlp3 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Identity(),
                                  nn.Linear(4 * width, sizes.head), nn.SiLU())
        self.heads = nn.ModuleDict({t.name: nn.Linear(sizes.head, sizes.rank * (t.d_in + t.d_out), sizes.head_bias)
                                    for t in sizes.targets})

    @torch.no_grad()
    def forward(self, embedding: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A `[L, r, d_in]` and B `[L, d_out, r]` by module, from a vector as `scale_embedding` gives it."""
        sizes = self.sizes
        task = self.task_encoder["mlp"](embedding).expand(sizes.layers, -1)
        depth = self.layer_depth_encoder(torch.arange(sizes.layers, device=embedding.device))
        found = {}
        for i, target in enumerate(sizes.targets):
            kind = self.layer_type_encoder(torch.tensor([i], device=embedding.device)).expand(sizes.layers, -1)
            mixed = self.mixer(torch.cat([task, depth, kind], dim=-1))
            flat = self.heads[target.name](self.mlp3(self.mlp2(self.mlp1(mixed))))
            a, b = flat.split([sizes.rank * target.d_in, sizes.rank * target.d_out], dim=-1)
            b = b.unflatten(-1, (sizes.rank, target.d_out)).mT
            found[target.name] = self._scaled((a.unflatten(-1, (sizes.rank, target.d_in)), b), target.name)
        return found

    def _scaled(self, raw: tuple[Tensor, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """A and B as `OutputScale` says."""
        scale = self.scale
        if scale.training == "recon" and not scale.factorized:
            return raw[0] / math.sqrt(scale.divisor), raw[1] / math.sqrt(scale.divisor)
        if scale.training == "recon" and scale.z_score:
            std, mean = self.std_recon_target.of(name), self.mean_recon_target.of(name)
            raw = (raw[0] * (std[0] + 1e-10) + mean[0], raw[1] * (std[1] + 1e-10) + mean[1])
        offset = self.AB_offset.of(name)
        return raw[0] + offset[0], raw[1] + offset[1]

    def adapter(self, embedding: Tensor, scaling: float, base_model: str) -> LoraAdapter:
        """The adapter of a task; `scaling` is what its B A is multiplied by."""
        tensors = {}
        for name, (a, b) in self(embedding).items():
            for layer in range(self.sizes.layers):
                tensors[module_path(layer, name)] = (a[layer].clone(), b[layer].contiguous().clone())
        return LoraAdapter(self.sizes.rank, scaling * self.sizes.rank, tensors, base_model)


def scale_embedding(embedding: Tensor) -> Tensor:
    """A text embedding `[E]` of any length as the network was trained to read it: of length sqrt(E)."""
    return F.normalize(embedding, dim=-1) * math.sqrt(embedding.size(-1))
