"""Grouping of chunks into parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypernet.documents import Chunk
from hypernet.parts import PartLimits, group


@given(count=st.integers(1, 60), size=st.integers(1, 9))
def test_parts_are_few_even_and_in_order(count: int, size: int) -> None:
    chunks = [Chunk(str(i), i, i + 1) for i in range(count)]
    parts = group(chunks, PartLimits(size, 60))
    assert [chunk for part in parts for chunk in part] == chunks
    sizes = [len(part) for part in parts]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-count // size)


def test_more_chunks_than_the_limits_allow() -> None:
    with pytest.raises(ValueError, match="7 chunks; at most 6"):
        group([Chunk("", i, i + 1) for i in range(7)], PartLimits(3, 2))
