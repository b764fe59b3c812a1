"""Joins streamed pieces that come close together, so that each costs one hop between processes less."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress


async def coalesce(source: AsyncGenerator[str, None], window_s: float) -> AsyncGenerator[str, None]:
    """Yields the first pieces of ``source`` at once, later ones joined over ``window_s`` seconds.

    Errors of the source are raised after what came before them. Closing this generator cancels and closes the source.
    """
    pieces: list[str] = []
    arrived = asyncio.Event()

    async def pump() -> None:
        try:
            async for piece in source:
                pieces.append(piece)
                arrived.set()
        finally:
            arrived.set()

    pumping = asyncio.create_task(pump())
    try:
        first = True
        while True:
            await arrived.wait()
            if not first:
                await asyncio.wait({pumping}, timeout=window_s)
            arrived.clear()
            joined = "".join(pieces)
            pieces.clear()
            if joined:
                yield joined
                first = False
            elif pumping.done():
                await pumping
                return
            if pumping.done():
                arrived.set()
    finally:
        pumping.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({pumping})
        await source.aclose()
