"""Questions on a document's own facts, made from its text by templates.

What is found: "Label: value" lines and list items, Markdown tables, "The X of Y is Z", "Y's X is Z", "Y costs Z",
"Y opens at Z", "The X is Z". Where a sentence fits none of these, its most telling part (a price, a time, a name, a
number, else its last phrase) gives way to a question word: "The guarantee runs out after what?", which is a cloze
test (Taylor 1953) put as a question, so that ordinary prose is asked about too. Answers are left open: the base reads
them out of the document.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hypernet.documents import DocumentText

WORDINGS = 2
"""How many different questions there are on each fact."""
_MAX_LABEL_WORDS = 6
_MAX_LINE = 4000
_MAX_VALUE = 120
"""Characters of a value, at most; a longer one is a paragraph."""
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Probe:
    """A question. `answer` None: what the base answers with the document in context is the reference."""

    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Found:
    """A fact of the text: where it stands, its value, and the question on it in each wording.

    `cloze`: no template fitted, so the question is the sentence with a question word in the value's place.
    """

    start: int
    value: str
    questions: tuple[str, str]
    cloze: bool = False


# --- values -----------------------------------------------------------------------------------------------------------

_MONTH = r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?"
_AMOUNT = r"\d[\d.,]*\d|\d"
_CAPITAL = r"[A-ZÀ-Þ][\w'’&-]*"
_STARTERS = ("About|After|Along|As|At|Ask|Before|Besides|By|Call|Contact|During|Each|Every|For|From|If|In|Inside|Near|"
             "On|Originally|Our|See|Since|Some|The|This|To|Under|Until|We|When|While|With|Within|Your")
_NAME = rf"(?!(?:{_STARTERS})\b){_CAPITAL}(?: [A-Z]\.)?(?: (?:(?:de|van|von|of|the|der|la|&) )?{_CAPITAL})+\b"
_VALUES = tuple((word, re.compile(pattern)) for word, pattern in (
    ("what", r"[\w.+-]+@[\w-]+\.[\w.-]*\w|https?://\S*\w"),
    ("how much", rf"[$€£¥]\s?(?:{_AMOUNT})|"
                 rf"\b(?:{_AMOUNT})\s?(?:euros?|dollars?|pounds?|cents?|francs?|yen|USD|EUR|GBP)\b"),
    ("when", r"\b\d{1,2}[:.]\d{2}(?:\s?[ap]\.?m\b)?|\b\d{1,2}\s?[ap]\.?m\b|\b(?:noon|midnight)\b"),
    ("when", rf"\b(?:{_DAY},? )?(?:{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?|\d{{1,2}}(?:st|nd|rd|th)? (?:of )?{_MONTH})"
             r"(?:,? \d{4})?"),
    ("when", rf"\b(?:(?:the )?(?:first|second|third|fourth|last) )?{_DAY}(?: of (?:the|each|every) month)?\b"),
    ("when", r"\b\d{4}-\d{2}-\d{2}\b|(?:(?<=\b[Ii]n )|(?<=\b[Ss]ince )|(?<=\b[Bb]efore )|(?<=\b[Aa]fter ))(?:1[0-9]|20)"
             r"\d{2}\b"),
    ("what", r"\b\d+(?:[-/]\d+)+\b"),
    ("what", r"\b(?=\w*[A-Z])(?=[\w/-]*\d)[A-Za-z0-9]+(?:[-/][A-Za-z0-9]+)*\b"),  # codes: K9, AB-1204
    ("who", rf"\b(?:Dr|Mr|Mrs|Ms|Prof)\.? {_NAME}|\b{_NAME}"),
    ("how many", rf"(?:(?<=\s)|^)(?:{_AMOUNT})(?= [a-z]{{3,}}\b)"),
    ("what", rf"(?:(?<=\s)|^)(?:{_AMOUNT})(?:\s?%)?(?=\s|[,;)]|$)"),
    ("what", rf"(?<=[a-z,] ){_CAPITAL}\b"),
))
_TAIL = re.compile(r"\b(?:is|are|was|were|be|by|as|at|on|in|to|for|with|from|of|called|named|after|until|has|have|uses?"
                   r"|means|returns?|includes?|than|about)\s+((?:\S+\s+){0,5}\S+?)\s*$")
_PERSON = re.compile(rf"(?:(?:Dr|Mr|Mrs|Ms|Prof)\.? )?{_CAPITAL}(?: {_CAPITAL}){{0,2}}")
_NOT_A_PERSON = re.compile(r"^(?:The|A|An|No|Yes)\b|\d|(?:Street|Road|Avenue|Lane|Square|Hall|Park|Room|Inn|Hotel|Club|"
                           r"Company|Service|University|Building|Bay|River)s?$")


def _is_person(value: str) -> bool:
    return bool(" " in value and _PERSON.fullmatch(value) and not _NOT_A_PERSON.search(value))


# --- text into lines --------------------------------------------------------------------------------------------------

_HEADING = re.compile(r"#{1,6}\s+(.*)")
_BULLET = re.compile(r"(?:[-*•+]|\d{1,2}[.)])\s+")
_RULE = re.compile(r"[\s:|-]*-{2,}[\s:|-]*")
_LABEL = re.compile(r"(?P<label>[^\W_][^:|.!?]{0,60}?)\s*:\s+(?P<value>\S.*)")
_SENTENCE_END = re.compile(r"(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bSt)(?<!\bNo)"
                           r"(?<!\b[A-Z])(?<!\be\.g)(?<!\bi\.e)[.!?]+[\"')]*\s+")
_VALUE_COLUMNS = {"", "value", "values", "details", "detail", "information", "description", "answer"}
_DANGLING = re.compile(r"\b(?:at|by|for|from|in|of|on|till|to|until|up to|with)$|^(?:includes?|contains?|has|needs?)$",
                       re.IGNORECASE)
_GENERIC = re.compile(r"^(?:it|he|she|they|this|that|these|those|we|you|i|there|here)\b", re.I)


def _plain(text: str) -> str:
    """Without Markdown's marks of emphasis, code and links."""
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    return re.sub(r"(\*\*|__|`)", "", text).strip()


