"""The filter language: its syntax tree, its meaning for one row, and what it says about routing.

A filter travels from the edge (validation.py checks it, wire.py carries it over links) to every
segment. `matches` defines its meaning; the column indexes must agree with it (invariant F-1).
A missing value has one meaning, stated in README.md: nothing is equal to it, `!=` is exactly
`not (=)`, and `and`, `or`, `not` are two-valued logic.
"""

import enum
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from shoal_cluster.domain.schema import AttributeValue
from shoal_cluster.filtering.literals import Scalar, show

_VALUES_SHOWN_MAX = 8
_DESCRIPTION_LENGTH_MAX = 2000


class Operator(enum.Enum):
    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="


RANGE_OPERATORS = frozenset({Operator.LT, Operator.LE, Operator.GT, Operator.GE})

HOLDS: Mapping[Operator, Callable[[Any, Any], bool]] = {
    Operator.EQ: operator.eq,
    Operator.NE: operator.ne,
    Operator.LT: operator.lt,
    Operator.LE: operator.le,
    Operator.GT: operator.gt,
    Operator.GE: operator.ge,
}
"""What each operator asks of two present values."""

# The nodes take positional arguments, unlike other values here: `Not(Exists("pid"))` reads as the
# filter itself does.


@dataclass(frozen=True, slots=True)
class Comparison:
    attribute: str
    operator: Operator
    value: Scalar


@dataclass(frozen=True, slots=True)
class In:
    """True when the value is one of `values`."""

    attribute: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """True when the keyword list shares at least one keyword with `values`."""

    attribute: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AllOf:
    """True when the keyword list holds every keyword of `values`."""

    attribute: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exists:
    """True when the row has the attribute; an empty keyword list counts as present."""

    attribute: str


@dataclass(frozen=True, slots=True)
class And:
    children: "tuple[Expression, ...]"


@dataclass(frozen=True, slots=True)
class Or:
    children: "tuple[Expression, ...]"


@dataclass(frozen=True, slots=True)
class Not:
    child: "Expression"


Leaf = Comparison | In | AnyOf | AllOf | Exists
Expression = Leaf | And | Or | Not


def matches(expression: Expression, attributes: Mapping[str, AttributeValue]) -> bool:
    """Tells whether a row matches; the reference that every index must agree with.

    expression: validated against the schema the row was validated against.
    """
    match expression:
        case And(children):
            return all(matches(child, attributes) for child in children)
        case Or(children):
            return any(matches(child, attributes) for child in children)
        case Not(child):
            return not matches(child, attributes)
        case Comparison(attribute, Operator.NE, value):
            return not matches(Comparison(attribute, Operator.EQ, value), attributes)
        case Exists(attribute):
            return attribute in attributes
    held = attributes.get(expression.attribute)
    if held is None:
        return False
    match expression:
        case Comparison(_, asked, wanted):
            return HOLDS[asked](held, wanted)
        case In(_, values):
            return held in values
        case AnyOf(_, words):
            return isinstance(held, list) and any(word in held for word in words)
        case AllOf(_, words):
            return isinstance(held, list) and all(word in held for word in words)
        case _:
            assert_never(expression)


def pinned_values(expression: Expression, attribute: str) -> frozenset[str] | None:
    """Returns the values a keyword attribute can have in a matching row, None if unbounded.

    An empty set means that no row can match. Invariant F-4: a matching row has the attribute, with
    one of the returned values; so a search need only reach the shards those values hash to.
    """
    return _pinned(expression, attribute, negated=False)


def _pinned(expression: Expression, attribute: str, *, negated: bool) -> frozenset[str] | None:
    """Bounds the attribute where `expression` is true, or where it is false if `negated`."""
    match expression:
        case Not(child):
            return _pinned(child, attribute, negated=not negated)
        case And(children) | Or(children):
            bounds = [_pinned(child, attribute, negated=negated) for child in children]
            known = [bound for bound in bounds if bound is not None]
            # De Morgan: a negated `or` demands all its negated children, as an `and` does.
            if isinstance(expression, And) is not negated:
                return frozenset.intersection(*known) if known else None
            return frozenset().union(*known) if len(known) == len(bounds) else None
        case Comparison(name, asked, str(value)) if name == attribute:
            pinning = Operator.NE if negated else Operator.EQ
            return frozenset({value}) if asked is pinning else None
        case In(name, values) if name == attribute and not negated:
            words = frozenset(value for value in values if isinstance(value, str))
            return words if len(words) == len(values) else None
        case _:
            return None


def describe(expression: Expression) -> str:
    """Returns the filter as one line for people, shortened where it is long."""
    text = _describe(expression)
    if len(text) <= _DESCRIPTION_LENGTH_MAX:
        return text
    return text[:_DESCRIPTION_LENGTH_MAX] + "…"


def _describe(expression: Expression) -> str:
    match expression:
        case Comparison(attribute, asked, value):
            return f"{attribute} {asked.value} {show(value)}"
        case In(attribute, values):
            return f"{attribute} in {_describe_values(values)}"
        case AnyOf(attribute, values):
            return f"{attribute} any of {_describe_values(values)}"
        case AllOf(attribute, values):
            return f"{attribute} all of {_describe_values(values)}"
        case Exists(attribute):
            return f"exists({attribute})"
        case And(children):
            return " and ".join(_describe_operand(child) for child in children)
        case Or(children):
            return " or ".join(_describe_operand(child) for child in children)
        case Not(child):
            return f"not ({_describe(child)})"
        case _:
            assert_never(expression)


def _describe_operand(expression: Expression) -> str:
    text = _describe(expression)
    return f"({text})" if isinstance(expression, And | Or) else text


def _describe_values(values: tuple[Scalar, ...]) -> str:
    shown = ", ".join(show(value) for value in values[:_VALUES_SHOWN_MAX])
    rest = len(values) - _VALUES_SHOWN_MAX
    return f"[{shown}]" if rest <= 0 else f"[{shown}, and {rest} more]"
