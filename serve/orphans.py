"""Ends child processes whose parent died without a word: vLLM's engine process survives a killed parent for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from functools import cache
from multiprocessing.process import BaseProcess


@cache
def end_with_parent() -> None:
    """Kills this process as soon as the one that started it through `multiprocessing` is gone.

    Does nothing in a process that `multiprocessing` did not start, and nothing when called again.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent,), name="imprint-parent-watch", daemon=True).start()


def _watch(parent: BaseProcess) -> None:
    parent.join()
    # Not SIGTERM: vLLM's handler waits for a parent that will not answer. There is nothing to save.
    os.kill(os.getpid(), signal.SIGKILL)
