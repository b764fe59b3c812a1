"""`imprint checkpoint convert`, as a person calls it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from typer.testing import CliRunner, Result

from serve.cli import app
from tests.hypernet.published_helpers import Shape, save_doc_to_lora, save_text_to_lora, write_base


def run(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


class MakesFolder:
    """Unpickling this makes a folder, where unpickling runs code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_doc_to_lora(tmp_path: Path) -> None:
    source = save_doc_to_lora(tmp_path / "source" / "pytorch_model.bin", Shape(), base_name="google/gemma-2-2b-it")
    result = run("convert", source, tmp_path / "out", "--base", write_base(tmp_path / "base", "gemma2"),
                 "--chunk-tokens", 512)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert "doc-to-lora for google/gemma-2-2b-it" in result.stderr and digest in result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["reading"]["chunk_tokens"] == 512 and config["reading"]["max_tokens"] == 8192
    assert len(config["base_fingerprint"]) == 64


def test_text_to_lora(tmp_path: Path) -> None:
    result = run("convert", save_text_to_lora(tmp_path / "source"), tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "text-to-lora for example/tiny: 3 layers, v_proj, q_proj, rank 4" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_errors_end_with_one_line_and_leave_nothing(tmp_path: Path) -> None:
    witness, source = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    torch.save({"x": MakesFolder(witness)}, source)
    hostile = run("convert", source, tmp_path / "out")
    assert hostile.exit_code == 1 and "refused, since it names posix.mkdir" in hostile.stderr
    assert not witness.exists()
    source.write_bytes(b"PK\x03\x04 not really")
    broken = run("convert", source, tmp_path / "out")
    assert broken.exit_code == 1 and "truncated" in broken.stderr
    missing = run("convert", tmp_path / "none", tmp_path / "out")
    assert missing.exit_code == 1 and "does not exist" in missing.stderr
    for result in (hostile, broken, missing):
        assert "imprint: " in result.stderr and "Traceback" not in result.stderr and result.stdout == ""
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_full_destination_is_left_alone(tmp_path: Path) -> None:
    source = save_doc_to_lora(tmp_path / "source" / "pytorch_model.bin", Shape())
    assert run("convert", source, tmp_path / "source").exit_code == 1
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["pytorch_model.bin"]


def test_help_names_both_kinds() -> None:
    text = run("convert", "--help").stdout
    assert "Doc-to-LoRA" in text and "Text-to-LoRA" in text
