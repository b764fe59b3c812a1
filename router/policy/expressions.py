"""The expression language of policies: a small part of Python's syntax, checked for types before it is kept.

`ast` reads the source; what is not on the allow-list below is refused with its place, so nothing of Python is reachable
but the declared facts (`facts.FACTS`), the functions (`functions.FUNCTIONS`) and literals. An accepted expression is
turned into closures. There are no loops and no calls that could make one, so evaluation takes at most as many steps as
the expression has nodes, and `Evaluation.spend` bounds what they may read.

Subexpressions that name no candidate are evaluated once for a request, however many candidates and rules there are.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from router.policy.errors import ExpressionError
from router.policy.facts import CHARACTERS_A_UNIT, FACTS, Evaluation, Type, visible_header
from router.policy.functions import FUNCTIONS, Function, is_number

MAX_LENGTH = 2000
"""Characters of an expression."""
MAX_NODES = 200
"""Names, literals, operators and calls of an expression."""
MAX_DEPTH = 20
"""How deep these may be nested."""
MAX_LITERAL = 1e15

Run = Callable[[Evaluation], Any]
_UNKNOWN = object()
_ORDERING: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}
_SCALARS = (Type.BOOLEAN, Type.NUMBER, Type.TEXT, Type.VALUE)
_LISTS = {Type.TEXTS: Type.TEXT, Type.NUMBERS: Type.NUMBER}
_NOT_THERE = {
    ast.JoinedStr: "formatted texts are not part of the language",
    ast.BinOp: "there is no arithmetic in the language",
    ast.IfExp: "there is no 'if … else' in the language; use 'and' and 'or'",
    ast.Lambda: "there are no lambdas in the language",
    ast.NamedExpr: "nothing can be assigned; '==' compares",
    ast.Tuple: "a list is written with square brackets",
    ast.Set: "a list is written with square brackets",
}


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked condition. `uses_candidate`: its value depends on which candidate it is asked of."""

    source: str
    uses_candidate: bool
    nodes: int
    _run: Run

    def holds(self, evaluation: Evaluation) -> bool:
        """Its value for the request and the candidate that `evaluation` holds. Raises CostExceeded."""
        evaluation.spend(self.nodes)  # no part of it runs twice; what texts and lists cost comes on top
        return self._run(evaluation) is True


@dataclass(frozen=True, slots=True)
class _Part:
    type: Type
    run: Run
    uses_candidate: bool = False


def compile_expression(source: str, shared: dict[str, int] | None = None) -> Expression:
    """Check and compile a condition. Raises ExpressionError with the place of what is wrong.

    `shared` numbers subexpressions without a candidate; give the same to all expressions of a policy, so that each
    value is found once for all of them.
    """
    reader = _Reader(source, {} if shared is None else shared)
    tree = reader.parse()
    part = reader.boolean(reader.part(tree, 1), tree)
    return Expression(source, part.uses_candidate, reader.nodes, part.run)


