"""The converter: what it keeps, and that broken and hostile files are refused without running anything."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hypernet.published.convert import convert
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.folder import DocToLoraConfig, load_doc_to_lora
from hypernet.published.pickles import read_pickle
from tests.hypernet.published_helpers import (
    Shape,
    doc_to_lora_shapes,
    fill,
    save_doc_to_lora,
    save_text_to_lora,
    text_to_lora_shapes,
    write_base,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_doc_to_lora(tmp_path / "source" / "pytorch_model.bin", Shape(), base_name="google/gemma-2-2b-it",
                            quantize_ctx_encoder=True)


def test_conversion_keeps_tensors_and_says_where_they_came_from(source: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    config = convert(source.parent, tmp_path / "new" / "converted", report=lambda stage, _, __: stages.append(stage))
    assert isinstance(config, DocToLoraConfig)
    assert list(dict.fromkeys(stages)) == ["hashing", "reading", "checking", "writing"]
    folder = tmp_path / "new" / "converted"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    wanted = fill(doc_to_lora_shapes(Shape()))
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    written = json.loads((folder / "config.json").read_text())
    assert written["format"] == "doc-to-lora" and written["base_model"] == "google/gemma-2-2b-it"
    assert written["source"] == {"file": "pytorch_model.bin", "bytes": source.stat().st_size,
                                 "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    assert written["scaling"] == 2 * 4 ** 1.5 and written["use_bias"] and written["reading"]["quantized"]
    assert load_doc_to_lora(folder)[1] == config


def test_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    """The pickled configuration of these files says 99999 for all of them."""
    shape = Shape(modules=("q_proj", "down_proj"), latent=24, latents=5, rank=2, blocks=(True, False, True),
                  residual_blocks=3)
    save_doc_to_lora(tmp_path / "pytorch_model.bin", shape)
    config = convert(tmp_path / "pytorch_model.bin", tmp_path / "converted")
    assert isinstance(config, DocToLoraConfig)
    sizes = config.sizes
    assert (sizes.layers, sizes.features, sizes.rank, sizes.width, sizes.projection) == (3, 32, 2, 24, 128)
    assert (sizes.heads, sizes.key_heads, sizes.encoder.latents, sizes.residual_blocks) == (16, 4, 5, 3)
    assert (sizes.encoder.crosses, sizes.decoder.crosses) == ((True, False, True), (True,))
    assert [(target.name, target.d_in, target.d_out) for target in sizes.targets] == [
        ("down_proj", 48, 32), ("q_proj", 32, 32)]
    assert config.reading.layers == 2 and sizes.per_layer_activations


def test_prefix_of_compiled_models_is_removed(tmp_path: Path) -> None:
    save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape(), prefix="_orig_mod.")
    convert(tmp_path / "pytorch_model.bin", tmp_path / "converted")
    load_doc_to_lora(tmp_path / "converted")


def test_biases_without_leading_dimension_are_taken(tmp_path: Path) -> None:
    tensors = fill(doc_to_lora_shapes(Shape()))
    for key in ("layers.0.layers.1.bias", "layers.0.layers.3.bias"):
        tensors[key] = tensors[key][0]
    save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape(), tensors)
    convert(tmp_path / "pytorch_model.bin", tmp_path / "converted")
    load_doc_to_lora(tmp_path / "converted")


def test_shared_weights_are_taken(tmp_path: Path) -> None:
    """Blocks may share their weights; such tensors share memory in the file too."""
    tensors = fill(doc_to_lora_shapes(Shape()))
    for key in [key for key in tensors if ".encoder.layers.0." in key]:
        tensors[key.replace(".layers.0.", ".layers.1.")] = tensors[key]
    save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape(), tensors)
    convert(tmp_path / "pytorch_model.bin", tmp_path / "converted")
    load_doc_to_lora(tmp_path / "converted")


def test_fingerprint_of_the_base_is_kept(source: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    config = convert(source, tmp_path / "converted", base=base)
    assert len(config.base_fingerprint) == 64
    with pytest.raises(FileNotFoundError):
        convert(source, tmp_path / "other", base=tmp_path)


def test_places(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(tmp_path / "none", tmp_path / "converted")
    with pytest.raises(FileNotFoundError, match="neither pytorch_model.bin nor hypermod.pt"):
        convert(tmp_path, tmp_path / "converted")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    load_doc_to_lora(tmp_path / "empty")


# Code


class Runs:
    """Unpickling this makes a file, where unpickling runs code."""

    def __init__(self, witness: Path, function: Callable[..., Any] = os.mkdir) -> None:
        self.call = (function, (str(witness),))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call


def hostile(folder: Path, value: Any, **more: Any) -> Path:
    file = folder / "pytorch_model.bin"
    torch.save({"head.weight": torch.ones(2), "x": value, **more}, file)
    return file


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    for number, function in enumerate((os.mkdir, os.system, open, exec, __import__, torch.load)):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = hostile(folder, Runs(witness, function))
        with pytest.raises(CheckpointInvalid, match="refused, since it names"):
            convert(file, tmp_path / "converted")
    assert not witness.exists() and not (tmp_path / "converted").exists()
    # The same file does run code where it is unpickled without restrictions: the test above proves something.
    torch.load(tmp_path / "0" / "pytorch_model.bin", weights_only=False)
    assert witness.is_dir()


def test_code_is_refused_in_a_text_to_lora_checkpoint(tmp_path: Path) -> None:
    source, witness = save_text_to_lora(tmp_path / "source"), tmp_path / "ran"
    torch.save({**fill(text_to_lora_shapes()), "x": Runs(witness)}, source / "hypermod.pt")
    with pytest.raises(CheckpointInvalid, match="refused.*mkdir"):
        convert(source, tmp_path / "converted")
    assert not witness.exists()


def raw(folder: Path, program: bytes) -> Path:
    """A torch.save file whose pickle is `program`."""
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file


@pytest.mark.parametrize("program", [
    b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",  # a call
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",  # the same with names from the stack
    b"\x80\x02(X\x04\x00\x00\x00trueiposix\nsystem\n.",  # an instance
    b"\x80\x02(cposix\nsystem\nX\x04\x00\x00\x00trueo.",  # an object
    b"\x80\x02cctx_to_lora.configs\nos.system\nX\x04\x00\x00\x00true\x85R.",  # through a foreign package
    b"\x80\x02cpeft\nos\n.",  # a foreign package's own imports
    b"\x80\x02}c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    b"\x82\x01.",  # the extension registry
    b"\x80\x02Pname\n.",  # a persistent name as text
])
def test_every_way_to_name_code_is_refused(program: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid):
        convert(raw(tmp_path, program), tmp_path / "converted")


def test_foreign_classes_become_inert_records(tmp_path: Path) -> None:
    """A record takes any arguments and fields; nothing of it is called."""
    program = (b"\x80\x02}X\x01\x00\x00\x00ac"
               b"ctx_to_lora.modeling.hypernet\nHypernetConfig\nX\x01\x00\x00\x00v\x85R}X\x09\x00\x00\x00__class__K\x01sbs.")
    record = read_pickle(raw(tmp_path, program))["a"]
    assert type(record).__name__ == "Record" and record.args == ("v",) and record.get("__class__") == 1
    with pytest.raises(CheckpointInvalid, match="list as its fields"):
        read_pickle(raw(tmp_path, program.replace(b"}X\x09\x00\x00\x00__class__K\x01s", b"]")))


def test_a_file_that_needs_no_restricted_loader_is_still_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for value, message in (([1, 2], "holds a list"), ({1: 2}, "holds a dict"), ({"a": 1}, "neither a Doc-to-LoRA")):
        torch.save(value, file)
        with pytest.raises(CheckpointInvalid, match=message):
            convert(file, tmp_path / "converted")


# Damage


def test_truncated_files_are_refused(source: Path, tmp_path: Path) -> None:
    whole = source.read_bytes()
    for share in (0.0, 0.2, 0.9, 0.999):
        source.write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(CheckpointInvalid, match="truncated"):
            convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_changed_bytes_are_noticed(source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    data = bytearray(source.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    source.write_bytes(data)
    with pytest.raises(CheckpointInvalid, match="is corrupt"):
        convert(source, tmp_path / "converted")


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for content in (b"", b"hello", pickle.dumps({"a": 1}), b"PK\x05\x06" + b"\0" * 18):
        file.write_bytes(content)
        with pytest.raises(CheckpointInvalid):
            convert(file, tmp_path / "converted")


def test_compressed_members_are_refused(source: Path, tmp_path: Path) -> None:
    """A few bytes could unpack to a full disk."""
    packed = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointInvalid, match="is compressed"):
        convert(packed, tmp_path / "converted")


def test_repeated_bytes_are_refused(tmp_path: Path) -> None:
    """A stride of 0 makes a terabyte of four bytes."""
    tensors = fill(doc_to_lora_shapes(Shape())) | {"head.weight": torch.ones(1).expand(3, 16, 10 ** 10)}
    file = save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape(), tensors)
    with pytest.raises(CheckpointInvalid, match="more than a file of"):
        convert(file, tmp_path / "converted")


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("head.weight"), "head.weight: missing"),
    (lambda t: t.pop("scaler_B.down_proj"), "scaler_B.down_proj: missing"),
    (lambda t: t.pop("bias_A.down_proj"), "bias_A: is missing"),
    (lambda t: t.pop("aggregator.perceiver.encoder.layers.0.self_attn.q_proj.weight"), "q_proj.weight: is missing"),
    (lambda t: t.update({"aggregator.perceiver.encoder.layers.7.mlp.up_proj.weight": torch.ones(64, 16)}),
     "without a gap"),
    (lambda t: t.update({"extra_head.weight": torch.ones(2)}), "extra_head.weight: belongs to no part"),
    (lambda t: t.update({"head.weight": torch.ones(3, 16, 81)}), r"\(3, 16, 81\).*\(3, 16, 80\)"),
    (lambda t: t.update({"bias_A.down_proj": torch.ones(3, 4)}), "3 dimensions"),
    (lambda t: t.update({"bias_A.down_proj": torch.ones(3, 0, 48)}), "3 dimensions above zero"),
    (lambda t: t.update({"aggregator.perceiver.decoder.latents_q": torch.ones(5, 16)}), "4 .* or 12"),
    (lambda t: t.update({"head.weight": torch.ones(3, 16, 80, dtype=torch.int64)}), "floating point is needed"),
    (lambda t: t["head.weight"].fill_(float("nan")), "head.weight: holds values that are not finite"),
    (lambda t: t.update({"bias_A.qkv_proj": torch.ones(3, 4, 48)}), "bias_A.qkv_proj: is no module"),
])
def test_wrong_tensors_are_named(change: Change, message: str, tmp_path: Path) -> None:
    tensors = fill(doc_to_lora_shapes(Shape()))
    change(tensors)
    file = save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape(), tensors)
    with pytest.raises(CheckpointInvalid, match=message):
        convert(file, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(("encoder", "message"), [
    ({"ctx_encoder_type": "magic"}, "allowed are per_layer_activations, early_exit, embed_only"),
    ({"ctx_encoder_type": "early_exit", "layer_idx": 1}, "latents are those of a layer"),
    ({"ctx_encoder_model_name_or_path": "other/model"}, "read the base itself"),
])
def test_unsupported_readings_are_named(encoder: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape(), **encoder)
    with pytest.raises(CheckpointInvalid, match=message):
        convert(file, tmp_path / "converted")


def test_early_exit_needs_its_layer(tmp_path: Path) -> None:
    for layer in (None, 0, 4, "1"):
        file = save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape(per_layer_activations=False), layer_idx=layer)
        with pytest.raises(CheckpointInvalid, match="a number from 1 to 3"):
            convert(file, tmp_path / "converted")


def test_missing_settings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    whole = fill(doc_to_lora_shapes(Shape()))
    torch.save({**whole, "hypernet_config": {"lora_config": 1}}, file)
    with pytest.raises(CheckpointInvalid, match="hypernet_config: is missing"):
        convert(file, tmp_path / "converted")
    save_doc_to_lora(file, Shape(), base_name="")
    with pytest.raises(CheckpointInvalid, match="base_model_name_or_path: is missing"):
        convert(file, tmp_path / "converted")


# The converted folder


def test_a_damaged_folder_is_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    convert(source, folder)
    weights, config = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())

    def refused(message: str) -> None:
        with pytest.raises(CheckpointInvalid, match=message):
            load_doc_to_lora(folder)

    (folder / "model.safetensors").write_bytes(weights[:-100])
    refused("cannot be read as safetensors")
    (folder / "model.safetensors").write_bytes(weights)
    for changed, message in (
        ({**config, "format": "text-to-lora"}, "'doc-to-lora' is needed"),
        ({**config, "format_version": 2}, "format_version 2"),
        ({key: value for key, value in config.items() if key != "sizes"}, "other fields"),
        ({**config, "surprise": 1}, "other fields"),
        ({**config, "sizes": {**config["sizes"], "layers": 4}}, "sizes.layers: is 4; the tensors ask for 3"),
        ({**config, "sizes": {**config["sizes"], "residual_blocks": 10**12}}, "sizes.residual_blocks: is 10+; "),
        ({**config, "sizes": {**config["sizes"], "width": 16.0}}, "sizes.width: is 16.0; the tensors ask for 16"),
        ({**config, "sizes": 7}, "other fields"),
        ({**config, "scaling": "1"}, "scaling: is '1'; a finite number above 0"),
        ({**config, "scaling": float("nan")}, "scaling: is nan"),
        ({**config, "base_model": ""}, "base_model: is ''"),
        ({**config, "base_fingerprint": None}, "base_fingerprint: is None; text"),
        ({**config, "use_bias": "no"}, "use_bias: is 'no'; true or false"),
        ({**config, "reading": {**config["reading"], "activations": "magic"}}, "reading.activations: is .magic.;"),
        ({**config, "reading": {**config["reading"], "chunk_tokens": 0}}, "reading.chunk_tokens: is 0"),
        ({**config, "reading": {**config["reading"], "layers": True}}, "reading.layers: is True"),
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        refused(message)
    (folder / "config.json").write_text("[1]")
    refused("an object is needed")
    (folder / "config.json").write_text("[" * 100_000)
    refused("cannot be read as JSON")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_doc_to_lora(folder)


def test_an_unconverted_folder_gets_a_hint(source: Path) -> None:
    with pytest.raises(FileNotFoundError, match="imprint checkpoint convert"):
        load_doc_to_lora(source.parent)
