"""What a document is asked while it is distilled: questions made from its text, each with the chunk that answers it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.base_questions import ask_base
from hypernet.distill_teacher import Exercise
from hypernet.documents import Chunk, DocumentText
from hypernet.probes import make_probes, text_answers

GENERAL = ("What is this text about?", "What are the main points of this text?", "Summarise the text in one sentence.")
"""Asked where a text gives no question of its own."""


def assign(questions: Sequence[str], contexts: Sequence[str]) -> list[Exercise]:
    """Each question with the context that shares most words with it, rare ones counting more."""
    words = [set(_words(context)) for context in contexts]
    spread = Counter(word for found in words for word in found)
    exercises = []
    for question in questions:
        asked = _words(question)
        scores = [sum(1 / spread[word] for word in asked if word in found) for found in words]
        exercises.append(Exercise(contexts[scores.index(max(scores))], question))
    return exercises


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def training_questions(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, document: DocumentText,
                       chunks: Sequence[Chunk], limit: int, wording: int, own: int) -> list[Exercise]:
    """For each chunk at most `limit` questions by templates and `own` written by the base, else the general ones."""
    exercises = []
    for chunk in chunks:
        spans = [(chunk.start, chunk.end)]
        found = [probe.question for probe in make_probes(document, spans, limit, wording)]
        if own:
            part = DocumentText(document.title, document.text[chunk.start:chunk.end])
            found += [probe.question for probe in ask_base(base, tokenizer, part, own)]
        answers = text_answers(document, spans)
        exercises += [Exercise(chunk.text, question, answers.get(question))
                      for question in dict.fromkeys(found or GENERAL)]
    return exercises