class _Reader:
    def __init__(self, source: str, shared: dict[str, int]) -> None:
        self.nodes = 0
        self._shared = shared
        self._lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")

    def parse(self) -> ast.expr:
        source = "\n".join(self._lines)
        if not source.strip():
            raise ExpressionError("the expression is empty")
        if len(source) > MAX_LENGTH:
            raise ExpressionError(f"the expression has {len(source)} characters; {MAX_LENGTH} are allowed")
        for line, text in enumerate(self._lines, 1):
            for character in ("\\", "\x00"):
                if character in text:
                    message = "a backslash means nothing here" if character == "\\" else "a NUL character"
                    raise ExpressionError(message, line, text.index(character) + 1)
        try:
            # In parentheses, so that an expression may have several lines.
            tree = ast.parse(f"({source}\n)", mode="eval").body
        except SyntaxError as error:
            line = error.lineno or 1
            if line > len(self._lines):  # at the parenthesis that was added
                place = len(self._lines), len(self._lines[-1]) + 1
                raise ExpressionError("it ends too early, or a ')' is too many", *place) from error
            message = error.msg.partition(". Perhaps")[0]
            raise ExpressionError(f"this cannot be read: {message}", *self._within(line, error.offset or 1)) from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise ExpressionError("this cannot be read: it is nested too deeply or holds invalid characters") from error
        if isinstance(tree, ast.Tuple) and not tree.elts:
            raise ExpressionError("the expression is empty")
        self._refuse_unknown(tree)
        if (tree.lineno, tree.col_offset) == (1, 0):
            raise ExpressionError("the parentheses do not match", *self._within(1, 2))
        return tree

    def part(self, node: ast.expr, depth: int) -> _Part:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self._fail(f"the expression has more than {MAX_NODES} names, literals and operators", node)
        if depth > MAX_DEPTH:
            self._fail(f"the expression is nested more than {MAX_DEPTH} deep", node)
        match node:
            case ast.Constant() | ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
                return self._literal(node)
            case ast.List():
                return self._list(node, depth)
            case ast.Attribute():
                return self._fact(node)
            case ast.Subscript():
                return self._subscript(node, depth)
            case ast.UnaryOp(op=ast.Not()):
                operand_part = self.boolean(self.part(node.operand, depth + 1), node.operand)
                return self._kept(node, _Part(Type.BOOLEAN, _not(operand_part.run), operand_part.uses_candidate))
            case ast.BoolOp():
                return self._bool_op(node, depth)
            case ast.Compare():
                return self._compare(node, depth)
            case ast.Call():
                return self._call(node, depth)
        self._refuse_unknown(node)
        raise AssertionError("unreachable")

    def boolean(self, part: _Part, node: ast.expr) -> _Part:
        """The part where true or false is needed. A metadata value holds when it is `true`."""
        if part.type is Type.VALUE:
            return _Part(Type.BOOLEAN, _is_true(part.run), part.uses_candidate)
        if part.type is not Type.BOOLEAN:
            self._fail(f"this is a {part.type}; a condition is needed that is true or false", node)
        return part

    def _refuse_unknown(self, node: ast.expr) -> None:
        if isinstance(node, ast.Name) and node.id in FACTS:
            self._fail(f"'{node.id}' alone is no value; it has {', '.join(FACTS[node.id])}", node)
        if isinstance(node, ast.Name):
            self._fail_for_name(node.id, [*FACTS, *FUNCTIONS, "True", "False"], f"unknown name '{node.id}'", node)
        allowed = ast.Constant | ast.List | ast.Attribute | ast.Subscript | ast.BoolOp | ast.Compare | ast.Call
        if isinstance(node, allowed) or isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return
        if isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
                return
            self._fail("there is no arithmetic in the language; '-' stands before a number only", node)
        self._fail(_NOT_THERE.get(type(node), "this is not part of the language"), node)

    def _literal(self, node: ast.expr) -> _Part:
        value = self._written(node)
        kind = Type.BOOLEAN if isinstance(value, bool) else Type.TEXT if isinstance(value, str) else Type.NUMBER
        return _Part(kind, _constant(value))

    def _written(self, node: ast.expr) -> bool | str | int | float:
        """The value of a literal, which may have a minus sign."""
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        literal = node.operand if isinstance(node, ast.UnaryOp) else node
        value = literal.value if isinstance(literal, ast.Constant) else None
        if isinstance(value, int | float) and is_number(value):
            if not value <= MAX_LITERAL:
                self._fail("the number is too large", node)
            return -value if negative else value
        if isinstance(value, bool | str) and not negative:
            return value
        self._fail("only texts, numbers, True and False can be written out", node)

    def _list(self, node: ast.List, depth: int) -> _Part:
        values, kinds = set(), set()
        for item in node.elts:
            literal = item.operand if isinstance(item, ast.UnaryOp) else item
            kind = self.part(item, depth + 1).type if isinstance(literal, ast.Constant) else None
            if kind not in (Type.TEXT, Type.NUMBER):
                self._fail("a list holds texts or numbers that are written out", item)
            kinds.add(kind)
            values.add(self._written(item))
        if len(kinds) != 1:
            self._fail("a list holds texts alone or numbers alone, at least one", node)
        return _Part(Type.TEXTS if kinds == {Type.TEXT} else Type.NUMBERS, _constant(frozenset(values)))

    def _fact(self, node: ast.Attribute) -> _Part:
        if not isinstance(node.value, ast.Name):
            self._fail(f"only {' and '.join(f'{name}.…' for name in FACTS)} have parts; use [\"name\"]", node)
        subject, name = node.value.id, node.attr
        if subject not in FACTS:
            self._fail_for_name(subject, FACTS, f"unknown name '{subject}'", node.value)
        kind = FACTS[subject].get(name)
        if kind is None:
            self._fail_for_name(name, FACTS[subject], f"a {subject} has no '{name}'", node)
        if subject == "request":
            return _Part(kind, _of_request(name))
        return _Part(kind, _of_candidate(name), True)

    def _subscript(self, node: ast.Subscript, depth: int) -> _Part:
        part = self.part(node.value, depth + 1)
        if part.type not in (Type.HEADERS, Type.METADATA, Type.VALUE):
            self._fail(f"this is a {part.type}; [\"name\"] goes with headers and metadata", node.value)
        self.nodes += 1
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if not isinstance(key, str):
            self._fail('the name in [ ] must be a text that is written out, such as ["product"]', node.slice)
        if part.type is Type.HEADERS:
            return _Part(Type.TEXT, _header(part.run, self._header_name(key, node.slice)))
        return _Part(Type.VALUE, _entry(part.run, key), part.uses_candidate)

    def _header_name(self, name: str, node: ast.expr) -> str:
        name = name.lower()
        if not visible_header(name):
            self._fail(f"policies see headers 'x-…' whose names hold nothing secret; '{name}' is none of these", node)
        return name

    def _bool_op(self, node: ast.BoolOp, depth: int) -> _Part:
        parts = [self.boolean(self.part(value, depth + 1), value) for value in node.values]
        runs = [part.run for part in parts]
        run = _all(runs) if isinstance(node.op, ast.And) else _any(runs)
        return self._kept(node, _Part(Type.BOOLEAN, run, any(part.uses_candidate for part in parts)))

    def _compare(self, node: ast.Compare, depth: int) -> _Part:
        nodes = [node.left, *node.comparators]
        parts = [self.part(operand, depth + 1) for operand in nodes]
        tests = [
            self._test(op, parts[i], parts[i + 1], nodes[i], nodes[i + 1]) for i, op in enumerate(node.ops)
        ]
        run = _chain([part.run for part in parts], tests)
        return self._kept(node, _Part(Type.BOOLEAN, run, any(part.uses_candidate for part in parts)))

    def _test(
        self, op: ast.cmpop, left: _Part, right: _Part, left_node: ast.expr, right_node: ast.expr
    ) -> Callable[[Any, Any, Evaluation], bool]:
        if isinstance(op, ast.In | ast.NotIn):
            return self._membership(isinstance(op, ast.In), left, right, left_node, right_node)
        if isinstance(op, ast.Eq | ast.NotEq):
            if left.type not in _SCALARS or right.type not in _SCALARS:
                at_fault, node = (left, left_node) if left.type not in _SCALARS else (right, right_node)
                self._fail(f"a {at_fault.type} cannot be compared; 'in' looks into it", node)
            if left.type is not right.type and Type.VALUE not in (left.type, right.type):
                self._fail(f"a {left.type} and a {right.type} are never equal", right_node)
            return _equal if isinstance(op, ast.Eq) else _unequal
        if type(op) not in _ORDERING:
            self._fail("'is' is not part of the language; use '=='", right_node)
        for part, node in ((left, left_node), (right, right_node)):
            if part.type not in (Type.NUMBER, Type.VALUE):
                self._fail(f"this is a {part.type}; only numbers have an order", node)
        return _ordered(_ORDERING[type(op)])

    def _membership(
        self, wanted: bool, left: _Part, right: _Part, left_node: ast.expr, right_node: ast.expr
    ) -> Callable[[Any, Any, Evaluation], bool]:
        if right.type is Type.TEXT:
            self._fail("'in' looks into lists, headers and metadata; use contains(text, part)", right_node)
        if right.type in _LISTS:
            if left.type not in (_LISTS[right.type], Type.VALUE):
                self._fail(f"a {left.type} is never in a {right.type}", left_node)
        elif right.type in (Type.HEADERS, Type.METADATA):
            if left.type is not Type.TEXT:
                self._fail(f"the names in {right.type} are texts, this is a {left.type}", left_node)
            if right.type is Type.HEADERS and not (isinstance(left_node, ast.Constant)):
                self._fail("the name of a header must be written out", left_node)
            if right.type is Type.HEADERS:
                name = self._header_name(left_node.value, left_node)  # type: ignore[attr-defined]
                return lambda _, headers, e: (name in headers) is wanted
        elif right.type is Type.VALUE:
            if left.type not in (Type.TEXT, Type.NUMBER):
                self._fail(f"a {left.type} cannot be looked for in metadata; a text or number can", left_node)
        else:
            self._fail(f"'in' cannot look into a {right.type}", right_node)
        return lambda one, many, e: _within(one, many, e) is wanted

    def _call(self, node: ast.Call, depth: int) -> _Part:
        if not isinstance(node.func, ast.Name):
            self._fail("only the language's own functions can be called", node.func)
        name = node.func.id
        function = FUNCTIONS.get(name)
        if function is None:
            self._fail_for_name(name, FUNCTIONS, f"unknown function '{name}'", node.func)
        if node.keywords:
            self._fail(f"{name} takes no named values", node.keywords[0].value)
        if len(node.args) != len(function.takes):
            self._fail(f"{name} takes {len(function.takes)} values, not {len(node.args)}", node)
        runs, uses_candidate = [], False
        for argument, taken in zip(node.args, function.takes, strict=True):
            part = self.part(argument, depth + 1)
            uses_candidate |= part.uses_candidate
            runs.append(self._argument(name, part, taken, argument))
        return self._kept(node, _Part(function.gives, _called(function, runs), uses_candidate))

    def _argument(self, name: str, part: _Part, taken: Type, node: ast.expr) -> Run:
        if part.type is taken or taken is Type.VALUE and part.type is Type.TEXT:
            return part.run
        if taken is Type.TEXT and part.type is Type.VALUE:
            return _text_or_empty(part.run)
        wanted = "text or metadata value" if taken is Type.VALUE else taken
        self._fail(f"{name} takes a {wanted} here, this is a {part.type}", node)

    def _kept(self, node: ast.expr, part: _Part) -> _Part:
        """The part, found once for a request where it names no candidate."""
        if part.uses_candidate:
            return part
        number = self._shared.setdefault(ast.dump(node), len(self._shared))
        return _Part(part.type, _once(part.run, number))

    def _within(self, line: int, column: int) -> tuple[int, int]:
        """A place in the parsed text, in characters from 1, as one in the source: without the first parenthesis."""
        line = min(max(line, 1), len(self._lines))
        column -= line == 1
        return line, min(max(column, 1), len(self._lines[line - 1]) + 1)

    def _fail(self, message: str, node: ast.expr) -> NoReturn:
        # `ast` counts bytes, and one more for the parenthesis in the first line.
        text = self._lines[node.lineno - 1] if node.lineno <= len(self._lines) else ""
        before = text.encode("utf-8", "surrogatepass")[: max(node.col_offset - (node.lineno == 1), 0)]
        column = len(before.decode("utf-8", "ignore")) + 1
        raise ExpressionError(message, min(node.lineno, len(self._lines)), column)

    def _fail_for_name(self, name: str, known: Any, message: str, node: ast.expr) -> NoReturn:
        close = difflib.get_close_matches(name.lower(), {one.lower(): one for one in known}, 1)
        names = {one.lower(): one for one in known}
        hint = f"did you mean '{names[close[0]]}'?" if close else f"there are {', '.join(names.values())}"
        self._fail(f"{message}; {hint}", node)