def _entity(heading: str) -> str:
    """What a heading is about: "Harbour Pool: visitor notice" and "Harbour Pool - hours" are about "Harbour Pool"."""
    name = re.split(r"\s[-–—|]\s|:\s|:$|\s\(", _plain(heading))[0].strip(" #*:.")
    return re.sub(r"^(?:.*\b[Aa]bout|[Ii]nformation on|[Nn]otes on)\s+(?=\S)", "", name)


def _lower(text: str) -> str:
    """With a small first letter, unless it begins with an abbreviation, a code or a name of several words."""
    first, _, rest = text.partition(" ")
    proper = rest[:1].isupper() and first not in {"The", "A", "An", "Our", "Your"}
    name = proper or re.search(r"['’]s$", first) or any(mark.isupper() or mark.isdigit() for mark in first[1:])
    return text if name else text[:1].lower() + text[1:]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _bounded(value: str) -> str:
    return value.strip().rstrip(".;,").strip()


# --- facts ------------------------------------------------------------------------------------------------------------

def _labelled(start: int, entity: str, label: str, value: str) -> Found | None:
    """The fact that the entity's label is the value; an empty entity is left out of the questions."""
    label, value, entity = label.strip(" *"), _bounded(_plain(value)), entity.strip()
    if not label or not value or value in {"-", "–", "n/a"} or len(value) > _MAX_VALUE:
        return None
    if _DANGLING.search(label):
        name = f"{entity}: {_lower(label)}" if entity else label
        return Found(start, value, (f"{name} what?", f"{entity} - {_lower(label)}?" if entity else f"{label}?"))
    if entity and not re.search(r"\b(?:of|at|in|for|on) (?:the |Dr\. )?[A-Z]", label):
        label = f"{_lower(label)} of {entity}"
    else:
        label = _lower(label)
    owned = label.startswith(("the ", "our ", "your ", "his ", "her ", "its ", "their ")) or _POSSESSED.match(label)
    the = "" if owned else "the "
    word = "Who" if _is_person(value) and not label.startswith(("name ", "the name ")) else "What"
    return Found(start, value, (f"{word} is {the}{label}?", f"Tell me {the}{label}."))


_OWNED = re.compile(r"(?P<entity>[^,;:]{1,60}?)['’]s (?P<label>[a-z][\w -]{1,40}?) "
                    r"(?:is|are|was|were|will be|comes to) (?:called |named )?(?P<value>.+)")
_OF = re.compile(r"(?:The|Our|Your) (?P<label>[\w -]{2,50}? (?:of|at|in|for|on|to) [^,;]{1,60}?) "
                 r"(?:is|are|was|were|will be|comes to) (?:called |named )?(?P<value>.+)")
