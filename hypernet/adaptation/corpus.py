"""Documents from files, cut into the passages that a hypernetwork is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypernet.adaptation.settings import TrainingInputError
from hypernet.documents import DocumentError, DocumentText, TokenCounter, chunk_document

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
MIN_TOKENS = 12
"""A passage below this states too little to be asked about."""
MIN_PASSAGES = 4
_MAX_CHUNKS = 100_000


@dataclass(frozen=True)
class Passage:
    """A part of document number `document`: its text with the title before it, and a key made from that text."""

    document: int
    text: str

    @property
    def key(self) -> str:
        """SHA-256 of the text in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Passages to train on and held-out ones. `by_document`: no document has passages in both.

    `short` counts passages that were left out as too short.
    """

    training: list[Passage]
    held_out: list[Passage]
    by_document: bool
    short: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over all passages and their split."""
        digest = hashlib.sha256()
        for passage in [*self.training, *self.held_out]:
            digest.update(f"{passage.document} {passage.key}\n".encode())
        digest.update(str(len(self.training)).encode())
        return digest.hexdigest()


def _json_lines(path: Path, text: str) -> Iterator[DocumentText]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if not isinstance(item["text"], str):
                raise TypeError("text is no string")
            yield DocumentText(str(item.get("title") or ""), item["text"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingInputError(f"documents: {path}, line {number}: is no JSON object with a string `text`: "
                                     f"{error}") from error


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*")
                              if file.is_file() and file.suffix.lower() in (*TEXT_SUFFIXES, ".jsonl"))
        elif path.is_file():
            yield path
        else:
            raise TrainingInputError(f"documents: {path} does not exist")


def read_documents(paths: Sequence[Path]) -> list[DocumentText]:
    """Documents of files and folders, in the order of names; empty ones and repeated texts are left out.

    A `.jsonl` file holds one object a line, with `text` and perhaps `title`; any other file is one document in UTF-8.
    Of a folder only `TEXT_SUFFIXES` and `.jsonl` are read. Raises TrainingInputError.
    """
    found: dict[str, DocumentText] = {}
    for path in _files(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingInputError(f"documents: {path} cannot be read as UTF-8 text: {error}") from error
        documents = _json_lines(path, text) if path.suffix.lower() == ".jsonl" else [DocumentText("", text)]
        for document in documents:
            if document.text.strip():
                found.setdefault(document.text.strip(), document)
    if not found:
        raise TrainingInputError(f"documents: {', '.join(map(str, paths)) or 'nothing'} holds no text; files with "
                                 f"{', '.join(TEXT_SUFFIXES)} or .jsonl in their names are read, and not empty ones")
    return list(found.values())


def cut(documents: Sequence[DocumentText], tokenizer: TokenCounter, chunk_tokens: int, max_tokens: int,
        held_out: float, seed: int) -> Corpus:
    """Passages of about `chunk_tokens` and at most `max_tokens` tokens, split into training and held-out ones.

    Whole documents are held out where there are enough of them, else passages. Raises TrainingInputError where fewer
    than `MIN_PASSAGES` passages are long enough.
    """
    passages: list[Passage] = []
    short = 0
    for number, document in enumerate(documents):
        try:
            chunks = chunk_document(document, tokenizer, chunk_tokens, max_tokens, _MAX_CHUNKS)
        except DocumentError as error:
            raise TrainingInputError(f"documents: '{(document.title or document.text)[:40]}': {error}") from error
        for chunk in chunks:
            body = document.text[chunk.start:chunk.end]
            if len(tokenizer.encode(body, add_special_tokens=False)) < MIN_TOKENS:
                short += 1
            else:
                passages.append(Passage(number, chunk.text))
    passages = list({passage.text: passage for passage in passages}.values())
    if len(passages) < MIN_PASSAGES:
        raise TrainingInputError(
            f"documents: are too short: they give {len(passages)} passages of at least {MIN_TOKENS} tokens, and "
            f"{MIN_PASSAGES} are needed to train on some and hold out others; give more or longer documents, or a "
            f"chunk_tokens below {chunk_tokens}")
    rng = Random(f"{seed}-held-out")
    numbers = sorted({passage.document for passage in passages})
    by_document = len(numbers) >= MIN_PASSAGES
    if by_document:
        chosen = set(rng.sample(numbers, max(2, round(held_out * len(numbers)))))
        apart = [passage.document in chosen for passage in passages]
    else:
        places = set(rng.sample(range(len(passages)), max(2, round(held_out * len(passages)))))
        apart = [i in places for i in range(len(passages))]
    return Corpus([p for p, out in zip(passages, apart, strict=True) if not out],
                  [p for p, out in zip(passages, apart, strict=True) if out], by_document, short)
