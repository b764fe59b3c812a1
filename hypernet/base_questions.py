"""Questions on a text that a base writes itself, where it is large enough to."""

from __future__ import annotations

import re

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.answers import answer_greedily, end_tokens
from hypernet.documents import DocumentText
from hypernet.probes import Probe
from hypernet.prompts import in_context

_REQUEST = ("Write {count} short questions about the text above. Each asks for one fact that the text states, names "
            "what it is about, and can be understood without the text. One question a line, nothing else.")
_QUESTION_TOKENS = 24
_MARKER = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])\s*|^\s*Q(?:uestion)?\s*\d*\s*[:.]\s*", re.IGNORECASE)
_MIN_SHARE = 0.5


def parse_questions(text: str, limit: int | None = None) -> list[str]:
    """Lines of what a base wrote that are questions (three to forty words that end in "?"), without numbers, bullets
    and marks around them, each once; at most `limit` (None: all)."""
    found: dict[str, None] = {}
    for line in text.splitlines():
        question = _MARKER.sub("", line).strip().strip("*\"").strip()
        if question.endswith("?") and 3 <= len(question.split()) <= 40:
            found.setdefault(question)
    return list(found)[:limit]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{3,}", text.lower()))


def ask_base(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, document: DocumentText,
             limit: int) -> list[Probe]:
    """At most `limit` questions that the base itself writes about the document; empty where it can not.

    It can where most of the lines that it writes are different questions that share a word with the document. A small
    reader such as nano answers the request as if it were a question, which gives no such line. Greedy, at most 24
    tokens a question. Raises ValueError without a chat template.
    """
    text = f"{document.title.strip()}\n\n{document.text.strip()}".strip()
    prompt = in_context(tokenizer, text, _REQUEST.format(count=limit))
    (answer,) = answer_greedily(base, [prompt], end_tokens(base, tokenizer), _QUESTION_TOKENS * limit)
    written = str(tokenizer.decode(answer, skip_special_tokens=True))
    lines = [line for line in written.splitlines() if line.strip()]
    questions = [question for question in parse_questions(written) if _words(text) & _words(question)]
    if len(questions) < _MIN_SHARE * min(limit, max(1, len(lines))) or len(questions) < _MIN_SHARE * len(lines):
        return []
    return [Probe(question) for question in questions[:limit]]
