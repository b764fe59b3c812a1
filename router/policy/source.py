"""The text of a policy document, YAML or JSON, read into plain values that know where they stand.

Aliases and tags are refused and size and depth are bounded before anything is built, so a small text cannot become a
large value. JSON is read as JSON; YAML's reader then only says where things stand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from router.policy.errors import InvalidPolicy

MAX_CHARACTERS = 65_536
MAX_DEPTH = 8
Path = tuple[int | str, ...]
_ESCAPES = {"x": 2, "u": 4, "U": 8}


class Source:
    """A document's `value` (mappings, lists, texts, numbers, true, false, nothing) and the places of its parts."""

    def __init__(self, text: str) -> None:
        """Raises InvalidPolicy for text that is too long or deep, or is neither JSON nor YAML."""
        if len(text) > MAX_CHARACTERS:
            raise InvalidPolicy(f"the text has {len(text)} characters; {MAX_CHARACTERS} are allowed")
        is_json = text.lstrip().startswith("{")
        # YAML takes no tabs between values, JSON does; inside its strings there are none.
        self._text = text.replace("\t", " ") if is_json else text
        self._lines = self._text.split("\n")
        self._values: dict[Path, Node] = {}
        self._keys: dict[Path, Node] = {}
        self.value = self._read(_json(text) if is_json else None)
        try:
            json.dumps(self.value, ensure_ascii=False, default=str, skipkeys=True).encode()
        except UnicodeEncodeError as error:
            raise InvalidPolicy("a text holds half of a surrogate pair") from error

    def fail(self, message: str, path: Path, rule: str | None = None, at_key: bool = False) -> NoReturn:
        """Raise InvalidPolicy for what stands at a path, or for what it would be in."""
        raise InvalidPolicy(message, ".".join(map(str, path)), *self.place(path, at_key), rule)

    def place(self, path: Path, at_key: bool = False) -> tuple[int, int]:
        """Line and column, from 1, of a value, or of the name in front of it; of the nearest thing around what is
        not there."""
        for length in range(len(path), -1, -1):
            node = self._values.get(path[:length])
            if node is not None:
                if at_key or not isinstance(node, ScalarNode):
                    node = self._keys.get(path[:length], node)
                return _place(node.start_mark)
        return 1, 1

    def place_within(self, path: Path, line: int, column: int) -> tuple[int, int]:
        """Line and column in the document of a place in a text value, which is given in lines and columns of it."""
        node = self._values.get(path)
        if not isinstance(node, ScalarNode):
            return self.place(path)
        lines = node.value.split("\n")
        wanted = sum(len(one) + 1 for one in lines[: line - 1]) + column - 1
        offset = self._offset(node, wanted)
        if offset is None:
            return self.place(path)
        before = self._text[:offset]
        return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1

    def _read(self, known: Any) -> Any:
        try:
            _check_events(self._text)
            loader = yaml.SafeLoader(self._text)
            node = loader.get_single_node()
            if node is None:
                raise InvalidPolicy("the document is empty")
            self._note(node, ())
            return loader.construct_document(node) if known is None else known
        except yaml.MarkedYAMLError as error:
            if known is not None:
                return known
            place = _place(error.problem_mark or error.context_mark)
            raise InvalidPolicy(f"this is not YAML: {error.problem or error.context}", "", *place) from error
        except yaml.YAMLError as error:
            position = getattr(error, "position", 0)
            before = self._text[:position]
            place = before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1
            raise InvalidPolicy("this is not YAML: a character that is not allowed", "", *place) from error
        except (ValueError, OverflowError) as error:  # a date or number that is none
            raise InvalidPolicy(f"this is not YAML: {error}") from error

    def _note(self, node: Node, path: Path) -> None:
        self._values[path] = node
        if isinstance(node, SequenceNode):
            for number, item in enumerate(node.value):
                self._note(item, (*path, number))
        elif isinstance(node, MappingNode):
            for key, value in node.value:
                name = key.value if isinstance(key, ScalarNode) else ""
                inner = (*path, name)
                if inner in self._values:
                    self._keys[inner] = key
                    self.fail(f"'{name}' is there twice", inner, at_key=True)
                self._keys[inner] = key
                self._note(value, inner)

    def _offset(self, node: ScalarNode, wanted: int) -> int | None:
        """Where in the text the character `wanted` of a scalar stands; None where that cannot be told.

        The scalar's characters are found again in the text one after the other. Escapes count as what they stand for,
        and white space as any white space, since folding and indentation change it.
        """
        place, end = node.start_mark.index, node.end_mark.index
        if node.style in ("|", ">"):
            place = self._text.find("\n", place) + 1 or end
        elif node.style:
            place, end = place + 1, end - 1
        for number, character in enumerate(node.value[: wanted + 1]):
            if character.isspace() and not self._text.startswith("\\", place):
                if number == wanted:
                    return place
                continue
            if not character.isspace():
                while place < end and self._text[place].isspace():
                    place += 1
            length = _written_length(self._text, place, end, node.style)
            if number == wanted:
                return place
            place += length
        return min(place, end) if wanted <= len(node.value) else None


def _json(text: str) -> Any:
    """The value where the text is JSON, else None."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidPolicy(f"'{twice}' is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None  # it may be YAML in braces


def _check_events(text: str) -> None:
    """Refuse what could make a small text a large value."""
    depth = 0
    for event in _events(text):
        line, column = _place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            raise InvalidPolicy("aliases are not allowed", "", line, column)
        if isinstance(event, yaml.NodeEvent) and (getattr(event, "tag", None) not in (None, "!")):
            raise InvalidPolicy("tags are not allowed", "", line, column)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise InvalidPolicy(f"the document is nested more than {MAX_DEPTH} deep", "", line, column)


def _place(mark: Any) -> tuple[int, int]:
    """Line and column from 1 of YAML's marks, which count from 0 and may be missing."""
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


def _events(text: str) -> Iterator[yaml.Event]:
    yield from yaml.parse(text, Loader=yaml.SafeLoader)


def _written_length(text: str, place: int, end: int, style: str | None) -> int:
    """How many characters of the text stand for the next one of a scalar."""
    if style == "'" and text.startswith("''", place):
        return 2
    if style == '"' and text.startswith("\\", place) and place + 1 < end:
        return 2 + _ESCAPES.get(text[place + 1], 0)
    return 1
