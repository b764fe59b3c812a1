"""What the package brings along: the calibration of a fresh tenant, and questions that no document is meant to answer.

Both are data. `benchmarks/router_calibration.py` fits the calibration.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from router.calibrate import Calibration

_DATA = Path(__file__).parent / "data"
CALIBRATION_FILE = _DATA / "calibration.json"


@cache
def general_chat() -> tuple[str, ...]:
    """Questions and remarks of general chat, one of each."""
    return tuple((_DATA / "general_chat.txt").read_text(encoding="utf-8").split("\n")[:-1])


@cache
def shipped_calibration(encoder: str, encoder_version: str) -> Calibration | None:
    """The calibration for this encoder and any generator; None where none is shipped for it."""
    if not CALIBRATION_FILE.exists():
        return None
    found = Calibration.from_json(json.loads(CALIBRATION_FILE.read_text(encoding="utf-8")))
    return found if (found.encoder, found.encoder_version) == (encoder, encoder_version) else None
