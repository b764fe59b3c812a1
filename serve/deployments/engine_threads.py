"""Which cores an engine replica computes on, so that replicas on one machine do not share them."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from serve.config import EngineConfig

_CPUS = Path("/sys/devices/system/cpu")
_held: list[IO[bytes]] = []  # a place is free again when its file is closed, so at the latest when the process ends


def thread_binding(config: EngineConfig) -> str:
    """vLLM's `VLLM_CPU_OMP_THREADS_BIND` for this process.

    What is configured; for `auto` with several replicas on a machine, a part of the cores that no living replica has.
    vLLM's own `auto` would give all of them the same cores. Ray's ranks do not serve: one that replaces a replica may
    start before its predecessor's rank is free.
    """
    replicas = config.most_replicas_per_node
    workers = int(config.extra.get("tensor_parallel_size") or 1) * int(config.extra.get("pipeline_parallel_size") or 1)
    # Workers of one engine would need a share of each NUMA node, which vLLM works out itself.
    if config.threads != "auto" or replicas == 1 or workers > 1:
        return config.threads
    place = take_place(Path(tempfile.gettempdir()) / f"imprint-{os.getuid()}-cores", replicas)
    return ",".join(map(str, share(physical_cores(), replicas, place)))


def take_place(folder: Path, places: int) -> int:
    """The first of `places` numbers that no living process holds, held until this one ends.

    Where all are held, as while a replica that is to stop still finishes its requests, one is shared.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    for place in range(places):
        file = (folder / str(place)).open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            _held.append(file)
            return place
    return os.getpid() % places


def share(cores: Sequence[int], replicas: int, place: int) -> list[int]:
    """The cores of one of `replicas` replicas: neighbours, as even as possible, at least one each even if they are
    too few."""
    if len(cores) < replicas:
        return [cores[place % len(cores)]]
    return list(cores[place * len(cores) // replicas : (place + 1) * len(cores) // replicas])


def physical_cores() -> list[int]:
    """One logical CPU of each physical core that this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    cores: dict[str, int] = {}
    for cpu in allowed:
        siblings = _CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cores.setdefault(siblings.read_text().strip() if siblings.is_file() else str(cpu), cpu)
    return list(cores.values())