def _constant(value: Any) -> Run:
    return lambda e: value


def _of_request(name: str) -> Run:
    return lambda e: getattr(e.request, name)


def _of_candidate(name: str) -> Run:
    return lambda e: getattr(e.candidate, name)


def _header(headers: Run, name: str) -> Run:
    return lambda e: headers(e).get(name, "")


def _entry(holder: Run, key: str) -> Run:
    def run(e: Evaluation) -> Any:
        held = holder(e)
        return held.get(key) if isinstance(held, Mapping) else None

    return run


def _once(inner: Run, number: int) -> Run:
    def run(e: Evaluation) -> Any:
        value = e.known.get(number, _UNKNOWN)
        if value is _UNKNOWN:
            value = e.known[number] = inner(e)
        return value

    return run


def _is_true(inner: Run) -> Run:
    return lambda e: inner(e) is True


def _not(inner: Run) -> Run:
    return lambda e: not inner(e)


def _all(runs: list[Run]) -> Run:
    return lambda e: all(one(e) for one in runs)


def _any(runs: list[Run]) -> Run:
    return lambda e: any(one(e) for one in runs)


def _text_or_empty(inner: Run) -> Run:
    def run(e: Evaluation) -> str:
        value = inner(e)
        return value if isinstance(value, str) else ""

    return run