_VALUE_IS = re.compile(r"(?P<value>.{1,80}?) (?:is|was) (?P<label>(?:the|our|your) [\w -]{2,40} (?:of|at|in|for) .+)")
_IS = re.compile(r"(?:The|Our|Your|Its|His|Her|Their) (?P<label>[\w' -]{2,50}?) (?:is|are|was|were|will be|comes to) "
                 r"(?:called |named )?(?P<value>.+)")
_VERBS = {"opens": "open", "closes": "close", "leaves": "leave", "departs": "depart", "starts": "start",
          "begins": "begin", "ends": "end", "arrives": "arrive", "stops": "stop", "finishes": "finish"}
_HAPPENS = re.compile(rf"(?P<entity>.{{1,80}}?) (?P<verb>{'|'.join(_VERBS)}) (?:daily |every day )?"
                      r"(?P<preposition>at|on|from) (?P<value>.+)")
_TIME = re.compile("|".join([r"^\d", rf"\b(?:{_MONTH}|Christmas|Easter|New Year)\b",
                             *(pattern.pattern for word, pattern in _VALUES if word == "when")]))
_COSTS = re.compile(r"(?P<entity>.{1,80}?) costs? (?P<value>.+)")


def _is_place(verb: str, preposition: str, value: str) -> bool:
    """Whether this tells a place rather than a time: "leaves from Castle Square"."""
    if preposition == "on" or _TIME.search(value):
        return False
    return value.removeprefix("the ")[:1].isupper() or (preposition == "from" and verb in ("leaves", "departs"))


def _by_template(start: int, sentence: str) -> Found | None:
    """The fact of a sentence (without its full stop) that fits a template."""
    def entity(match: re.Match[str]) -> str:
        name = match["entity"].strip()
        return _lower(name) if name.startswith(("The ", "A ", "An ", "Our ", "Your ")) else name
    if (match := _HAPPENS.fullmatch(sentence)) and not _GENERIC.match(match["entity"]):
        name, verb, value = entity(match), _VERBS[match["verb"]], _bounded(match["value"])
        if _is_place(match["verb"], match["preposition"], value):
            along = " from" if match["preposition"] == "from" else ""
            return Found(start, value, (f"Where does {name} {verb}{along}?", f"{_upper(name)} {match['verb']} "
                                        f"{match['preposition']} where?"))
        return Found(start, value, (f"When does {name} {verb}?", f"At what time does {name} {verb}?"))
    if (match := _COSTS.fullmatch(sentence)) and not _GENERIC.match(match["entity"]):
        return Found(start, _bounded(match["value"]),
                     (f"How much does {entity(match)} cost?", f"What is the price of {entity(match)}?"))
    if (match := _OWNED.fullmatch(sentence)) and not _GENERIC.match(match["entity"]):
        name, word = f"{entity(match)}'s {match['label']}", "Who" if _is_person(_bounded(match["value"])) else "What"
        return Found(start, _bounded(match["value"]), (f"{word} is {name}?", f"Tell me {name}."))
    for pattern in (_OF, _IS):
        if match := pattern.fullmatch(sentence):
            owner = sentence.split(" ", 1)[0].lower()
            label = match["label"] if owner == "the" else f"{owner} {match['label']}"
            return _labelled(start, "", label, match["value"])
    if (match := _VALUE_IS.fullmatch(sentence)) and not _GENERIC.match(match["value"]):
        return _labelled(start, "", match["label"], match["value"])
    return None


_POSSESSED = re.compile(rf"{_CAPITAL}(?: {_CAPITAL})*(?<=['’]s) |(?:{_CAPITAL} )*[\w-]+['’]s ")
_PRONOUN = re.compile(r"^(?:It|He|She)(?= )|(?<= of )(?:it|him|her)(?=$| is\b|:)")
_PRONOUN_OWNER = re.compile(r"^(?:Its|His|Her)(?= )")
_NAMES = re.compile(rf"\b{_NAME}|(?<=[a-z,] ){_CAPITAL}\b")


def _named(sentence: str, subject: str) -> str:
    """The sentence with the subject's name in the place of a pronoun."""
    if not subject:
        return sentence
    sentence = _PRONOUN.sub(lambda _: subject, sentence)
    return _PRONOUN_OWNER.sub(lambda _: f"{subject}'s", sentence)


