"""The texts of API keys: how they are made, read and stored."""

from __future__ import annotations

import hashlib
import hmac
import secrets

_PREFIX = "imp"
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def new_key_text(key_id: str) -> str:
    """The text of a new key: `imp_<unique part of the key's ID>_<256 random bits in base 62>`."""
    number = secrets.randbits(256)
    digits = []
    for _ in range(43):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return f"{_PREFIX}_{key_id.removeprefix('key_')}_{''.join(digits)}"


def key_id_of(text: str) -> str | None:
    """The key ID that a key text names, or None when it is not shaped like a key."""
    parts = text.split("_")
    if len(parts) != 3 or parts[0] != _PREFIX or not (text.isascii() and parts[1].isalnum() and parts[2].isalnum()):
        return None
    return f"key_{parts[1]}"


def hash_key(text: str) -> str:
    """What is stored of a key: SHA-256 (hex). Enough without a slow hash, for the secret has 256 random bits."""
    return hashlib.sha256(text.encode()).hexdigest()


def same_hash(left: str, right: str) -> bool:
    """Compare two hashes in constant time."""
    return hmac.compare_digest(left, right)
