"""Questions to route: written by hand (`questions.jsonl`), and made from headings and sentences by rules.

A line of the file holds `question`, `slice`, `product`, `page` (the path of the page that answers it, or null), where
others answer it as well `also` (their paths), and `note`. Rules turn a sentence that says how, what happens or what
for into the question that it answers, and a heading of several words into one on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from benchmarks.routing.documents import OURS, Page

FILE = Path(__file__).with_name("questions.jsonl")
FIELDS = {"question", "slice", "product", "page", "also", "note"}
PER_PAGE = 2


class Slice(StrEnum):
    """What kind of question it is to the tenant that is asked."""

    IN_DOCUMENT = "in_document"
    NEAR_MISS = "near_miss"
    """A document answers it, and another one is nearly it: the other version of the product, or a neighbouring page."""
    UNANSWERED = "unanswered"
    """Of the documents' domain, answered by none."""
    OTHER_TENANT = "other_tenant"
    """A document of another tenant answers it."""
    CHAT = "chat"


ANSWERED = (Slice.IN_DOCUMENT, Slice.NEAR_MISS)


@dataclass(frozen=True)
class Question:
    """`answers` are the documents of the asked tenant that answer it; `origin` says how it was made.

    Those of `fold` "calibration" may be fitted on; the others are only asked.
    """

    text: str
    slice: Slice
    answers: frozenset[str]
    origin: str
    fold: str = "test"


