"""What the policy package raises."""

from __future__ import annotations

_QUOTED = 500


class PolicyError(Exception):
    """Base of all errors of a policy."""


class InvalidPolicy(PolicyError):
    """A policy document that cannot be taken.

    `path` is the field at fault with dots (`rules.0.when`), empty for the document as a whole. `line` and `column`
    count from 1, in characters of the document's text. `rule` is the rule's name, where it has one. Long
    texts are cut, and what UTF-8 cannot hold is replaced.
    """

    def __init__(self, message: str, path: str = "", line: int = 1, column: int = 1, rule: str | None = None) -> None:
        super().__init__(message)
        self.message = _printable(message)
        self.path = _printable(path)
        self.line = line
        self.column = column
        self.rule = None if rule is None else _printable(rule)

    def __str__(self) -> str:
        where = f"line {self.line}, column {self.column}"
        named = f" of rule '{self.rule}'" if self.rule else ""
        return f"{self.path or 'policy'}{named} ({where}): {self.message}"


class ExpressionError(PolicyError):
    """An expression outside the language. `line` and `column` count from 1, in characters of the expression."""

    def __init__(self, message: str, line: int = 1, column: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.message}"


class CostExceeded(PolicyError):
    """Evaluation has used up its budget (`router.policy.facts.Evaluation`)."""


def _printable(text: str) -> str:
    return text[:_QUOTED].encode("utf-8", "replace").decode()
