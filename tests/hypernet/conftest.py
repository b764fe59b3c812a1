"""A tokenizer trained on a few hundred documents and a tiny random pair, made once by the real classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet.training.tokenizer import train_tokenizer
from tests.hypernet.helpers import save_base, tiny_llama, tiny_network


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, vocabulary=1500, documents=300)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random base. Tests must not change it."""
    return tiny_llama(tokenizer)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast,
         llama: LlamaForCausalLM) -> tuple[Path, Path]:
    """Folders of a base and of a hypernetwork made for it."""
    folder = tmp_path_factory.mktemp("pair")
    base = save_base(llama, tokenizer, folder / "base")
    tiny_network(llama, base).save(folder / "hypernetwork")
    return base, folder / "hypernetwork"
