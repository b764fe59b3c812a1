"""Task descriptions to adapters: a Text-to-LoRA checkpoint in the published format with a random encoder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from hypernet.documents import DocumentError
from hypernet.lora import LoraAdapter, validate_folder
from hypernet.published.convert import convert
from hypernet.published.errors import CheckpointInvalid
from hypernet.reader import CheckpointMismatch
from hypernet.tasks import TaskGenerator
from tests.hypernet.helpers import deltas
from tests.hypernet.published_helpers import (
    LAYERS,
    Shape,
    save_doc_to_lora,
    save_text_to_lora,
    text_to_lora_shapes,
    write_base,
    write_encoder,
)

ADD, TRANSLATE = "Add the two numbers.", "Translate the sentence into French."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "mistral")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), base)


@pytest.fixture(scope="module")
def generator(checkpoint: Path, base: Path, encoder: Path) -> TaskGenerator:
    return TaskGenerator(checkpoint, base, str(encoder))


def make_checkpoint(folder: Path, base: Path | None = None, **shape: Any) -> Path:
    convert(save_text_to_lora(folder / "source", text_to_lora_shapes(**shape)), folder / "converted", base=base)
    return folder / "converted"


def apart(one: LoraAdapter, other: LoraAdapter) -> float:
    """The largest difference between two adapters' updates."""
    second = deltas(other)
    return max(float((update - second[path]).abs().max()) for path, update in deltas(one).items())


def test_adapters_are_valid_for_the_base(generator: TaskGenerator, base: Path, tmp_path: Path) -> None:
    made, = generator.generate([ADD])
    made.save(tmp_path)
    checked = validate_folder(tmp_path, AutoConfig.from_pretrained(base), max_rank=4)
    assert (checked.rank, checked.target_modules, len(checked.tensors)) == (4, ("q_proj", "v_proj"), 2 * LAYERS)
    assert made.base_model == "example/tiny"


def test_scaling_is_that_of_rslora(generator: TaskGenerator) -> None:
    """alpha 8 and rank 4: 8 / sqrt(4)."""
    made, = generator.generate([ADD])
    assert made.alpha / made.rank == 4.0


def test_network_reads_the_first_token_scaled_as_in_training(generator: TaskGenerator, encoder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        first = model(**tokenizer([ADD], return_tensors="pt")).last_hidden_state[0, 0]
    embedding = generator.encoder.embed(ADD)
    assert torch.allclose(embedding, first / first.norm() * 24 ** 0.5, atol=1e-5)
    assert float(embedding.norm()) == pytest.approx(24 ** 0.5, rel=1e-5)
    wanted = generator._network.adapter(embedding, 4.0, "example/tiny")
    assert apart(generator.generate([ADD])[0], wanted) < 1e-6


def test_descriptions_end_like_sentences(generator: TaskGenerator) -> None:
    assert generator.encoder.tokens("  Add the two numbers\n") == generator.encoder.tokens("Add the two numbers.")
    assert generator.encoder.tokens("What is 1 + 1?")[:-1][-1] == generator.encoder.tokens("?")[1]


def test_a_description_decides_its_adapter_and_nothing_else_does(generator: TaskGenerator) -> None:
    add, translate, again = generator.generate([ADD, TRANSLATE, ADD])
    assert apart(add, translate) > 1e-2
    assert apart(add, again) == apart(add, generator.generate([ADD])[0]) == 0


def test_empty_and_too_long_descriptions(generator: TaskGenerator) -> None:
    for text in ("", " \n\t"):
        with pytest.raises(DocumentError, match="text: is empty"):
            generator.generate([ADD, text])
    generator.check("a " * 61 + "1")  # 62 tokens and the two around them: as many as the encoder has places
    with pytest.raises(DocumentError, match="task description has 65 tokens; at most 64 are allowed"):
        generator.check("a " * 62 + "1")
    assert generator.max_tokens == 64


def test_what_an_encoder_does_not_know_is_no_error(generator: TaskGenerator) -> None:
    made, = generator.generate(["\U0001f600 \u4f60\u597d"])
    assert all(torch.isfinite(a).all() and torch.isfinite(b).all() for a, b in made.tensors.values())


def test_fingerprint_tells_networks_and_encoders_apart(generator: TaskGenerator, checkpoint: Path, base: Path,
                                                       encoder: Path, tmp_path: Path) -> None:
    other = write_encoder(tmp_path / "encoder", seed=1)
    assert TaskGenerator(checkpoint, base, str(encoder)).fingerprint == generator.fingerprint
    assert TaskGenerator(checkpoint, base, str(other)).fingerprint != generator.fingerprint
    changed = make_checkpoint(tmp_path, rank=4, head_in=12)
    assert TaskGenerator(changed, base, str(encoder)).fingerprint != generator.fingerprint


def test_an_encoder_of_another_width_is_refused(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    narrow = write_encoder(tmp_path / "narrow", width=16)
    with pytest.raises(CheckpointMismatch, match="width 24 by Alibaba-NLP/gte-large-en-v1.5; the encoder .*narrow "
                                                 "gives width 16"):
        TaskGenerator(checkpoint, base, str(narrow))


def test_an_encoder_of_another_name_is_pointed_out(checkpoint: Path, base: Path, encoder: Path, tmp_path: Path,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    message = "was trained with the encoder Alibaba-NLP/gte-large-en-v1.5"
    with caplog.at_level(logging.WARNING):
        TaskGenerator(checkpoint, base, str(encoder))
        assert message in caplog.text
        caplog.clear()
        TaskGenerator(checkpoint, base, str(write_encoder(tmp_path / "gte-large-en-v1.5")))
        assert message not in caplog.text


def test_what_is_no_encoder_is_refused(checkpoint: Path, base: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="is a mistral model, which writes text"):
        TaskGenerator(checkpoint, base, str(base))
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        TaskGenerator(checkpoint, base, str(tmp_path / "nothing" / "here"))
    own = write_encoder(tmp_path / "own")
    fields = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(fields | {
        "model_type": "new", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}))
    (own / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointMismatch, match="runs only with trust_remote_code"):
        TaskGenerator(checkpoint, base, str(own))
    assert not (tmp_path / "ran").exists()


def test_another_base_is_refused(checkpoint: Path, encoder: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", "qwen3")
    with pytest.raises(CheckpointMismatch, match="for example/tiny with fingerprint .*, the base in .*other is"):
        TaskGenerator(checkpoint, other, str(encoder))
    unnamed = make_checkpoint(tmp_path / "unnamed", layers=2)
    with pytest.raises(CheckpointMismatch, match=r"\(2 layers of width 32, v_proj 32 to 16.*has 3 layers of width 32"):
        TaskGenerator(unnamed, other, str(encoder))


def test_a_rank_above_the_cap_is_refused(checkpoint: Path, base: Path, encoder: Path) -> None:
    assert TaskGenerator(checkpoint, base, str(encoder), max_rank=4).config.sizes.rank == 4
    with pytest.raises(CheckpointMismatch, match="max_lora_rank 3 is below 4"):
        TaskGenerator(checkpoint, base, str(encoder), max_rank=3)


def test_a_document_network_is_refused(base: Path, encoder: Path, tmp_path: Path) -> None:
    save_doc_to_lora(tmp_path / "source" / "pytorch_model.bin", Shape())
    convert(tmp_path / "source", tmp_path / "converted")
    with pytest.raises(CheckpointInvalid, match="has the format 'doc-to-lora'; 'text-to-lora' is needed"):
        TaskGenerator(tmp_path / "converted", base, str(encoder))