def _chain(runs: list[Run], tests: list[Callable[[Any, Any, Evaluation], bool]]) -> Run:
    if len(tests) == 1:
        (first, second), (only,) = runs, tests
        return lambda e: only(first(e), second(e), e)

    def run(e: Evaluation) -> bool:
        left = runs[0](e)
        for other, test in zip(runs[1:], tests, strict=True):
            right = other(e)
            if not test(left, right, e):
                return False
            left = right
        return True

    return run


def _called(function: Function, runs: list[Run]) -> Run:
    def run(e: Evaluation) -> Any:
        values = [one(e) for one in runs]
        e.spend(sum(len(value) for value in values if isinstance(value, str)) // CHARACTERS_A_UNIT)
        return function.run(*values)

    return run


def _same(one: Any, other: Any) -> bool:
    """Equal and of one kind; lists, objects and what is not there are equal to nothing."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, str):
        return isinstance(other, str) and one == other
    return is_number(one) and is_number(other) and one == other


def _equal(one: Any, other: Any, e: Evaluation) -> bool:
    if isinstance(one, str):
        e.spend(len(one) // CHARACTERS_A_UNIT)
    return _same(one, other)


def _unequal(one: Any, other: Any, e: Evaluation) -> bool:
    return not _equal(one, other, e)


def _ordered(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Evaluation], bool]:
    return lambda one, other, e: is_number(one) and is_number(other) and test(one, other)


def _within(one: Any, many: Any, e: Evaluation) -> bool:
    if isinstance(many, list):
        e.spend(len(many))
        return any(_equal(one, other, e) for other in many)
    if isinstance(many, frozenset):  # a list in the expression: texts or numbers
        if isinstance(one, str):
            e.spend(len(one) // CHARACTERS_A_UNIT)
        return (isinstance(one, str) or is_number(one)) and one in many
    return isinstance(many, Mapping) and isinstance(one, str) and one in many
