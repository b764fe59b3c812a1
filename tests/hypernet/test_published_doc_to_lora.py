"""Doc-to-LoRA: our model against what upstream's code gave for the same weights (tests/data/published/README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hypernet.inject import module_path
from hypernet.lora import concatenate
from hypernet.published.activations import ActivationReader
from hypernet.published.convert import convert
from hypernet.published.doc_to_lora import DocToLora
from hypernet.published.folder import DocToLoraConfig, load_doc_to_lora
from hypernet.reader import adapter_of
from tests.hypernet.published_helpers import (
    BASES,
    LAYERS,
    Shape,
    doc_to_lora_shapes,
    fill,
    save_doc_to_lora,
    write_base,
)

DATA = Path(__file__).parent.parent / "data" / "published"
CASES: dict[str, tuple[Shape, dict[str, Any]]] = {
    "gemma2": (Shape(), {}),
    "mistral": (Shape(modules=("down_proj", "q_proj", "o_proj"), blocks=(True, False, True, False),
                      residual_blocks=2), {}),
    "qwen3": (Shape(per_layer_activations=False), {"layer_idx": 2}),
}


@dataclass(frozen=True)
class Case:
    """A converted checkpoint, its base, and what upstream's code gave for them."""

    network: DocToLora
    config: DocToLoraConfig
    base: Path
    gold: dict[str, Tensor]

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(params=sorted(CASES), scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    shape, encoder = CASES[name]
    save_doc_to_lora(folder / "pytorch_model.bin", shape, **encoder)
    convert(folder / "pytorch_model.bin", folder / "converted")
    network, config = load_doc_to_lora(folder / "converted")
    return Case(network, config, write_base(folder / "base", name), load_file(DATA / f"doc_to_lora_{name}.safetensors"))


def near(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < 1e-4


def activations(gold: dict[str, Tensor]) -> list[Tensor]:
    """Upstream's activations, as a list: of each layer, or of one."""
    features = gold["features"]
    return list(features.unbind(1)) if features.dim() == 4 else [features]


def test_activations_are_upstreams(case: Case) -> None:
    mask = case.gold["mask"].bool()
    found = ActivationReader(case.model(), case.config.reading).read(case.gold["ids"], mask)
    wanted = activations(case.gold)
    assert len(found) == len(wanted) == (LAYERS if case.config.sizes.per_layer_activations else 1)
    for ours, theirs in zip(found, wanted, strict=True):
        near(ours[mask], theirs[mask])


@torch.no_grad()
def test_factors_are_upstreams(case: Case) -> None:
    factors = case.network(activations(case.gold), case.gold["mask"].bool())
    assert sorted(factors) == sorted(target.name for target in case.config.sizes.targets)
    for name, (a, b) in factors.items():
        near(a, case.gold[f"chunks.{name}.A"])
        near(b, case.gold[f"chunks.{name}.B"])


@torch.no_grad()
def test_composed_chunks_are_upstreams(case: Case) -> None:
    """Two chunks and the bias adapter, once, in that order of ranks; the scaling stays outside upstream's tensors."""
    factors = case.network(activations(case.gold), case.gold["mask"].bool())
    bias = adapter_of(case.network.bias(), 0, case.config.scaling, "tiny")
    for count, label in ((1, "single"), (2, "both")):
        parts = [adapter_of(factors, i, case.config.scaling, "tiny") for i in range(count)]
        joined = concatenate([*parts, bias])
        assert joined.rank == joined.alpha == 4 * (count + 1)
        for target in case.config.sizes.targets:
            for layer in range(LAYERS):
                a, b = joined.tensors[module_path(layer, target.name)]
                near(a, case.gold[f"{label}.{target.name}.A"][0, layer])
                # Scaled by 16, so a sixteenth of the difference counts.
                near(b / case.config.scaling, case.gold[f"{label}.{target.name}.B"][0, layer].T)


@torch.no_grad()
def test_peft_answers_as_upstream_does(case: Case, tmp_path: Path) -> None:
    """From tokens to logits: our adapter, saved and loaded by PEFT, against upstream's own patched forward pass."""
    mask, model = case.gold["mask"].bool()[:1], case.model()
    factors = case.network(ActivationReader(model, case.config.reading).read(case.gold["ids"][:1], mask), mask)
    parts = [adapter_of(source, 0, case.config.scaling, "tiny") for source in (factors, case.network.bias())]
    concatenate(parts).save(tmp_path)
    plain = model(input_ids=case.gold["question"]).logits
    found = PeftModel.from_pretrained(model, tmp_path)(input_ids=case.gold["question"]).logits
    assert float((plain - found).abs().max()) > 1
    near(found, case.gold["logits"])


@torch.no_grad()
def test_padding_and_company_do_not_matter(case: Case) -> None:
    mask, ids, reader = case.gold["mask"].bool(), case.gold["ids"], ActivationReader(case.model(), case.config.reading)
    together = case.network(reader.read(ids, mask), mask)
    short = int(mask[1].sum())
    assert short < ids.size(1)
    alone = case.network(reader.read(ids[1:, :short], mask[1:, :short]), mask[1:, :short])
    for name, (a, b) in alone.items():
        near(together[name][0][1:], a)
        near(together[name][1][1:], b)


@pytest.mark.parametrize("name", sorted(BASES))
def test_reading_leaves_the_base_as_it_is(name: str, tmp_path: Path) -> None:
    """On every supported architecture: as many activations as layers, and the whole base answers as before."""
    save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape())
    config = convert(tmp_path / "pytorch_model.bin", tmp_path / "converted")
    assert isinstance(config, DocToLoraConfig)
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "base", name), dtype=torch.float32).eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model(input_ids=ids, output_hidden_states=True)
        read = ActivationReader(model, config.reading).read(ids, torch.ones_like(ids).bool())
        after = model(input_ids=ids)
    assert torch.equal(before.logits, after.logits) and len(model.model.layers) == LAYERS
    assert len(read) == LAYERS
    # The same but for the last one, which is normalised.
    for ours, theirs in zip(read[:-1], before.hidden_states, strict=False):
        near(ours, theirs)
    with torch.no_grad():
        near(read[-1], model.model.norm(before.hidden_states[LAYERS - 1]))


