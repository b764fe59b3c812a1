"""Whole trainings on tiny random bases: learning, being killed and going on, several processes, the result in use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hypernet.adaptation import launch, trainer
from hypernet.adaptation.launch import train
from hypernet.adaptation.questions import QuestionStore
from hypernet.adaptation.reader import TemplateReader
from hypernet.adaptation.settings import AdaptationSettings, TrainingInputError
from hypernet.adaptation.state import Curve
from hypernet.adaptation.trainer import TrainingDiverged
from hypernet.documents import DocumentText, chunk_document
from hypernet.encoder import load_base
from hypernet.fingerprint import fingerprint_folder
from hypernet.inject import adapted
from hypernet.lora import factors_of, validate_folder
from hypernet.reader import CheckpointMismatch
from tests.hypernet.published_helpers import write_base
from tests.tiny_models import make_base, make_tokenizer

ROOT = Path(__file__).parents[2]
KILLED_AT_STEP_6 = """
import os, signal, sys
from pathlib import Path
from hypernet.adaptation import launch, trainer
from hypernet.adaptation.settings import AdaptationSettings
real = trainer.Trainer._one_step
def one_step(self, stop):
    if self.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, stop)
trainer.Trainer._one_step = one_step
launch.train_here(AdaptationSettings.read(Path(sys.argv[1])), launch.Place())
"""


def llama(folder: Path) -> Path:
    """A tiny Llama with the tiny tokenizer."""
    make_tokenizer().save_pretrained(write_base(folder, "llama"))
    return folder


def qwen3(folder: Path) -> Path:
    """The same of Qwen3's shape."""
    make_tokenizer().save_pretrained(write_base(folder, "qwen3"))
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = Random(0)
    path = tmp_path_factory.mktemp("documents") / "lamps.jsonl"
    texts = [f"Price: {rng.randint(10, 99)} euros.\nColour: {rng.choice(('red', 'blue'))}." for _ in range(12)]
    path.write_text("".join(json.dumps({"title": f"Lamp {i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def settings(base: Path, documents: Path, out: Path, **changes: object) -> AdaptationSettings:
    """A training of a few seconds."""
    fields: dict = {
        "base": str(base), "documents": (str(documents),), "out": str(out), "chunk_tokens": 64, "questions": 2,
        "answer_tokens": 6, "question_source": "templates", "held_out": 0.25, "rank": 4, "width": 32, "heads": 2,
        "reader_blocks": 1, "perceiver_blocks": 1, "steps": 12, "warmup_steps": 2, "learning_rate": 5e-3,
        "batch_chunks": 4, "questions_a_group": 2, "accumulation": 1, "single_share": 0.5, "most_chunks": 2,
        "evaluate_every": 6, "save_every": 4, "log_every": 1, "device": "cpu", "precision": "float32"}
    return AdaptationSettings(**fields | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def finished(base: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole training, never interrupted. Tests must not change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done = train(settings(base, documents, out))
    assert done.steps == done.wanted == 12 and done.evaluation is not None
    return out


def steps_of(out: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"}
            for line in Curve(out / "training" / "steps.jsonl").read()]


def assert_same_training(out: Path, other: Path) -> None:
    assert steps_of(out) == steps_of(other)
    one, two = load_file(out / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("make", [make_base, qwen3])
def test_some_seconds_lower_the_loss(make: object, documents: Path, tmp_path: Path) -> None:
    base = make(tmp_path / "base")  # type: ignore[operator]
    train(settings(base, documents, tmp_path / "out", steps=40, evaluate_every=100, single_share=1.0, l1=0.0))
    losses = [line["divergence"] for line in steps_of(tmp_path / "out")]
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])


def test_figures_and_card(finished: Path) -> None:
    lines = Curve(finished / "training" / "evaluation.jsonl").read()
    assert [line["step"] for line in lines] == [6, 12]
    ways = lines[-1]["log_probability"]
    assert all(ways[way] < 0 for way in ("in_context", "matched", "wrong", "base", "several"))
    assert ways["matched"] - ways["wrong"] == pytest.approx(lines[-1]["margin"])
    card = (finished / "README.md").read_text()
    assert "Hypernetwork for tiny-llama" in card and "12 of 12 steps" in card
    assert f"| its adapter | {ways['matched']:.3f} |" in card
    assert {line["passages"] for line in steps_of(finished)} == {1, 2}
    assert sorted(path.name for path in finished.iterdir()) == ["README.md", "config.json", "model.safetensors",
                                                                "training"]


def test_the_result_makes_valid_adapters(finished: Path, base: Path, tmp_path: Path) -> None:
    reader = TemplateReader(finished, base, fingerprint_folder(base))
    document = Path(__file__).read_text()[:400]
    chunks = chunk_document(DocumentText("A file", document), reader.tokenizer, reader.chunk_tokens,
                            reader.max_tokens, 50)
    ids = [reader.frame(chunk.text) for chunk in chunks]
    assert len(ids) > 2 and all(len(row) <= reader.network.config.max_tokens for row in ids)
    text = reader.tokenizer.decode(ids[0])
    assert text.startswith("<|im_start|>") and "user\n" in text and "A file" in text
    adapters = reader.adapters(ids)
    lora = reader.join(adapters[:2])
    assert lora.rank == reader.rank(2) == 8 and lora.base_model == "tiny-llama"
    lora.save(tmp_path / "adapter")
    loaded = validate_folder(tmp_path / "adapter", AutoConfig.from_pretrained(base), max_rank=8)
    model, tokenizer = load_base(base)
    ids_in = torch.tensor([tokenizer.encode("What is the price?")])
    with torch.no_grad():
        plain = model(ids_in).logits
        with adapted(model, factors_of([loaded])):
            ours = model(ids_in).logits
    from peft import PeftModel
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(theirs(ids_in).logits, ours, atol=1e-4)
    assert not torch.allclose(plain, ours, atol=1e-3)


def test_another_base_cannot_use_it(finished: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other")
    with pytest.raises(CheckpointMismatch, match="was trained for tiny-llama with fingerprint"):
        TemplateReader(finished, other, fingerprint_folder(other))


def test_killed_and_resumed_is_the_same_training(finished: Path, base: Path, documents: Path, tmp_path: Path) -> None:
    """SIGKILL between two saved states: the steps after the last one are made again, on the same data."""
    out = tmp_path / "out"
    launch.prepare(settings(base, documents, out))
    command = [sys.executable, "-c", KILLED_AT_STEP_6, str(out / "training" / "settings.json")]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    assert [line["step"] for line in steps_of(out)] == [1, 2, 3, 4, 5, 6]
    questions = (out / "training" / "questions-0.jsonl").read_bytes()
    saved = torch.load(out / "training" / "state.pt", weights_only=True)
    assert saved["step"] == 4 and saved["position"] == {"epoch": 1, "at": 7}
    done = train(settings(base, documents, out))
    assert done.steps == 12
    assert (out / "training" / "questions-0.jsonl").read_bytes() == questions
    assert_same_training(out, finished)


def test_asked_to_stop_it_saves_and_goes_on(finished: Path, base: Path, documents: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer.Trainer._one_step

    def signalled(self: trainer.Trainer, stop: bool) -> tuple:
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, stop)

    monkeypatch.setattr(trainer.Trainer, "_one_step", signalled)
    done = train(settings(base, documents, tmp_path / "out"))
    assert done.steps == 8 and (tmp_path / "out" / "README.md").exists()
    monkeypatch.undo()
    assert train(settings(base, documents, tmp_path / "out")).steps == 12
    assert_same_training(tmp_path / "out", finished)


def test_a_finished_training_can_be_made_longer(finished: Path, base: Path, documents: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    again = train(settings(base, documents, tmp_path / "out"))
    assert again.steps == 12
    assert_same_training(tmp_path / "out", finished)
    longer = train(settings(base, documents, tmp_path / "out", steps=14))
    assert longer.steps == 14
    assert [line["step"] for line in Curve(tmp_path / "out" / "training" / "evaluation.jsonl").read()] == [6, 12, 14]


def test_two_processes_share_each_step(base: Path, documents: Path, tmp_path: Path) -> None:
    done = train(settings(base, documents, tmp_path / "out", workers=2, steps=4, single_share=1.0, l1=0.0))
    assert done.steps == 4
    work = tmp_path / "out" / "training"
    keys = [{json.loads(line)["passage"] for line in path.read_text().splitlines()}
            for path in sorted(work.glob("questions-*.jsonl"))]
    assert len(keys) == 2 and not keys[0] & keys[1] and len(keys[0] | keys[1]) == 12
    # Twice the passages of one process: 4 a step of each.
    assert [(line["epoch"], line["at"]) for line in steps_of(tmp_path / "out")] == [(0, 8), (1, 7), (2, 6), (3, 5)]
    alone = train(settings(base, documents, tmp_path / "alone", batch_chunks=8, steps=4, single_share=1.0, l1=0.0))
    assert alone.steps == 4
    for one, other in zip(steps_of(tmp_path / "out"), steps_of(tmp_path / "alone"), strict=True):
        assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-3)


def test_a_worker_that_fails_ends_the_training(base: Path, documents: Path, tmp_path: Path) -> None:
    wanted = settings(base, documents, tmp_path / "out", workers=2, targets=("c_proj",))
    with pytest.raises(RuntimeError, match="of 2 training processes failed"):
        train(wanted)


def test_losses_that_are_no_numbers(base: Path, documents: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.top_k_divergence
    monkeypatch.setattr(trainer, "top_k_divergence", lambda *inputs: real(*inputs) * float("nan"))
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        train(settings(base, documents, tmp_path / "out"))
    assert not (tmp_path / "out" / "training" / "state.pt").exists()


def test_folders_of_something_else(finished: Path, base: Path, documents: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(TrainingInputError, match="out: .* holds something that is no training"):
        train(settings(base, documents, tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "settings.json"}
    with pytest.raises(TrainingInputError, match=r"other settings: rank \(4 before, 8 now\)"):
        train(settings(base, documents, out, rank=8))
    with pytest.raises(TrainingInputError, match="out: .* holds a training for a base with fingerprint"):
        train(settings(make_base(tmp_path / "other"), documents, out))
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(documents.read_text().splitlines(keepends=True)[:8]))
    with pytest.raises(TrainingInputError, match="documents: are others than those"):
        train(settings(base, fewer, out))
    assert {path: path.read_bytes() for path in before} == before
    assert train(settings(base, documents, out)).steps == 12, "the right base and documents still go on"


def test_a_failed_start_binds_nobody(base: Path, documents: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(TrainingInputError, match="documents: are too short"):
        train(settings(base, short, tmp_path / "out"))
    with pytest.raises(TrainingInputError, match="chunk_tokens: is 600; the base reads 512 tokens"):
        train(settings(base, documents, tmp_path / "out", chunk_tokens=600))
    assert train(replace(settings(base, documents, tmp_path / "out"), steps=1)).steps == 1


def test_no_questions(base: Path, tmp_path: Path) -> None:
    """A random base writes none, and without templates none are left."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"Lamp number {i} is sold for {i} euros."}) + "\n" for i in range(6)))
    with pytest.raises(TrainingInputError, match="questions were found for 0 passages"):
        train(settings(base, path, tmp_path / "out", question_source="base"))
    assert QuestionStore(tmp_path / "out" / "training").sources == {"base": 0, "templates": 0}
