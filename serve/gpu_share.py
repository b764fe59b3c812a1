"""How Ray divides the cluster's GPUs among engine and generator replicas.

A share only decides which replicas meet on a GPU and what they see; Ray does not hold a process to it. What each takes
of the memory is in `serve.gpu_memory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import metadata

from serve.config import ConfigError, ImprintConfig


@dataclass(frozen=True, slots=True)
class GpuShares:
    """`num_gpus` of one replica; 0 hides all GPUs from it."""

    engine: float
    generator: float


def gpu_shares(config: ImprintConfig, gpus: float) -> GpuShares:
    """Shares that let every replica start on a cluster with `gpus` GPUs.

    With a GPU for each replica all get a whole one; else as few as possible meet on one. Raises ConfigError where
    engines that need several GPUs each do not find them.
    """
    engines, generators = config.engine.most_replicas, config.generator.num_replicas
    each = int(config.engine.extra.get("tensor_parallel_size") or 1)
    whole = math.floor(gpus)
    if whole < 1:
        return GpuShares(0, 0)
    if each > 1:
        left = whole - each * engines
        if left < 0:
            raise ConfigError(f"engine.extra.tensor_parallel_size: {engines} replica(s) of {each} GPUs each need "
                              f"{each * engines}; the cluster has {whole}")
        return GpuShares(each, _share(generators, left))
    share = _share(engines + generators, whole)
    return GpuShares(share, share)


def cluster_gpus() -> float:
    """GPUs of the Ray cluster; 0 where Ray does not run, or where the CPU engine is installed."""
    import ray

    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return 0
    return float(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0


def _share(replicas: int, gpus: int) -> float:
    if not gpus:
        return 0
    together = math.ceil(replicas / gpus)
    # Ray counts in ten-thousandths; rounded down, or the last replica would not fit.
    return math.floor(10_000 / together) / 10_000