@pytest.mark.parametrize("shape", [Shape(per_layer_processing=False, residual_blocks=3), Shape(residual_blocks=0)])
@torch.no_grad()
def test_variants_against_a_plain_reference(shape: Shape, tmp_path: Path) -> None:
    """Residual blocks that the layers share, or none: the steps after the perceiver, written out one by one."""
    tensors = fill(doc_to_lora_shapes(shape))
    save_doc_to_lora(tmp_path / "pytorch_model.bin", shape, tensors)
    convert(tmp_path / "pytorch_model.bin", tmp_path / "converted")
    network, config = load_doc_to_lora(tmp_path / "converted")
    assert config.sizes.residual_blocks == shape.residual_blocks
    states = [torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS)]
    mask = torch.ones(1, 7, dtype=torch.bool)
    a, b = network(states, mask)["down_proj"]
    for layer in range(LAYERS):
        for rank in range(shape.rank):
            x = network.aggregator["perceiver"](states[layer], mask)[0, rank]
            for i in range(shape.residual_blocks):
                part = {key.removeprefix(f"layers.{i}.mlp."): value for key, value in tensors.items()}
                h = torch.nn.functional.layer_norm(x, (16,), part["0.weight"], part["0.bias"])
                h = torch.nn.functional.silu(part["2.weight"] @ h + part["2.bias"])
                h = part["5.weight"] @ h + part["5.bias"]
                x = x + torch.nn.functional.layer_norm(h, (16,), part["6.weight"], part["6.bias"])
            row = (x / x.norm()) @ tensors["head.weight"][layer]
            near(a[0, layer, rank], row[:48] * tensors["scaler_A.down_proj"][0, layer, rank])
            near(b[0, layer, rank], row[48:] * tensors["scaler_B.down_proj"][0, layer, rank])