def _telling(sentence: str, known: str) -> tuple[int, int, str] | None:
    """The span of the sentence's most telling part, and its question word; `known` is the title and all the text."""
    for word, pattern in _VALUES:
        # The last one: what comes first is mostly what the sentence is about. So is what the text names repeatedly.
        for match in reversed(list(pattern.finditer(sentence))):
            if known.count(re.sub(r"['’]s$", "", match[0])) <= 1 and match.span() != (0, len(sentence)):
                return match.start(), match.end(), "what" if word == "who" and not _is_person(match[0]) else word
    tail = _TAIL.search(sentence)
    return (*tail.span(1), "what") if tail else None


def _by_cloze(start: int, sentence: str, known: str) -> Found | None:
    """The sentence as a question on its most telling part."""
    part = _telling(sentence, known) if len(sentence.split()) >= 3 and len(sentence) <= 300 else None
    if part is None:
        return None
    first, last, word = part
    before, after = sentence[:first].strip(), sentence[last:].strip()
    gap, blank = (f"{before} {filler} {after}".strip() for filler in (word, "___"))
    questions = (f"{_upper(gap)}?", f"What is missing here: {blank}?")
    return Found(start, sentence[first:last].strip(), questions, cloze=True)


def _row_facts(start: int, cells: list[str], columns: list[str] | None, entity: str) -> Iterator[Found | None]:
    """The facts of a table's row: a label with its value, or an entity with a value for each column."""
    if len(cells) == 2 and (columns is None or columns[1].lower() in _VALUE_COLUMNS):
        yield _labelled(start, entity, cells[0], cells[1])
    elif columns is not None and cells:
        for label, value in zip(columns[1:], cells[1:], strict=False):
            if label:
                yield _labelled(start, cells[0], label, value)


def _sentences(line: str) -> Iterator[tuple[int, str]]:
    """Sentences of a line with their offsets, without their full stops."""
    start = 0
    for match in _SENTENCE_END.finditer(line + " "):
        yield start, line[start:match.start()].strip()
        start = match.end()
    if start < len(line):
        yield start, line[start:].strip()


def _heading_of(line: str, following: str) -> str | None:
    """The heading that a line is, if it is one: marked as such, or short, without a full stop, before other lines."""
    if match := _HEADING.fullmatch(line):
        return match[1]
    if re.fullmatch(r"\*\*[^*]+\*\*:?|[^:|]{1,60}:", line):
        return line
    short = len(line.split()) <= 8 and line[:1].isalnum() and line[-1:] not in ".!?,;" and "|" not in line
    return line if short and not _LABEL.fullmatch(line) and following else None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their offsets; one of more than `_MAX_LINE` characters comes in pieces, cut at a space if it has one,
    so that the work stays in proportion to the text."""
    start = 0
    for whole in text.split("\n"):
        end = start + len(whole)
        while end - start > _MAX_LINE:
            cut = text.rfind(" ", start, start + _MAX_LINE) + 1 or start + _MAX_LINE
            yield start, text[start:cut]
            start = cut
        yield start, text[start:end]
        start = end + 1


@dataclass(frozen=True)
class _Line:
    """A line that states something, with what stands above it.

    `offset` and `end` bound the line and `start` is where its text, `text`, begins, all in characters of the document.
    `section` counts headings; `entity` is what the last of them is about. `cells` are those of a table's row.
    """

    offset: int
    end: int
    start: int
    text: str
    section: int
    entity: str
    cells: list[str] | None = None
    columns: list[str] | None = None


@lru_cache(maxsize=2)
def _outline(document: DocumentText) -> list[_Line]:
    """The lines of a document's text that state something, in order; kept, since each of its parts asks for them."""
    found: list[_Line] = []
    section, entity = 0, _entity(document.title)
    columns: list[str] | None = None
    lines = list(_lines(document.text))
    for number, (offset, raw) in enumerate(lines):
        line, end = raw.strip(), offset + len(raw)
        start = offset + len(raw) - len(raw.lstrip())
        following = "\n".join(text for _, text in lines[number + 1:number + 3]).strip()
        is_row = line.startswith("|") or line.count("|") >= 2
        if not is_row:
            columns = None
        if not line or _RULE.fullmatch(line):
            continue
        if is_row:
            cells = [_plain(cell) for cell in line.strip("|").split("|")]
            if _RULE.fullmatch(following.split("\n", 1)[0].strip()) and "-" in following:
                columns = cells
            else:
                found.append(_Line(offset, end, start, line, section, entity, cells, columns))
        elif (heading := _heading_of(line, following)) is not None:
            section, entity = section + 1, _entity(heading)
        else:
            found.append(_Line(offset, end, start, line, section, entity))
    return found


