"""A converted Doc-to-LoRA checkpoint in the generator: adapters for tiny bases of every supported architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hypernet.documents import DocumentText
from hypernet.encoder import load_base
from hypernet.fingerprint import fingerprint_folder
from hypernet.generate import CheckpointMismatch, HypernetGenerator
from hypernet.lora import validate_folder
from hypernet.published.convert import convert
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.frames import Frame, frame_for
from hypernet.published.reader import DocToLoraReader
from hypernet.reader import pad
from tests.hypernet.helpers import deltas
from tests.hypernet.published_helpers import (
    BASES,
    INNER,
    LAYERS,
    Shape,
    save_doc_to_lora,
    save_text_to_lora,
    write_base,
)
from tests.tiny_models import make_tokenizer

SHORT = DocumentText("Lamp", "The lamp costs $4.20.")
LONG = DocumentText("Lamps", " ".join(f"Lamp {i} stands in room {i}0." for i in range(1, 9)))


def make_base(folder: Path, name: str) -> Path:
    make_tokenizer().save_pretrained(folder)
    return write_base(folder, name)


def make_checkpoint(folder: Path, shape: Shape | None = None, base: Path | None = None,
                    base_name: str = "example/tiny", **encoder: Any) -> Path:
    save_doc_to_lora(folder / "source" / "pytorch_model.bin", shape or Shape(), base_name=base_name, **encoder)
    convert(folder / "source", folder / "converted", base, chunk_tokens=120)
    return folder / "converted"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "gemma2")


@pytest.fixture(scope="module")
def generator(base: Path, tmp_path_factory: pytest.TempPathFactory) -> HypernetGenerator:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), base=base)
    return HypernetGenerator.load(checkpoint, base, max_rank=16, threads=1)


@pytest.mark.parametrize("name", sorted(BASES))
def test_every_architecture_gets_valid_adapters(name: str, tmp_path: Path) -> None:
    own = make_base(tmp_path / "base", name)
    shape = Shape(modules=("down_proj", "q_proj", "v_proj", "o_proj"))
    made, = HypernetGenerator.load(make_checkpoint(tmp_path, shape), own, max_rank=8).generate([SHORT])
    made.parts[0].lora.save(tmp_path / "adapter")
    checked = validate_folder(tmp_path / "adapter", AutoConfig.from_pretrained(own), max_rank=8)
    assert checked.rank == 8 and len(checked.tensors) == 4 * LAYERS


def test_ranks_of_chunks_and_bias_add_up(generator: HypernetGenerator) -> None:
    assert generator.limits.chunks == 3  # (3 + 1) * 4 = 16
    short, long = (made.parts[0] for made in generator.generate([SHORT, LONG]))
    assert (len(short.chunks), short.lora.rank) == (1, 8)
    count = len(long.chunks)
    assert 1 < count <= 3 and long.lora.rank == 4 * (count + 1)
    a, b = long.lora.tensors["model.layers.2.mlp.down_proj"]
    assert a.shape == (long.lora.rank, INNER) and b.shape == (32, long.lora.rank)
    assert long.lora.base_model == "example/tiny"


def test_batch_does_not_matter(generator: HypernetGenerator) -> None:
    together = [made.parts[0] for made in generator.generate([SHORT, LONG])]
    for document, made in zip([SHORT, LONG], together, strict=True):
        alone = deltas(generator.generate([document])[0].parts[0].lora)
        for path, update in deltas(made.lora).items():
            assert float((update - alone[path]).abs().max()) < 1e-3 * float(update.abs().max()), path
    one, other = deltas(together[0].lora), deltas(together[1].lora)
    assert max(float((one[path] - other[path]).abs().max()) for path in one) > 0.1


def test_documents_are_read_in_the_bases_own_chat_turn(generator: HypernetGenerator) -> None:
    tokens = generator.reader.frame("  The lamp.\n")
    assert generator.tokenizer.decode(tokens) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nThe lamp.<|im_end|>\n<|im_start|>assistant\n")
    assert all(chunk.tokens <= 512 for part in generator.generate([LONG])[0].parts for chunk in part.chunks)


def test_frames() -> None:
    tokenizer = make_tokenizer()
    # What upstream's templates give for these bases, rendered by transformers.
    assert frame_for("google/gemma-2-2b-it", tokenizer) == Frame(
        "<bos><start_of_turn>user\n\n\n", "<end_of_turn>\n<start_of_turn>model\n")
    assert frame_for("mistralai/Mistral-7B-Instruct-v0.2", tokenizer) == Frame("<s> [INST] \n\n", " [/INST] ")
    no_system = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                 "[{{ messages[0]['content'] }}]")
    tokenizer.chat_template = no_system
    assert frame_for("other/model", tokenizer) == Frame("[", "]")
    for template, message in (("nothing", "leaves out"), (None, "has no chat template"),
                              ("{{ raise_exception('never') }}", "cannot render")):
        tokenizer.chat_template = template
        with pytest.raises(CheckpointInvalid, match=message):
            frame_for("other/model", tokenizer)


def test_a_base_with_another_fingerprint_is_refused(base: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, base=base)
    other = make_base(tmp_path / "other", "gemma2")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(CheckpointMismatch) as caught:
        HypernetGenerator.load(checkpoint, other)
    for part in ("example/tiny", fingerprint_folder(base)[:12], fingerprint_folder(other)[:12]):
        assert part in str(caught.value)


def test_a_base_with_another_name_is_refused(tmp_path: Path) -> None:
    """The name of a base is known where it lies in Hugging Face's cache."""
    cache = tmp_path / "models--google--gemma-2-2b" / "snapshots" / "1"
    checkpoint = make_checkpoint(tmp_path, base_name="google/gemma-2-2b-it")
    with pytest.raises(CheckpointMismatch, match="for google/gemma-2-2b-it, the base is google/gemma-2-2b$"):
        HypernetGenerator.load(checkpoint, make_base(cache, "gemma2"))
    right = tmp_path / "models--google--gemma-2-2b-it" / "snapshots" / "1"
    reader = HypernetGenerator.load(checkpoint, make_base(right, "gemma2")).reader
    assert isinstance(reader, DocToLoraReader) and reader.config.base_model == "google/gemma-2-2b-it"


