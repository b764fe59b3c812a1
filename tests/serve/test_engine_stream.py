"""How streams leave the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from serve.deployments.engine_stream import Pace, coalesce


async def test_events_pass_as_they_come_and_so_do_errors() -> None:
    closed = False

    async def source() -> AsyncGenerator[str, None]:
        nonlocal closed
        try:
            for index in range(4):
                yield str(index)
            raise ValueError("broken")
        finally:
            closed = True

    pieces: list[str] = []
    pace = Pace()
    with pytest.raises(ValueError, match="broken"):
        async for piece in coalesce(source(), pace):
            pieces.append(piece)
    assert pieces == ["0", "1", "2", "3"] and closed
    assert pace.pause_s == 0


@pytest.mark.parametrize("choices", [1, 2])
async def test_what_follows_the_last_choices_end_is_one_piece(choices: int) -> None:
    ends = ['{"finish_reason":"stop"}'] * choices

    async def source() -> AsyncGenerator[str, None]:
        for piece in ["a", *ends, "usage", "[DONE]"]:
            yield piece

    pieces = [piece async for piece in coalesce(source(), Pace(), choices)]
    assert pieces == ["a", *ends[:-1], ends[-1] + "usage[DONE]"]


async def test_more_streams_are_slower_and_leave_no_trace() -> None:
    pace = Pace()
    gate = asyncio.Event()

    async def source() -> AsyncGenerator[str, None]:
        yield "first"
        await gate.wait()
        yield "second"

    streams = [coalesce(source(), pace) for _ in range(8)]
    for stream in streams:
        assert await anext(stream) == "first"
    assert 0 < pace.pause_s < 0.05
    for stream in streams:
        await stream.aclose()
    assert pace.pause_s == 0
