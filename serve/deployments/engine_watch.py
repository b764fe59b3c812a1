"""Ends an engine replica whose vLLM processes died, so that Ray starts another at once.

Ray asks for a replica's health every few seconds and believes only the third bad answer; meanwhile requests would still
be sent to it. The end of its process is noticed immediately.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException

logger = logging.getLogger(__name__)

LOOK_S = 0.2
LEAVE_S = 0.5  # for requests in flight to get their error
EXIT_STATUS = 70  # EX_SOFTWARE


def leave_process() -> None:
    """Ends this process at once. Not by SystemExit: the event loop belongs to Ray, which would only report it."""
    logging.shutdown()
    os._exit(EXIT_STATUS)


async def end_with_engine(
    dead: Callable[[], bool], stopping: Callable[[], bool], leave: Callable[[], None] = leave_process
) -> None:
    """Ends this process when ``dead()`` turns true, unless ``stopping()``. Does nothing outside a Ray replica."""
    if not in_replica():
        return
    while not dead():
        if stopping():
            return
        await asyncio.sleep(LOOK_S)
    if stopping():
        return
    logger.error("vLLM's engine has died; this replica ends, and Ray starts another")
    await asyncio.sleep(LEAVE_S)
    leave()


def in_replica() -> bool:
    """Whether this process is a replica of Ray Serve."""
    try:
        ray_serve.get_replica_context()
    except RayServeException:
        return False
    return True
