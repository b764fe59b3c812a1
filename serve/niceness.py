"""Background work steps back for what requests wait for."""

from __future__ import annotations

import os
import threading

BACKGROUND = 10
"""Beside a busy engine such a thread gets about a tenth of a core."""


def step_back() -> None:
    """Lower the calling thread's priority for good: on Linux each thread has its own."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(BACKGROUND, os.getpriority(os.PRIO_PROCESS, thread)))
