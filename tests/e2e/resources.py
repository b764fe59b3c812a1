"""Memory and file descriptors of a process tree over time, and whether they are flat."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from tests.processes import tree

Resource = Literal["memory_mib", "fds"]
# How far the straight line through a series may rise from its beginning to its end. The allocators of Python, glibc
# and torch keep what they once had, so that memory moves by some megabytes without any leak.
LIMITS: dict[Resource, tuple[float, float]] = {"memory_mib": (12.0, 0.03), "fds": (4.0, 0.0)}
"""Absolute, and as a share of the mean; the larger one counts."""
WINDOW_S = 90.0
"""Of each span of this length only the least value counts. Once a minute the deployments give freed memory back
(`serve.deployments.heap`); in between, the holes in glibc's heap fill and grow with the load of the moment."""
MIN_PRESENCE = 0.9
"""Of the samples, for a process to be judged by itself; the sum over all processes is judged anyway."""
TOTAL = "all processes"


@dataclass
class ProcessSeries:
    """One process: times in seconds since the measurement began, memory as `memory_mib` finds it, open file
    descriptors."""

    label: str
    pid: int
    times_s: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    fds: list[float] = field(default_factory=list)

    def add(self, at_s: float, memory_mib: float, fds: float) -> None:
        self.times_s.append(at_s)
        self.memory_mib.append(memory_mib)
        self.fds.append(fds)


@dataclass(frozen=True)
class Trend:
    """A resource of a process after warm-up: the fitted line in its first and last window, and the verdict."""

    label: str
    resource: Resource
    begin: float
    end: float
    limit: float

    @property
    def growth(self) -> float:
        return self.end - self.begin

    @property
    def flat(self) -> bool:
        return self.growth <= self.limit


def trend(label: str, resource: Resource, times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """The straight line by least squares through the least values of each `WINDOW_S` of a series.

    Raises ValueError for a series that fills fewer than three such windows.
    """
    times = np.asarray(times_s, dtype=float) - times_s[0]
    windows = int(times[-1] // WINDOW_S)
    if windows < 3:
        raise ValueError(f"{label}: {times[-1]:.0f} s are too few to tell a trend, {3 * WINDOW_S:.0f} are needed")
    least = [min(value for at, value in zip(times, values, strict=True) if at // WINDOW_S == number)
             for number in range(windows)]  # fmt: skip
    slope, intercept = np.polyfit(np.arange(windows), least, 1)
    absolute, share = LIMITS[resource]
    end = intercept + slope * (windows - 1)
    return Trend(label, resource, float(intercept), float(end), max(absolute, share * float(np.mean(values))))


def evaluate(series: Sequence[ProcessSeries], warm_up_s: float) -> list[Trend]:
    """Trends from `warm_up_s` on: of the sum over all processes, and of each one that was there for that time."""
    total: dict[float, list[float]] = {}
    for one in series:
        for at, memory, fds in zip(one.times_s, one.memory_mib, one.fds, strict=True):
            if at >= warm_up_s:
                sums = total.setdefault(at, [0.0, 0.0])
                sums[0] += memory
                sums[1] += fds
    times = sorted(total)
    if len(times) < 3:
        raise ValueError(f"{len(times)} samples after {warm_up_s:g} s are too few to tell a trend")
    found = [trend(TOTAL, "memory_mib", times, [total[at][0] for at in times]),
             trend(TOTAL, "fds", times, [total[at][1] for at in times])]
    for one in series:
        first = next((index for index, at in enumerate(one.times_s) if at >= warm_up_s), len(one.times_s))
        if len(one.times_s) - first >= max(3, MIN_PRESENCE * len(times)):
            label = f"{one.label} ({one.pid})"
            found.append(trend(label, "memory_mib", one.times_s[first:], one.memory_mib[first:]))
            found.append(trend(label, "fds", one.times_s[first:], one.fds[first:]))
    return found


def table(trends: Sequence[Trend]) -> str:
    """For people to read."""
    width = max(len(one.label) for one in trends)
    lines = [f"{'process':{width}}  resource     begin       end    growth     limit"]
    lines += [
        f"{one.label:{width}}  {one.resource:8} {one.begin:9.1f} {one.end:9.1f} {one.growth:+9.2f} {one.limit:9.1f}"
        f"{'' if one.flat else '  GROWS'}"
        for one in trends
    ]
    return "\n".join(lines)


def memory_mib(pid: int) -> float:
    """What a process holds and no file does, in MiB: anonymous, shared and swapped pages, those of several processes by
    equal shares.

    Not its unique set size. That counts pages of libraries too, for as long as no other process has the same library
    loaded: it rose from 459 to 704 MiB when a process that had nothing to do with the measured one ended. Raises
    OSError for a process that is gone or another user's.
    """
    sizes = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(sizes[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem", "SwapPss")) / 1024


@contextmanager
def measured(pid: int, every_s: float) -> Iterator[list[ProcessSeries]]:
    """Sample a process and all its descendants until the block ends."""
    found: dict[tuple[int, float], ProcessSeries] = {}
    series: list[ProcessSeries] = []
    done = threading.Event()
    begun = time.monotonic()

    def sample() -> None:
        while not done.wait(every_s):
            at = round(time.monotonic() - begun, 3)
            for process in tree(pid):
                try:
                    key = (process.pid, process.create_time())
                    memory, fds = memory_mib(process.pid), process.num_fds()
                    if key not in found:
                        found[key] = ProcessSeries(_label(process), process.pid)
                        series.append(found[key])
                except (psutil.Error, OSError):  # it has just ended
                    continue
                found[key].add(at, memory, fds)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield series
    finally:
        done.set()
        thread.join()


def _label(process: psutil.Process) -> str:
    """What a process is, short: the title that it gave itself, its module, script or program."""
    command = process.cmdline()
    if not command or not command[0]:
        return process.name()
    if "::" in command[0]:
        return command[0].split(" ")[0]
    if os.path.basename(command[0]).startswith("python") and "-c" not in command:
        rest = [word for word in command[1:] if not word.startswith("-")]
        return os.path.basename(rest[0]) if rest else process.name()
    return Path(command[0]).name
