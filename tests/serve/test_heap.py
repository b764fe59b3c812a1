"""Memory that a process has freed goes back to the operating system."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: freezing the test run's objects would be for good.
_PROGRAM = """
import gc, os, time
from pathlib import Path
from serve.deployments.heap import tend_heap

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

tend_heap(every_s=0.2)
tend_heap(every_s=0.2)
held = [bytes(60_000) for _ in range(4000)]
full = resident_mib()
last = held[-1]  # above it nothing is free, so glibc alone gives nothing back
del held
freed = resident_mib()
deadline = time.monotonic() + 20
while resident_mib() > full - 150 and time.monotonic() < deadline:
    time.sleep(0.1)
print(full - freed < 150, full - resident_mib() > 150, gc.get_freeze_count() > 1000, len(last))
"""


def test_freed_memory_is_given_back_and_loaded_objects_are_frozen() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "True", "True", "60000"], done.stdout
