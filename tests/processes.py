"""Killing processes that tests have started."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import psutil

# What a test starts has a process group of its own, so Ctrl+C leaves its end to the fixture, but no session of its own:
# with kernel.sched_autogroup_enabled Linux shares processors among sessions first, and beside busy engines with bound
# threads a process of another session was seen to wait 5 to 20 seconds for a processor (Linux 6.18, two cores).
OWN_GROUP = 0


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants; empty where it has ended and been waited for."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process], timeout_s: float = 10) -> None:
    """kill -9 of all at once, then wait until they have ended, at most `timeout_s` seconds."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=timeout_s)


def lives(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended counts as such also before it has been waited for."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
