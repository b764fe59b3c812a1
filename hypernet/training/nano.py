"""`imprint train nano`: tokenizer, base, hypernetwork, export, in one resumable run.

Stages write to a work folder: `base_model/` (tokenizer and, at the end, the base in the Hugging Face layout),
`hypernetwork/`, `*.pt` checkpoints and `*.jsonl` curves. A stage whose result is there is not run again. On a CPU each
process is pinned to a core of its own, with one thread: two OpenMP threads stall whenever another job takes a core.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hypernet.training.base import train_base
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


def train_nano(work: Path, base_minutes: float, hypernet_minutes: float, processes: int = 1) -> None:
    """Train whatever is not there yet in `work`.

    Raises RuntimeError where a training process fails; call again to go on from the last checkpoint.
    """
    base = work / "base_model"
    if not (base / "tokenizer.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        train_tokenizer(base)
    if not (base / "model.safetensors").exists():
        _run_ranks("base", work, base_minutes, processes)
    if not (work / "hypernetwork" / "model.safetensors").exists():
        _run_ranks("hypernetwork", work, hypernet_minutes, processes)


def _tokenizer(work: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(work / "base_model")


def _rank_main(stage: str, work: Path, minutes: float) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1 - rank % len(cores)]})
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    tokenizer = _tokenizer(work)
    if stage == "base":
        model = train_base(tokenizer, work, minutes, seed=1 + rank)
        if rank == 0:
            model.generation_config = GenerationConfig(
                eos_token_id=tokenizer.convert_tokens_to_ids(END), pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
                do_sample=False)
            model.save_pretrained(work / "base_model")
    else:
        from hypernet.training.hypernetwork import train_hypernetwork

        train_hypernetwork(work / "base_model", work, minutes, seed=1001 + rank)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
