"""The form in which filters cross links: nested lists that msgpack can pack.

["=", attribute, value]            and !=  <  <=  >  >=
["in", attribute, [values]]        and any_of, all_of
["exists", attribute]
["and", [filters]]                 and or
["not", filter]
"""

from collections.abc import Mapping

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import FILTER_VALUES_MAX
from shoal_cluster.filtering.expression import (
    AllOf,
    And,
    AnyOf,
    Comparison,
    Exists,
    Expression,
    In,
    Not,
    Operator,
    Or,
)
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.filtering.validation import require_size

Wire = list[object]

_OPERATORS: Mapping[str, Operator] = {asked.value: asked for asked in Operator}


def to_wire(expression: Expression) -> Wire:
    """Returns the filter as nested lists; `from_wire` reverses it exactly."""
    match expression:
        case Comparison(attribute, asked, value):
            return [asked.value, attribute, value]
        case In(attribute, values):
            return ["in", attribute, list(values)]
        case AnyOf(attribute, words):
            return ["any_of", attribute, list(words)]
        case AllOf(attribute, words):
            return ["all_of", attribute, list(words)]
        case Exists(attribute):
            return ["exists", attribute]
        case And(children):
            return ["and", [to_wire(child) for child in children]]
        case Or(children):
            return ["or", [to_wire(child) for child in children]]
        case Not(child):
            return ["not", to_wire(child)]


def from_wire(wire: object) -> Expression:
    """Rebuilds a filter; checks its shape and size, not its attributes.

    Raises: InvalidRequest naming the malformed place (nothing was applied).
    """
    return _Decoding().decode(wire, field="filter", depth=1)


class _Decoding:
    """One walk over one wire form; counts nodes so that hostile input ends early."""

    def __init__(self) -> None:
        self._nodes = 0

    def decode(self, wire: object, *, field: str, depth: int) -> Expression:
        self._nodes += 1
        require_size(nodes=self._nodes, depth=depth, field=field)
        match wire:
            case ["and", [*children]]:
                return And(self._decode_children(children, field=f"{field}.and", depth=depth))
            case ["or", [*children]]:
                return Or(self._decode_children(children, field=f"{field}.or", depth=depth))
            case ["not", child]:
                return Not(self.decode(child, field=f"{field}.not", depth=depth + 1))
            case ["exists", str(attribute)]:
                return Exists(attribute)
            case ["in", str(attribute), [*values]]:
                return In(attribute, _decode_values(values, field))
            case ["any_of", str(attribute), [*values]]:
                return AnyOf(attribute, _decode_words(values, field))
            case ["all_of", str(attribute), [*values]]:
                return AllOf(attribute, _decode_words(values, field))
            case [str(asked), str(attribute), value] if asked in _OPERATORS:
                scalar = _decode_scalar(value, f"{field}.value")
                return Comparison(attribute, _OPERATORS[asked], scalar)
            case _:
                raise InvalidRequest("not a filter: unknown operator or operands", field=field)

    def _decode_children(
        self, children: list[object], *, field: str, depth: int
    ) -> tuple[Expression, ...]:
        # Checked before the walk, so that the count of a huge list costs nothing.
        require_size(nodes=self._nodes + len(children), depth=depth, field=field)
        return tuple(
            self.decode(child, field=f"{field}[{position}]", depth=depth + 1)
            for position, child in enumerate(children)
        )


def _decode_values(values: list[object], field: str) -> tuple[Scalar, ...]:
    if len(values) > FILTER_VALUES_MAX:
        raise InvalidRequest(
            f"the filter lists at least {len(values)} values",
            field=f"{field}.values",
            limit=f"{FILTER_VALUES_MAX} values in all",
        )
    return tuple(
        _decode_scalar(value, f"{field}.values[{position}]")
        for position, value in enumerate(values)
    )


def _decode_words(values: list[object], field: str) -> tuple[str, ...]:
    scalars = _decode_values(values, field)
    for position, value in enumerate(scalars):
        if not isinstance(value, str):
            raise InvalidRequest(
                "any_of and all_of take keywords only", field=f"{field}.values[{position}]"
            )
    return tuple(str(value) for value in scalars)


def _decode_scalar(value: object, field: str) -> Scalar:
    if not isinstance(value, str | int | float | bool):
        raise InvalidRequest(
            f"not a value to compare with: {type(value).__name__}; "
            "send a keyword, int, float, bool or timestamp",
            field=field,
        )
    return value