def test_a_base_of_other_sizes_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3")
    narrow = Shape(widths={"down_proj": (40, 32)})
    with pytest.raises(CheckpointMismatch, match="down_proj 40 to 32.*down_proj 48 to 32"):
        HypernetGenerator.load(make_checkpoint(tmp_path / "narrow", narrow), base)
    with pytest.raises(CheckpointMismatch, match="2 layers of width 32.*3 layers of width 32"):
        HypernetGenerator.load(make_checkpoint(tmp_path / "flat", Shape(layers=2)), base)


def test_too_small_a_rank_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="max_lora_rank 7 is below 8"):
        HypernetGenerator.load(make_checkpoint(tmp_path), base, max_rank=7)


def test_text_to_lora_makes_no_adapters_of_documents(base: Path, tmp_path: Path) -> None:
    convert(save_text_to_lora(tmp_path / "source"), tmp_path / "converted")
    with pytest.raises(CheckpointMismatch, match="task descriptions"):
        HypernetGenerator.load(tmp_path / "converted", base)


def test_an_unconverted_checkpoint_gets_a_hint(base: Path, tmp_path: Path) -> None:
    save_doc_to_lora(tmp_path / "pytorch_model.bin", Shape())
    with pytest.raises(FileNotFoundError, match="imprint checkpoint convert"):
        HypernetGenerator.load(tmp_path, base)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_base_in_bfloat16_is_read_by_a_network_in_float32(base: Path, tmp_path: Path, quantized: bool,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    checkpoint = make_checkpoint(tmp_path, quantize_ctx_encoder=quantized)
    single = DocToLoraReader(checkpoint, base, "")
    monkeypatch.setattr("hypernet.published.reader.load_base",
                        lambda folder, device, dtype: load_base(folder, device, torch.bfloat16))
    half = DocToLoraReader(checkpoint, base, "")
    ids = half.frame(SHORT.text)
    tokens, mask = pad([ids])
    wanted, found = (reader._activations.read(tokens, mask) for reader in (single, half))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        # Loose: weights near an edge of NF4's steps fall on its other side once they are in bfloat16.
        assert float((one.float() - other).norm() / other.norm()) < 0.3
    factors = half.network([one.float() for one in found], mask)["down_proj"]
    made, = half.adapters([ids])
    for layer in range(LAYERS):
        a, b = made.tensors[f"model.layers.{layer}.mlp.down_proj"]
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, factors[0][0, layer]) and torch.equal(b, factors[1][0, layer].mT)
