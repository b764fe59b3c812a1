"""A policy document: its fields, and a compiled policy made of its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from router.policy.errors import ExpressionError, InvalidPolicy
from router.policy.expressions import MAX_LENGTH, Expression, compile_expression
from router.policy.source import Path, Source

VERSION = 1
MAX_RULES = 100
MAX_TOTAL_NODES = 1500
"""Names, literals, operators and calls in the conditions of all rules of a policy."""
MAX_PREFERENCE = 1.0
_ONE_LINE = r"^[^\x00-\x1f\x7f]*$"
Action = Literal["use", "forbid", "prefer", "cap", "require_confidence", "fall_back"]
ACTIONS: tuple[Action, ...] = get_args(Action)
Fraction = Annotated[FiniteFloat, Field(strict=True, ge=0, le=1)]


class Rule(BaseModel):
    """One rule: a condition and one action. Without `when` it always holds. docs/routing-policy.md says what each
    action does."""

    model_config = ConfigDict(extra="forbid")

    name: StrictStr = Field(
        min_length=1, max_length=100, pattern=_ONE_LINE, description="Appears in explanations; unique."
    )
    when: StrictStr = Field("True", min_length=1, max_length=MAX_LENGTH, description="The condition.")
    use: StrictStr | None = Field(
        None,
        min_length=1,
        max_length=255,
        pattern=_ONE_LINE,
        description="ID or external ID of the document that answers.",
    )
    forbid: Literal[True] | None = Field(None, description="The candidate does not answer.")
    prefer: Annotated[FiniteFloat, Field(strict=True, ge=-MAX_PREFERENCE, le=MAX_PREFERENCE)] | None = Field(
        None, description="Added to the candidate's rank."
    )
    cap: StrictInt | None = Field(None, ge=1, le=64, description="How many such candidates may answer together.")
    require_confidence: Fraction | None = Field(None, description="The least confidence with which it answers.")
    fall_back: Literal["base"] | None = Field(None, description="The base model answers.")

    @field_validator("when", mode="before")
    @classmethod
    def _always_or_never(cls, value: Any) -> Any:
        return str(value) if isinstance(value, bool) else value  # YAML's own true and false

    @model_validator(mode="after")
    def _one_action(self) -> Self:
        found = [name for name in ACTIONS if getattr(self, name) is not None]
        if len(found) != 1:
            had = f"has {', '.join(found)}" if found else "has none"
            raise ValueError(f"a rule has one of the actions {', '.join(ACTIONS)}; this one {had}")
        return self

    @property
    def action(self) -> Action:
        """The name of its action."""
        return next(name for name in ACTIONS if getattr(self, name) is not None)

    @property
    def value(self) -> Any:
        """What the action is given."""
        return getattr(self, self.action)


class PolicyDocument(BaseModel):
    """A tenant's routing policy."""

    model_config = ConfigDict(extra="forbid")

    version: StrictInt = Field(ge=VERSION, le=VERSION, description="The version of this language.")
    rules: list[Rule] = Field(max_length=MAX_RULES)


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule that can be evaluated."""

    name: str
    action: Action
    value: Any
    when: Expression


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy that was checked, without state. `rules` are in the document's order."""

    rules: tuple[CompiledRule, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """The documents that `use` rules name, in order."""
        return tuple(dict.fromkeys(rule.value for rule in self.rules if rule.action == "use"))


def compile_policy(text: str) -> CompiledPolicy:
    """Read and check a policy document, YAML or JSON. Raises InvalidPolicy with field, line and column."""
    source = Source(text)
    document = _validate(source)
    shared: dict[str, int] = {}
    rules: list[CompiledRule] = []
    names: set[str] = set()
    nodes = 0
    for number, rule in enumerate(document.rules):
        if rule.name in names:
            source.fail(f"there is another rule named '{rule.name}'", ("rules", number, "name"))
        names.add(rule.name)
        rules.append(CompiledRule(rule.name, rule.action, rule.value, _expression(source, number, rule, shared)))
        nodes += rules[-1].when.nodes
        if nodes > MAX_TOTAL_NODES:
            message = f"the conditions of all rules up to here have {nodes} parts; {MAX_TOTAL_NODES} are allowed"
            source.fail(message, ("rules", number, "when"), rule.name)
    return CompiledPolicy(tuple(rules))


def _expression(source: Source, number: int, rule: Rule, shared: dict[str, int]) -> Expression:
    path: Path = ("rules", number, "when")
    try:
        return compile_expression(rule.when, shared)
    except ExpressionError as error:
        place = source.place_within(path, error.line, error.column)
        raise InvalidPolicy(error.message, ".".join(map(str, path)), *place, rule.name) from error


def _validate(source: Source) -> PolicyDocument:
    if not isinstance(source.value, Mapping):
        source.fail("a policy is a mapping with 'version' and 'rules'", ())
    try:
        return PolicyDocument.model_validate(source.value)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        path: Path = item["loc"]
        rule = _rule_name(source.value, path)
        if item["type"] == "extra_forbidden":
            known = PolicyDocument if len(path) == 1 else Rule
            names = ", ".join(known.model_fields)
            source.fail(f"there is no field '{path[-1]}'; there are {names}", path, rule, at_key=True)
        if item["type"] == "missing":
            source.fail(f"'{path[-1]}' is missing", path, rule)
        message = item["msg"].removeprefix("Value error, ")
        source.fail(message.replace("valid dictionary or instance of Rule", "mapping"), path, rule)


def _rule_name(value: Mapping[str, Any], path: Path) -> str | None:
    if len(path) < 2 or path[0] != "rules":
        return None
    rule = value["rules"][path[1]]
    name = rule.get("name") if isinstance(rule, Mapping) else None
    return name[:100] if isinstance(name, str) else None