def _within(lines: Sequence[_Line], spans: Spans | None) -> list[_Line]:
    """The lines that lie in one of the spans, if only in part."""
    if spans is None:
        return list(lines)
    chosen: set[int] = set()
    for first, last in spans:
        chosen.update(range(bisect_right(lines, first, key=lambda line: line.end),
                            bisect_left(lines, last, key=lambda line: line.start)))
    return [lines[i] for i in sorted(chosen)]


def find_facts(document: DocumentText, spans: Sequence[tuple[int, int]] | None = None) -> list[Found]:
    """The facts of a document's text in order, those that start in one of the spans (None: all).

    `start` is in characters of the text.
    """
    return list(_facts(document, None if spans is None else tuple((first, last) for first, last in spans)))


@lru_cache(maxsize=2)
def _facts(document: DocumentText, spans: Spans | None) -> tuple[Found, ...]:
    """As `find_facts`; kept, since questions and answers are asked for one after the other."""
    read = [document.text] if spans is None else [document.text[first:last] for first, last in spans]
    known, subject, section = "\n".join([document.title, *read]), "", -1
    found: list[Found] = []
    for line in _within(_outline(document), spans):
        if line.section != section:
            section, subject = line.section, line.entity
        if line.cells is not None:
            found += [fact for fact in _row_facts(line.start, line.cells, line.columns, line.entity) if fact]
            continue
        bullet = _BULLET.match(line.text)
        text = _plain(line.text[bullet.end():] if bullet else line.text)
        match = _LABEL.fullmatch(text)
        if match and len(match["label"].split()) <= _MAX_LABEL_WORDS and len(match["value"]) <= _MAX_VALUE:
            fact = _labelled(line.start, line.entity, match["label"], match["value"])
            if fact:
                found.append(fact)
            continue
        for at, written in _sentences(text):
            sentence = _named(written, subject)
            match = _LABEL.fullmatch(sentence)
            if match and len(match["label"].split()) <= _MAX_LABEL_WORDS + 4:
                fact = _labelled(line.start + at, "", match["label"], match["value"])
            else:
                fact = _by_template(line.start + at, sentence)
            if fact is None or not fact.value or len(fact.value) > _MAX_VALUE:
                fact = _by_cloze(line.start + at, sentence, known)
            names = [name for name in _NAMES.findall(written) if fact is None or fact.cloze or name not in fact.value]
            subject = re.sub(r"['’]s$", "", names[0]) if names else subject
            if fact:
                found.append(fact)
    return tuple(fact for fact in found
                 if spans is None or any(first <= fact.start < last for first, last in spans))


def _spread(facts: Sequence[Found], limit: int) -> list[Found]:
    """`limit` of the facts, evenly over their order."""
    if len(facts) <= limit:
        return list(facts)
    return [facts[(2 * i + 1) * len(facts) // (2 * limit)] for i in range(limit)]


def make_probes(document: DocumentText, spans: Sequence[tuple[int, int]] | None, limit: int,
                wording: int = 0) -> list[Probe]:
    """At most `limit` probes on what stands in the spans of the text (None: in all of it), spread over it, in order.

    `wording` 0 or 1: other questions on the same facts. Facts of a template come before cloze questions. Empty where
    no fact is found. Raises ValueError for another wording.
    """
    if wording not in range(WORDINGS):
        raise ValueError(f"wording: is {wording}; 0 to {WORDINGS - 1} is allowed")
    once: dict[str, Found] = {}
    for fact in find_facts(document, spans):
        once.setdefault(fact.questions[wording], fact)
    facts = list(once.values())
    chosen = _spread([fact for fact in facts if not fact.cloze], limit)
    chosen += _spread([fact for fact in facts if fact.cloze], limit - len(chosen))
    return [Probe(fact.questions[wording]) for fact in sorted(chosen, key=lambda fact: fact.start)]


def text_answers(document: DocumentText, spans: Sequence[tuple[int, int]] | None) -> dict[str, str]:
    """What the text itself answers to the questions of `make_probes`, in any wording."""
    answers: dict[str, str] = {}
    for fact in find_facts(document, spans):
        for question in fact.questions:
            answers.setdefault(question, fact.value)
    return answers
