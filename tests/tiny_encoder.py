"""A tiny text encoder for tests: a real sentence-transformers checkpoint that adds up random vectors of known words."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers


def make_encoder(folder: Path, words: str, dimension: int, seed: int = 0) -> str:
    """Writes a checkpoint that tells the words of this text apart into `folder`; the path as `router.encoder` has it.

    Texts that share words get vectors that are near each other, and two seeds give encoders that have nothing to do
    with each other.
    """
    vocabulary = ["<unknown>", *sorted(set(re.findall(r"\w+", words.lower())))]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(seed)
    weights = torch.randn(len(vocabulary), dimension)
    weights[0] *= 0.01  # marks and words that nobody knows
    module = StaticEmbedding(tokenizer, embedding_weights=weights)
    SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    return str(folder)
