"""`imprint train nano`: tokenizer, base, base and hypernetwork together, hypernetwork, in one resumable run.

Stages write to a work folder: `start/` (tokenizer, and the base that learned to read), `base/` and
`joint_hypernetwork/` (both after the joint stage), `hypernetwork/` (finished on the frozen base), `*.pt` checkpoints
and `*.jsonl` curves.
`base/` and `hypernetwork/` are what ships. A stage whose result is there is not run again. On a CPU each process is
pinned to a core of its own, with one thread: two OpenMP threads stall whenever another job takes a core.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hypernet.perceiver import Hypernetwork
from hypernet.training.base import train_base
from hypernet.training.hypernetwork import train_hypernetwork
from hypernet.training.joint import train_joint
from hypernet.training.tokenizer import END, PAD, train_tokenizer


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _run_ranks(stage: str, work: Path, minutes: float, processes: int) -> None:
    """Run `python -m hypernet.training.nano STAGE ...` once per process and wait; raises where one fails."""
    port = _free_port()
    children = []
    for rank in range(processes):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                                    "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "hypernet.training.nano", stage, str(work), str(minutes)]
        children.append(subprocess.Popen(command, env=environment))
    try:
        failed = [child.pid for child in children if child.wait() != 0]
    except BaseException:
        for child in children:
            child.terminate()
        raise
    if failed:
        raise RuntimeError(f"{stage}: {len(failed)} of {processes} training processes failed")


def train_nano(work: Path, base_minutes: float, joint_minutes: float, hypernet_minutes: float,
               processes: int = 1) -> None:
    """Train whatever is not there yet in `work`.

    Raises RuntimeError where a training process fails; call again to go on from the last checkpoint.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "start" / "tokenizer.json").exists():
        train_tokenizer(work / "start")
    stages = (("base", "start", base_minutes), ("joint", "base", joint_minutes),
              ("hypernetwork", "hypernetwork", hypernet_minutes))
    for stage, result, minutes in stages:
        if not (work / result / "model.safetensors").exists():
            _run_ranks(stage, work, minutes, processes)


def _save_network(network: Hypernetwork, folder: Path) -> None:
    """In one step, so that a kill cannot leave half a result that counts as finished."""
    partial = folder.with_suffix(".partial")
    network.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(END), pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        do_sample=False)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _rank_main(stage: str, work: Path, minutes: float) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1 - rank % len(cores)]})
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    tokenizer = AutoTokenizer.from_pretrained(work / "start")
    if stage == "base":
        model = train_base(tokenizer, work, minutes, seed=1 + rank)
        if rank == 0:
            _save_base(model, tokenizer, work / "start")
    elif stage == "joint":
        model, network = train_joint(work / "start", work, minutes, seed=501 + rank)
        if rank == 0:
            _save_network(network, work / "joint_hypernetwork")
            _save_base(model, tokenizer, work / "base")
    else:
        network = train_hypernetwork(work / "base", work, minutes, seed=1001 + rank,
                                     start=work / "joint_hypernetwork" / "model.safetensors")
        if rank == 0:
            _save_network(network, work / "hypernetwork")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
