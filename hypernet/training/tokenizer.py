"""The tokenizer of nano: byte-level BPE, single-digit tokens, and one form for every word.

A space is put before the text and after each newline before encoding, and taken away when decoding, so a word has the
same tokens at the start of an answer, at the start of a line and inside a sentence: copying it needs no re-spelling.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hypernet.training.corpus.documents import NOT_IN_DOCUMENT, NOT_KNOWN, ask, sample_document
from hypernet.training.corpus.small_talk import GENERAL_QUESTIONS, SMALL_TALK

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL = (PAD, SYSTEM, USER, END)
"""The special tokens, which have the first IDs; the assistant's marker has the last ID."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|system|>{{ message['content'] | trim }}<|end|>"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] | trim }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ (message['content'] or '') | trim }}<|end|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _texts(documents: int, seed: int) -> Iterator[str]:
    rng = Random(seed)
    for _ in range(documents):
        document = sample_document(rng, rng.randint(1, 12))
        yield document.text
        for fact in document.facts[:3]:
            yield ask(fact, document, rng).text
    for _ in range(50):
        yield NOT_IN_DOCUMENT
        yield NOT_KNOWN
        for ways, reply in SMALL_TALK:
            yield from ways
            yield reply
        yield from GENERAL_QUESTIONS


def train_tokenizer(folder: Path, vocabulary: int = 2048, documents: int = 30_000, seed: int = 7) -> None:
    """Train the tokenizer on sampled documents and write it to `folder` in the Hugging Face layout."""
    tokenizer = Tokenizer(models.BPE())
    # A marker that is not "special" stays visible to the decoder, which drops it together with the space after it.
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend(" "), normalizers.Replace(Regex(r"\n(?=[^\n])"), "\n ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteLevel(),
        decoders.Replace(Regex(r"\n "), "\n"),
        decoders.Replace(Regex(r"<\|assistant\|> ?"), ""),
    ])
    from tokenizers import AddedToken

    special = [AddedToken(t, special=True, normalized=False) for t in CONTROL]
    marker = AddedToken(ASSISTANT, special=False, normalized=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_texts(documents, seed), trainer)
    tokenizer.add_tokens([marker])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END,
                                   clean_up_tokenization_spaces=False, model_max_length=2048)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