def read_questions(file: Path = FILE) -> list[dict[str, str | list[str] | None]]:
    """The hand-written questions as they stand in the file. Raises ValueError naming the line that is wrong."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if unknown := set(row) - FIELDS:
            raise ValueError(f"{file.name}:{number}: {', '.join(sorted(unknown))} is none of {', '.join(FIELDS)}")
        if not row["question"].strip() or not row["note"].strip():
            raise ValueError(f"{file.name}:{number}: question and note must hold text")
        if Slice(row["slice"]) in ANSWERED and not row["page"]:
            raise ValueError(f"{file.name}:{number}: '{row['slice']}' needs the page that answers it")
        rows.append(row)
    return rows


def by_hand(pages: Sequence[Page], file: Path = FILE) -> tuple[list[Question], list[str]]:
    """The hand-written questions, and the paths of pages that are not there, whose questions are left out."""
    indexed = {page.path for page in pages if page.indexed and page.tenant == OURS}
    found, missing = [], []
    for row in read_questions(file):
        kind, page = Slice(str(row["slice"])), row["page"]
        also = row.get("also") or []
        answers = frozenset([str(page), *also]) & indexed if kind in ANSWERED else frozenset[str]()
        if kind in ANSWERED and page not in indexed:
            missing.append(str(page))
            continue
        found.append(Question(str(row["question"]), kind, answers, "hand"))
    return found, missing


# --- by rules ---------------------------------------------------------------------------------------------------------

_HEADING = re.compile(r"^#{1,6} (?:\d[\d.]*\s+)?(.+)$", re.M)
_USUAL = re.compile(r"^(?:name|synopsis|description|options|examples?(?: \w+)?|notes?|outputs?|parameters|see also|"
                    r"introduction|overview|author|compatibility|discussion|bugs|git|return value|exit status|syntax:?|"
                    r"arguments:?|semantics:?|configuration|usage|summary|background|requirements|diagnostics|"
                    r"environment)$", re.I)
_WORDY = re.compile(r"[^\W\d_].*[^\W\d_]{3}")
_NUMBERING = re.compile(r"^(?:(?:Chapter|Appendix|Part) \w+\.|[A-Z]?\.?\d[\d.]*)\s+")
_HOW = re.compile(r"^To ((?!that\b|this\b|the\b|which\b|be\b)[a-z]+ [^,;:()]{12,110}), ")
_IF = re.compile(r"^(If|When) ([^,;:()]{15,120}), (?!then$)\S+ \S+ \S+")
_FOR = re.compile(r"^((?:The )?[\w.$-]+(?: [\w.$-]+){0,4}) (?:is|are) used (?:to|for|by|in|when) \S+ \S+")
_DOES = re.compile(r"^((?:The )[\w.$-]+(?: [\w.$-]+){0,4}) (specifies|controls|determines|returns|contains|provides|"
                   r"shows|allows|enables|disables|removes|prints|lists|sets|defines|describes|stores) \S+ \S+ \S+")
_VAGUE = re.compile(r"\b(?:this|these|those|that|it|its|they|them|such|above|below|following|he|she|here|former|latter|"
                    r"same|another|first|next|previous|user|command|option|note|example|section|value|function)s?\b",
                    re.I)
_PLURAL = re.compile(r"^(?:The )?.*[^s]s$")


def from_heading(heading: str) -> str | None:
    """The question that a section with this heading answers; None for a heading that says too little."""
    heading = _NUMBERING.sub("", heading).strip(" :.")
    words = heading.split()
    if _USUAL.match(heading) or not 2 <= len(words) <= 8 or "?" in heading or not _WORDY.match(heading):
        return None
    if re.match(r"^How to\b", heading, re.I):
        return f"How do I {heading[7:]}?"
    if words[0].endswith("ing") and words[0][0].isupper() and words[0] not in ("String", "Missing"):
        return f"What should I know about {words[0].lower()} {' '.join(words[1:])}?"
    return f"Can you explain {heading}?"


def from_sentence(sentence: str) -> str | None:
    """The question that a sentence answers; None where no rule fits or the question would not stand alone."""
    question = None
    if match := _HOW.match(sentence):
        question = f"How do I {match[1]}?"
    elif match := _IF.match(sentence):
        question = f"What happens {match[1].lower()} {match[2]}?"
    elif match := _FOR.match(sentence):
        question = f"What {'are' if _PLURAL.match(match[1]) else 'is'} {_lower(match[1])} used for?"
    elif match := _DOES.match(sentence):
        question = f"What is it that {_lower(match[1])} {match[2]}?"
    if question is None or len(question.split()) < 6 or _VAGUE.search(question.removeprefix("What is it that")):
        return None
    return question


def by_rules(pages: Sequence[Page], tested: frozenset[str] = frozenset(), per_page: int = PER_PAGE) -> list[Question]:
    """Up to `per_page` questions on each page, at most one of them from a heading.

    Those on pages of other tenants name their product, and so do those where the tenant has several versions of a
    page, which are near misses of each other; of the rest every second does. A question that two pages would give is on
    neither. What a page's file gives is of one fold in all versions: "test" for the files `tested`, and of the others
    half are of each.
    """
    versions = Counter(page.file for page in pages if page.tenant == OURS)
    drafts = [(page, origin, text) for page in pages for origin, text in _drafts(page, per_page)]
    uses = Counter((text, page.product) for page, _, text in drafts)
    products = Counter(text for text, _ in uses)
    found = []
    for page, origin, text in drafts:
        several = page.tenant == OURS and versions[page.file] > 1
        if uses[text, page.product] > 1 or (products[text] > 1 and not several):
            continue
        chance = hashlib.sha256(f"{page.file}\0{text}".encode()).digest()[0]
        if several or page.tenant != OURS or chance % 2:
            text = f"In {page.product}, {text[0].lower()}{text[1:]}"
        kind, answers = Slice.UNANSWERED, frozenset[str]()
        if page.tenant != OURS:
            kind = Slice.OTHER_TENANT
        elif page.indexed:
            kind, answers = Slice.NEAR_MISS if several else Slice.IN_DOCUMENT, frozenset([page.path])
        found.append(Question(text, kind, answers, origin,
                              "test" if page.file in tested else fold_of(page.file)))
    return found


def fold_of(name: str) -> str:
    """"calibration" or "test", by a hash of the name."""
    return "calibration" if hashlib.sha256(f"fold\0{name}".encode()).digest()[0] % 2 else "test"


def _drafts(page: Page, per_page: int) -> list[tuple[str, str]]:
    """(origin, question) of a page: sentences from all over it, and the heading that comes first."""
    sentences = list(dict.fromkeys(q for s in _sentences(page.text) if (q := from_sentence(s))))
    headings = [q for h in _HEADING.findall(page.text)[1:] if (q := from_heading(h))]
    made = [("heading", headings[0])] if headings else []
    room = per_page - len(made)
    step = max(1, len(sentences) // max(1, room))
    return made + [("sentence", text) for text in sentences[::step][:room]]


def _sentences(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        if not line.startswith(("#", " ")):
            yield from re.split(r"(?<=[.!?])\s+(?=[A-Z])", line.removeprefix("- ").strip())


def _lower(text: str) -> str:
    return "the " + text[4:] if text.startswith("The ") else text
