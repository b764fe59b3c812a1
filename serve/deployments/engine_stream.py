"""How often a stream is sent: every token while the engine has little to do, several at once when it has much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

# Each stream adds this much to the pause of all. Chosen so that 8 streams send about every token of a small model, and
# 32 about every third: `benchmarks/serving` measures it.
_PAUSE_PER_STREAM_S = 0.0015
_LONGEST_PAUSE_S = 0.05
_FINISHED = '"finish_reason":"'  # in text of the model the quotes would be escaped


class Pace:
    """The pause between two pieces of a stream, by how many streams an engine has now. For one event loop."""

    def __init__(self) -> None:
        self._streams = 0

    def __enter__(self) -> None:
        self._streams += 1

    def __exit__(self, *_: object) -> None:
        self._streams -= 1

    @property
    def pause_s(self) -> float:
        """0 for a stream that is alone."""
        return min(_LONGEST_PAUSE_S, _PAUSE_PER_STREAM_S * max(0, self._streams - 1))


async def coalesce(source: AsyncGenerator[str, None], pace: Pace, choices: int = 1) -> AsyncGenerator[str, None]:
    """Yields the server-sent events of ``source``: the first ones at once, then at the pace of ``pace``, and in one
    piece what follows the end of the last of ``choices`` choices.

    ``source`` is not asked during a pause. vLLM joins the tokens of that time into one event, which saves the work of
    an event for each token, here and in every process after this one. Errors of the source are passed on. Closing
    this generator closes the source.
    """
    try:
        with pace:
            sent = 0
            async for piece in source:
                choices -= piece.count(_FINISHED)
                if choices <= 0:
                    yield "".join([piece, *[rest async for rest in source]])
                    return
                yield piece
                sent += 1
                if sent > 1 and pace.pause_s:  # the first event only names the role
                    await asyncio.sleep(pace.pause_s)
    finally:
        await source.aclose()
