"""What the router's tests share: the real encoder, and documents that are near misses of each other."""

from __future__ import annotations

import pytest

from router.embed import MiniLmEncoder


@pytest.fixture(scope="session")
def encoder() -> MiniLmEncoder:
    return MiniLmEncoder.load(threads=1)
