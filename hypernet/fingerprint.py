"""The identity of a model or hypernetwork: what an adapter was made for, and by what."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PARTS = (".safetensors", "config.json", "tokenizer.json")


def fingerprint_folder(folder: Path | str) -> str:
    """SHA-256 in hex over the folder's weights, configuration and tokenizer, by name and content.

    Raises FileNotFoundError where the folder holds no safetensors file.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in Path(folder).iterdir() if path.name.endswith(_PARTS))
    if not any(path.suffix == ".safetensors" for path in files):
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    for path in files:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
