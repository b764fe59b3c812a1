"""The shipped pair: a small base model and its hypernetwork, as package data."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def base_dir() -> Path:
    """The base, a Hugging Face folder."""
    return _HERE / "base"


def hypernet_dir() -> Path:
    """The hypernetwork trained for it."""
    return _HERE / "hypernetwork"
