"""The shipped pair: small, safe to load, made for each other, and it recalls what it read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.documents import DocumentText
from hypernet.evaluation.cases import Case, CaseQuestion, held_out_cases
from hypernet.evaluation.scoring import exact_match
from hypernet.fingerprint import fingerprint_folder
from hypernet.generate import GeneratedDocument, HypernetGenerator
from hypernet.inject import adapted
from hypernet.lora import LoraAdapter, factors_of
from hypernet.nano import base_dir, hypernet_dir
from hypernet.perceiver import Factors, HypernetConfig
from hypernet.training.corpus.documents import Split

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


def holding(case: Case, made: GeneratedDocument, question: CaseQuestion) -> LoraAdapter:
    """The adapter of the part that states the answer; of several, the one that shares the most words with the question,
    as the router would choose."""
    texts = [" ".join(case.text[chunk.start:chunk.end] for chunk in part.chunks).lower() for part in made.parts]
    stating = [i for i, text in enumerate(texts) if question.answers[0].lower() in text]
    assert stating, f"no part states '{question.answers[0]}' of: {case.text}"
    words = set(re.findall(r"\w+", question.text.lower()))
    return made.parts[max(stating, key=lambda i: len(words & set(re.findall(r"\w+", texts[i]))))].lora


@pytest.mark.parametrize("facts", [1, 4])
def test_adapters_recall_facts_that_the_base_does_not_know(generator: HypernetGenerator, facts: int) -> None:
    cases = held_out_cases(DOCUMENTS, facts, Split.HELD_OUT)
    asked = [next(question for question in case.questions if question.answerable) for case in cases]
    made = generator.generate([DocumentText(case.title, case.text) for case in cases])
    questions = [question.text for question in asked]
    loras = [holding(*row) for row in zip(cases, made, asked, strict=True)]

    def score(factors: Factors) -> int:
        found = answers(generator.base, generator.tokenizer, questions, factors)
        return sum(exact_match(answer, question.answers) for answer, question in zip(found, asked, strict=True))

    with_adapter, alone = score(factors_of(loras)), score({})
    assert with_adapter >= alone + DOCUMENTS // 3, f"{with_adapter} of {DOCUMENTS} right, base alone {alone}"


def test_a_document_of_several_facts_becomes_part_adapters(generator: HypernetGenerator) -> None:
    made = generator.generate([DocumentText(case.title, case.text) for case in held_out_cases(4, 8, Split.HELD_OUT)])
    assert all(len(document.parts) > 1 for document in made)
    assert all(len(part.chunks) == 1 for document in made for part in document.parts)
