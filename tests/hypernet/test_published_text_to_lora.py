"""Text-to-LoRA: our model against what upstream's code gave for the same weights (tests/data/published/README.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hypernet.lora import LoraAdapter
from hypernet.published.convert import convert
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.folder import TextToLoraConfig, load_text_to_lora
from hypernet.published.text_to_lora import OutputScale, TextToLora, scale_embedding
from tests.hypernet.published_helpers import LAYERS, fill, save_text_to_lora, text_to_lora_shapes

DATA = Path(__file__).parent.parent / "data" / "published"
CASES = {
    "gemma2": (text_to_lora_shapes(("v_proj", "q_proj")), {"training_task": "sft"}),
    "mistral": (text_to_lora_shapes(("q_proj", "v_proj"), head_bias=False),
                {"training_task": "recon", "pred_z_score": True, "factorized": True}),
}


def load(folder: Path, name: str) -> tuple[TextToLora, TextToLoraConfig]:
    shapes, arguments = CASES[name]
    convert(save_text_to_lora(folder / "source", shapes, **arguments), folder / "converted")
    return load_text_to_lora(folder / "converted")


@pytest.mark.parametrize("name", sorted(CASES))
def test_adapters_are_upstreams(name: str, tmp_path: Path) -> None:
    network, config = load(tmp_path, name)
    gold = load_file(DATA / f"text_to_lora_{name}.safetensors")
    adapter = network.adapter(gold.pop("embedding")[0], config.scaling, config.base_model)
    adapter.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == gold.keys() and len(gold) == 4 * LAYERS
    for key, wanted in gold.items():
        assert float((saved[key] - wanted).abs().max()) < 1e-4, key


def test_scaling_is_that_of_rslora(tmp_path: Path) -> None:
    """alpha 8, rank 4: PEFT multiplies by 8 / sqrt(4) with rsLoRA; ours says the same without it."""
    network, config = load(tmp_path, "gemma2")
    adapter = network.adapter(torch.ones(24), config.scaling, config.base_model)
    assert config.scaling == adapter.alpha / adapter.rank == 4.0
    adapter.save(tmp_path / "adapter")
    assert LoraAdapter.load(tmp_path / "adapter").alpha == 16.0


def test_order_of_modules_comes_from_the_heads(tmp_path: Path) -> None:
    """adapter_config.json lists q_proj first; the network numbers v_proj first, and that decides its vectors."""
    network, config = load(tmp_path, "gemma2")
    assert [target.name for target in config.sizes.targets] == ["v_proj", "q_proj"]
    swapped = TextToLora(replace(config.sizes, targets=config.sizes.targets[::-1]))
    swapped.load_state_dict(network.state_dict())
    right, wrong = network(torch.ones(24)), swapped.eval()(torch.ones(24))
    assert float((right["q_proj"][0] - wrong["q_proj"][0]).abs().max()) > 0.01


def test_weights_made_at_once_are_divided(tmp_path: Path) -> None:
    """The third kind of output: neither offset nor standard deviations, but a divisor."""
    network, config = load(tmp_path, "mistral")
    divided = TextToLora(config.sizes, OutputScale("recon", divisor=10000.0))
    divided.load_state_dict(network.state_dict())
    raw = TextToLora(config.sizes, OutputScale("recon", divisor=1.0))
    raw.load_state_dict(network.state_dict())
    for name, (a, b) in divided(torch.ones(24)).items():
        assert torch.allclose(a * 100, raw(torch.ones(24))[name][0], atol=1e-5)
        assert torch.allclose(b * 100, raw(torch.ones(24))[name][1], atol=1e-5)


def test_embeddings_are_scaled() -> None:
    scaled = scale_embedding(torch.tensor([3.0, 0.0, 4.0, 0.0]))
    assert torch.allclose(scaled, torch.tensor([1.2, 0.0, 1.6, 0.0]))


def test_settings_may_stand_two_folders_up(tmp_path: Path) -> None:
    source = save_text_to_lora(tmp_path / "run")
    deep = source / "checkpoints" / "it_5"
    deep.mkdir(parents=True)
    (source / "hypermod.pt").rename(deep / "hypermod.pt")
    config = convert(deep / "hypermod.pt", tmp_path / "converted")
    assert isinstance(config, TextToLoraConfig)
    assert (config.base_model, config.embedding_model) == ("example/tiny", "Alibaba-NLP/gte-large-en-v1.5")


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    shapes = text_to_lora_shapes()
    for number, (changed, message) in enumerate((
        (shapes | {"out_emb.q_proj.A": (16,)}, "one head for A and B"),
        ({key: shape for key, shape in shapes.items() if not key.startswith("AB_offset")},
         "AB_offset.A.v_proj: is missing"),
        (shapes | {"heads.q_proj.weight": (64, 20)}, r"heads.q_proj.weight: has shape \(64, 20\)"),
        (shapes | {"heads.query.weight": (64, 20)}, "heads.query: is no module"),
        (shapes | {"task_encoder.embed": (8, 32)}, "task_encoder.embed: belongs to no part"),
    )):
        with pytest.raises(CheckpointInvalid, match=message):
            convert(save_text_to_lora(tmp_path / f"source{number}", changed), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_bad_settings_are_named(tmp_path: Path) -> None:
    source = save_text_to_lora(tmp_path / "source")
    good = {name: (source / name).read_text() for name in ("args.yaml", "adapter_config.json")}
    for name, text, message in (
        ("args.yaml", "!!python/object/apply:os.system ['true']", "args.yaml: cannot be read"),
        ("args.yaml", "training_task: magic", "training_task: is 'magic'"),
        ("args.yaml", "delta_w_scaling: 0", "delta_w_scaling: is 0"),
        ("adapter_config.json", "{", "adapter_config.json: cannot be read"),
        ("adapter_config.json", '{"r": 8}', "tensors have rank 4"),
        ("adapter_config.json", '{"r": 4, "base_model_name_or_path": "x"}', "lora_alpha: is None"),
    ):
        (source / name).write_text(text)
        with pytest.raises(CheckpointInvalid, match=message):
            convert(source, tmp_path / "converted")
        (source / name).write_text(good[name])
    (source / "args.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="args.yaml"):
        convert(source, tmp_path / "converted")


def test_tensors_are_all_that_the_network_needs(tmp_path: Path) -> None:
    network, _ = load(tmp_path, "gemma2")
    for key, value in fill(text_to_lora_shapes()).items():
        assert torch.equal(network.state_dict()[key], value)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    load(tmp_path, "gemma2")
    file = tmp_path / "converted" / "config.json"
    config = json.loads(file.read_text())
    sizes, targets = config["sizes"], config["sizes"]["targets"]
    for changed, message in (
        ({"sizes": {**sizes, "rank": 5}}, "sizes.rank: is 5; the tensors ask for 4"),
        ({"sizes": {**sizes, "embedding": 10**12}}, "sizes.embedding: is 10+; the tensors ask for 24"),
        ({"sizes": {**sizes, "targets": targets[:1]}}, "sizes.targets: is "),
        ({"sizes": {**sizes, "targets": [targets[0], targets[0]]}}, "sizes.targets: is "),
        ({"output": {**config["output"], "training": "magic"}}, "output.training: is 'magic'; sft or recon"),
        ({"output": {**config["output"], "divisor": 0}}, "output.divisor: is 0"),
        ({"embedding_model": 7}, "embedding_model: is 7; text"),
        ({"scaling": -1}, "scaling: is -1"),
    ):
        file.write_text(json.dumps(config | changed))
        with pytest.raises(CheckpointInvalid, match=message):
            load_text_to_lora(tmp_path / "converted")
    file.write_text(json.dumps(config))
    assert load_text_to_lora(tmp_path / "converted")[1].sizes.rank == 4
