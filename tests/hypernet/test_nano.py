"""The shipped pair: small, safe to load, made for each other, and it recalls what it read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.documents import DocumentText
from hypernet.evaluation.cases import held_out_cases
from hypernet.evaluation.scoring import exact_match
from hypernet.fingerprint import fingerprint_folder
from hypernet.generate import HypernetGenerator
from hypernet.inject import adapted
from hypernet.nano import base_dir, hypernet_dir
from hypernet.perceiver import Factors, HypernetConfig
from hypernet.training.corpus.documents import Split
from tests.hypernet.helpers import factors_of

MOST_BYTES = 40_000_000
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".npy", ".partial"}
DOCUMENTS = 20


@pytest.fixture(scope="module")
def generator() -> HypernetGenerator:
    return HypernetGenerator.load(hypernet_dir(), base_dir(), threads=1)


def files() -> list[Path]:
    return [path for path in base_dir().parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_size() -> None:
    assert (base_dir() / "model.safetensors").is_file() and (hypernet_dir() / "model.safetensors").is_file()
    assert sum(path.stat().st_size for path in files()) <= MOST_BYTES


def test_nothing_is_pickled() -> None:
    assert any(path.suffix == ".safetensors" for path in files())
    assert not [path.name for path in files() if path.suffix in PICKLED]


def test_the_pair_fits() -> None:
    config = HypernetConfig.read(hypernet_dir() / "config.json")
    assert config.base_fingerprint == fingerprint_folder(base_dir())


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: list[str],
            factors: Factors) -> list[str]:
    """Greedy closed-book answers through the shipped chat template, row b with adapter b; no factors: base alone."""
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template([[{"role": "user", "content": text}] for text in questions],
                                           add_generation_prompt=True, padding=True, return_tensors="pt",
                                           return_dict=True)
    with adapted(model, factors):
        found = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                               max_new_tokens=24, do_sample=False)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in found[:, inputs["input_ids"].size(1):]]


def test_adapters_recall_facts_that_the_base_does_not_know(generator: HypernetGenerator) -> None:
    cases = held_out_cases(DOCUMENTS, 1, Split.HELD_OUT)
    asked = [next(question for question in case.questions if question.answerable) for case in cases]
    made = generator.generate([DocumentText(case.title, case.text) for case in cases])
    questions = [question.text for question in asked]

    def score(factors: Factors) -> int:
        found = answers(generator.base, generator.tokenizer, questions, factors)
        return sum(exact_match(answer, question.answers) for answer, question in zip(found, asked, strict=True))

    with_adapter, alone = score(factors_of([one.lora for one in made])), score({})
    assert with_adapter >= alone + DOCUMENTS // 3, f"{with_adapter} of {DOCUMENTS} right, base alone {alone}"
