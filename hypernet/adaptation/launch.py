"""Starts a training: checks the folder, runs one process or several, and writes the model card.

Several processes on this machine are started here. On several machines start each by torchrun, with the settings that
a first call wrote: `torchrun ... -m hypernet.adaptation.launch OUT/training/settings.json`.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hypernet.adaptation.base import FrozenBase, base_folder
from hypernet.adaptation.card import Data, card, write_card
from hypernet.adaptation.corpus import Corpus, cut, read_documents
from hypernet.adaptation.evaluate import Evaluation
from hypernet.adaptation.questions import QuestionStore
from hypernet.adaptation.reader import FRAME_SPARE
from hypernet.adaptation.settings import AdaptationSettings, TrainingInputError
from hypernet.adaptation.state import Curve
from hypernet.adaptation.trainer import Outcome, Trainer
from hypernet.adaptation.workers import Place, StopWish, joined, wait_for_all
from hypernet.perceiver import HypernetConfig, Hypernetwork

_QUESTION_ROOM = 64
_FAILED_S, _STOPPED_S = 10.0, 600.0
"""How long the other workers may take to end after one failed, and all of them to finish step and evaluation."""


def prepare(settings: AdaptationSettings) -> AdaptationSettings:
    """Check base, documents and folder before anything heavy; the settings with absolute paths, written to the folder.

    Raises TrainingInputError where the folder holds something else, or a training of other settings.
    """
    base = base_folder(settings.base).absolute()
    documents = tuple(str(Path(path).expanduser().absolute()) for path in settings.documents)
    settings = AdaptationSettings(**{**vars(settings), "base": str(base), "documents": documents,
                                     "out": str(settings.folder.expanduser().absolute())})
    read_documents([Path(path) for path in settings.documents])
    path = settings.work / "settings.json"
    if path.exists() and _begun(settings):
        different = settings.differences(AdaptationSettings.read(path))
        if different:
            raise TrainingInputError(f"out: {settings.out} holds a training with other settings: {', '.join(different)}"
                                     "; give the same ones, or another folder")
    elif settings.folder.is_file() or (not path.exists() and settings.folder.is_dir()
                                       and any(settings.folder.iterdir())):
        raise TrainingInputError(f"out: {settings.out} holds something that is no training; a new or empty folder, or "
                                 "one of an earlier call, is allowed")
    settings.work.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    settings.write(partial)
    partial.replace(path)
    return settings


def _begun(settings: AdaptationSettings) -> bool:
    """Whether an earlier call left more than its settings; one that failed before that binds nobody."""
    return any(settings.work.glob("questions-*.jsonl")) or (settings.work / "state.pt").exists()


def _same_base(settings: AdaptationSettings, base: FrozenBase) -> None:
    path = settings.work / "base.txt"
    if path.exists() and _begun(settings) and path.read_text().strip() != base.fingerprint:
        raise TrainingInputError(f"out: {settings.out} holds a training for a base with fingerprint "
                                 f"{path.read_text()[:12]}, and {base.name} has {base.fingerprint[:12]}; give that "
                                 "base, or another folder")
    path.write_text(base.fingerprint + "\n")


def network_for(settings: AdaptationSettings, base: FrozenBase) -> Hypernetwork:
    """A fresh hypernetwork for the base, from the seed. Raises TrainingInputError where the base lacks the modules."""
    targets = base.targets(settings.targets)
    config = base.model.config
    torch.manual_seed(settings.seed)
    return Hypernetwork(HypernetConfig(
        features=(config.num_hidden_layers + 1) * config.hidden_size, layers=config.num_hidden_layers, targets=targets,
        rank=settings.rank, width=settings.width, heads=settings.heads, reader_blocks=settings.reader_blocks,
        perceiver_blocks=settings.perceiver_blocks, max_tokens=_passage_tokens(settings, base) + _frame_tokens(base),
        chunk_tokens=settings.chunk_tokens, base_fingerprint=base.fingerprint))


def _frame_tokens(base: FrozenBase) -> int:
    return len(base.document_ids("")) + FRAME_SPARE


def _passage_tokens(settings: AdaptationSettings, base: FrozenBase) -> int:
    """Tokens of a passage at most, so that it fits the base together with a question and its answer."""
    room = base.positions - _frame_tokens(base) - _QUESTION_ROOM - settings.answer_tokens
    if room < settings.chunk_tokens:
        raise TrainingInputError(f"chunk_tokens: is {settings.chunk_tokens}; the base reads {base.positions} tokens, "
                                 f"which leaves at most {max(0, room)} for a passage")
    return min(2 * settings.chunk_tokens, room)


def _ask(settings: AdaptationSettings, base: FrozenBase, corpus: Corpus, place: Place) -> QuestionStore:
    store = QuestionStore(settings.work)
    missing = store.missing([*corpus.training, *corpus.held_out])
    # No worker may write before all know what is missing, or they would share it out differently.
    wait_for_all()
    mine = missing[place.rank::place.world]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} passages"),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=place.rank > 0 or not mine) as bar:
        task = bar.add_task("writing questions", total=len(mine))
        store.ask(base, mine, settings.questions, settings.answer_tokens, settings.question_source, place.rank,
                  lambda done: bar.advance(task, done))
    wait_for_all()
    store.refresh()
    return store


def train_here(settings: AdaptationSettings, place: Place) -> Outcome | None:
    """This worker's part of a prepared training; the outcome on worker 0.

    Raises TrainingInputError, TrainingDiverged or OSError. SIGINT and SIGTERM end it after the running step, saved.
    """
    base = FrozenBase(Path(settings.base), settings.device, settings.precision, place.local_rank)
    if place.rank == 0:
        _same_base(settings, base)
    documents = read_documents([Path(path) for path in settings.documents])
    corpus = cut(documents, base.tokenizer, settings.chunk_tokens, _passage_tokens(settings, base), settings.held_out,
                 settings.seed)
    network = network_for(settings, base)
    with joined(place, base.device):
        store = _ask(settings, base, corpus, place)
        training, held_out = store.asked(corpus.training), store.asked(corpus.held_out)
        if len(training) < 2 or len(held_out) < 2:
            raise TrainingInputError(
                f"documents: questions were found for {len(training)} passages to train on and {len(held_out)} "
                "held-out ones, and two of each are needed; give more documents, or another question_source")
        evaluated = Random(settings.seed).sample(held_out, min(len(held_out), settings.evaluate_passages))
        trainer = Trainer(settings, base, network, training, evaluated, corpus.fingerprint, place)
        with StopWish().listening() as stop:
            outcome = trainer.run(stop)
    if outcome is not None:
        data = Data(len(documents), len(training), len(held_out), corpus.by_document, corpus.short, store.sources)
        parameters = sum(p.numel() for p in network.parameters())
        write_card(settings.folder, card(settings, base.name, base.fingerprint, parameters, data, outcome.steps,
                                         outcome.evaluation, outcome.warnings))
    return outcome


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _run_workers(settings: AdaptationSettings) -> None:
    """One process for each worker; raises RuntimeError where one fails, after ending the others."""
    port = _free_port()
    threads = max(1, len(os.sched_getaffinity(0)) // settings.workers)
    children: list[subprocess.Popen[bytes]] = []
    with StopWish().listening() as stop:
        try:
            for rank in range(settings.workers):
                environment = os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(settings.workers),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
                # All are on this machine; without it gloo listens on the address that the host's name stands for.
                environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
                command = [sys.executable, "-m", "hypernet.adaptation.launch", str(settings.work / "settings.json")]
                # A group of their own: Ctrl-C reaches this process alone, which passes it on once.
                children.append(subprocess.Popen(command, env=environment, process_group=0))
            while all(child.poll() in (None, 0) for child in children) and not stop.asked:
                if all(child.poll() == 0 for child in children):
                    return
                time.sleep(0.1)
            if stop.asked:
                return
            failed = sum(child.poll() not in (None, 0) for child in children)
            raise RuntimeError(f"{failed} of {settings.workers} training processes failed; call again to go on")
        finally:
            _end(children, _STOPPED_S if stop.asked else _FAILED_S)


def _end(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    until = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@dataclass(frozen=True)
class Summary:
    """Where a training stands after a call: its folder, steps made of those wanted, and the last evaluation."""

    folder: Path
    steps: int
    wanted: int
    evaluation: Evaluation | None


def train(settings: AdaptationSettings, tell: Callable[[str], None] = lambda _text: None) -> Summary:
    """Train what `settings` describe, or go on with it; `tell` hears what is done.

    SIGINT and SIGTERM end it early, saved. Raises TrainingInputError, TrainingDiverged, or RuntimeError where a worker
    process fails.
    """
    settings = prepare(settings)
    tell(f"training a hypernetwork for {settings.base} in {settings.out}")
    if settings.workers == 1:
        train_here(settings, Place())
    else:
        _run_workers(settings)
    lines = Curve(settings.work / "evaluation.jsonl").read()
    evaluation = Evaluation.from_json(lines[-1]) if lines else None
    return Summary(settings.folder, evaluation.step if evaluation else 0, settings.steps, evaluation)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        train_here(AdaptationSettings.read(Path(sys.argv[1])), Place.from_environment())
    except TrainingInputError as wrong:
        print(f"imprint: {wrong}", file=sys.stderr)
        sys.exit(2)
