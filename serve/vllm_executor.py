"""vLLM's worker inside vLLM's core process, for a CPU engine of one worker.

vLLM gives a CPU worker a process of its own, because OpenMP reads its environment when it is loaded. Core and worker
then wait for each other by spinning on shared memory, at every step: on a machine with few cores that takes the time
that the model needs. Here the number of threads is set by torch instead, and the cores by the process's affinity.
"""

from __future__ import annotations

import os

import torch
from vllm import envs
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor

EXECUTOR_PATH = "serve.vllm_executor.InlineExecutor"


class InlineExecutor(UniProcExecutor):
    """vLLM's single-process executor on the threads that `VLLM_CPU_OMP_THREADS_BIND` gives its worker.

    `auto` sets how many threads, and leaves to the operating system where they run; a list of cores binds them.
    """

    def _init_executor(self) -> None:
        cores = OMPProcessManager(self.vllm_config).cpu_lists
        if cores:
            torch.set_num_threads(len(cores[0]))
            if envs.VLLM_CPU_OMP_THREADS_BIND != "auto":
                os.sched_setaffinity(0, cores[0])
        super()._init_executor()
