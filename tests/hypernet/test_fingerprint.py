"""Fingerprints: the same for the same content, another for any change that changes what a model computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hypernet.fingerprint import fingerprint_folder


def test_copy_has_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for i, folder in enumerate(pair):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        (copy / "README.md").write_text("a note")
        assert fingerprint_folder(copy) == fingerprint_folder(folder) == fingerprint_folder(str(folder))
        assert len(fingerprint_folder(copy)) == 64


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_any_change_shows(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(pair[0], tmp_path / "copy")
    file = tmp_path / "copy" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert fingerprint_folder(tmp_path / "copy") != fingerprint_folder(pair[0])


def test_names_count(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "other.safetensors")
    assert fingerprint_folder(tmp_path / "copy") != fingerprint_folder(pair[1])


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no .safetensors"):
        fingerprint_folder(tmp_path)
