"""The filter builder: `F("section") == "net"`, combined with `&`, `|` and `~`.

A missing value equals nothing: every comparison on it is false, hence `!=` and `~` are true. Types
and limits are checked by the server, which knows what the collection declares.
"""

from collections.abc import Callable, Iterable
from datetime import datetime

import numpy as np

from shoal.errors import InvalidRequest
from shoal_protos.columns import timestamp_ms
from shoal_protos.v1 import types_pb2

FilterScalar = str | bool | int | float | datetime
"""What an attribute can be compared with; a datetime needs a time zone."""


class Filter:
    """A condition on rows. Immutable; made by `F` and by combining filters."""

    __slots__ = ("_condition",)

    def __init__(self, condition: types_pb2.Filter) -> None:
        self._condition = condition

    def to_proto(self) -> types_pb2.Filter:
        """Returns the message that is sent; it must not be changed."""
        return self._condition

    def __and__(self, other: "Filter") -> "Filter":
        if not isinstance(other, Filter):
            return NotImplemented
        parts = [*_parts(self, "conjunction"), *_parts(other, "conjunction")]
        return Filter(types_pb2.Filter(conjunction=types_pb2.FilterList(filters=parts)))

    def __or__(self, other: "Filter") -> "Filter":
        if not isinstance(other, Filter):
            return NotImplemented
        parts = [*_parts(self, "disjunction"), *_parts(other, "disjunction")]
        return Filter(types_pb2.Filter(disjunction=types_pb2.FilterList(filters=parts)))

    def __invert__(self) -> "Filter":
        return Filter(types_pb2.Filter(negation=self._condition))

    def __bool__(self) -> bool:
        raise TypeError(
            "a filter has no truth value: combine filters with & | ~ instead of and, or, not, put "
            "each comparison in parentheses, and write a range as (F('x') >= 1) & (F('x') < 5)"
        )

    def __repr__(self) -> str:
        return f"<Filter {_text(self._condition)}>"


class F:
    """Names an attribute to compare: `F("year") >= 2020`, `F("tag").any_of(["a", "b"])`."""

    __slots__ = ("_attribute",)

    def __init__(self, attribute: str) -> None:
        if not isinstance(attribute, str):
            raise InvalidRequest(
                f"F() takes the name of an attribute, not a {type(attribute).__name__}",
                field="filter",
            )
        self._attribute = attribute

    def __eq__(self, value: FilterScalar) -> Filter:  # type: ignore[override]
        return self._compare(types_pb2.COMPARISON_OP_EQ, value)

    def __ne__(self, value: FilterScalar) -> Filter:  # type: ignore[override]
        return self._compare(types_pb2.COMPARISON_OP_NE, value)

    def __lt__(self, value: FilterScalar) -> Filter:
        return self._compare(types_pb2.COMPARISON_OP_LT, value)

    def __le__(self, value: FilterScalar) -> Filter:
        return self._compare(types_pb2.COMPARISON_OP_LE, value)

    def __gt__(self, value: FilterScalar) -> Filter:
        return self._compare(types_pb2.COMPARISON_OP_GT, value)

    def __ge__(self, value: FilterScalar) -> Filter:
        return self._compare(types_pb2.COMPARISON_OP_GE, value)

    # Equality makes filters, so an F cannot be a dictionary key.
    __hash__ = None  # type: ignore[assignment]

    def in_(self, values: Iterable[FilterScalar]) -> Filter:
        """Holds when the value is one of `values`."""
        return Filter(types_pb2.Filter(member_of=self._membership(values)))

    def any_of(self, values: Iterable[str]) -> Filter:
        """Holds when at least one element of the keyword list is one of `values`."""
        return Filter(types_pb2.Filter(any_of=self._membership(values)))

    def all_of(self, values: Iterable[str]) -> Filter:
        """Holds when every one of `values` is an element of the keyword list."""
        return Filter(types_pb2.Filter(all_of=self._membership(values)))

    def exists(self) -> Filter:
        """Holds when the row has a value."""
        return Filter(types_pb2.Filter(exists=types_pb2.Existence(attribute=self._attribute)))

    def __bool__(self) -> bool:
        raise TypeError(
            f"F({self._attribute!r}) has no truth value: compare it, or call .exists() on it"
        )

    def __repr__(self) -> str:
        return f"F({self._attribute!r})"

    def _compare(self, op: types_pb2.ComparisonOp.ValueType, value: FilterScalar) -> Filter:
        comparison = types_pb2.Comparison(
            attribute=self._attribute, op=op, value=_filter_value(self._attribute, value)
        )
        return Filter(types_pb2.Filter(comparison=comparison))

    def _membership(self, values: Iterable[FilterScalar]) -> types_pb2.Membership:
        if isinstance(values, str):
            raise InvalidRequest(
                f"the values for {self._attribute!r} must be a list; write [{values!r}]",
                field="filter",
            )
        if not isinstance(values, Iterable):
            raise InvalidRequest(
                f"the values for {self._attribute!r} are a {type(values).__name__}, they must be "
                "a list",
                field="filter",
            )
        return types_pb2.Membership(
            attribute=self._attribute,
            values=[_filter_value(self._attribute, value) for value in values],
        )


def _filter_value(attribute: str, value: object) -> types_pb2.FilterValue:
    if isinstance(value, np.generic):
        value = value.item()
    try:
        # bool before int: True is an int to Python.
        if isinstance(value, bool):
            return types_pb2.FilterValue(bool=value)
        if isinstance(value, str):
            return types_pb2.FilterValue(keyword=value)
        if isinstance(value, int):
            return types_pb2.FilterValue(int=value)
        if isinstance(value, float):
            return types_pb2.FilterValue(float=value)
        if isinstance(value, datetime):
            return types_pb2.FilterValue(timestamp_ms=timestamp_ms(value))
    except ValueError as error:
        raise InvalidRequest(
            f"cannot compare {attribute!r} with {value!r}: {error}", field="filter"
        ) from error
    hint = f"; use ~F({attribute!r}).exists() to find rows without a value" if value is None else ""
    raise InvalidRequest(
        f"cannot compare {attribute!r} with a {type(value).__name__}: it must be str, bool, int, "
        f"float or datetime{hint}",
        field="filter",
    )


def _parts(condition: Filter, joined_by: str) -> list[types_pb2.Filter]:
    """Returns the parts of a filter already joined this way, so that long chains stay shallow."""
    message = condition.to_proto()
    if message.WhichOneof("condition") == joined_by:
        listed: types_pb2.FilterList = getattr(message, joined_by)
        return list(listed.filters)
    return [message]


_OP_TEXT = {
    types_pb2.COMPARISON_OP_EQ: "==",
    types_pb2.COMPARISON_OP_NE: "!=",
    types_pb2.COMPARISON_OP_LT: "<",
    types_pb2.COMPARISON_OP_LE: "<=",
    types_pb2.COMPARISON_OP_GT: ">",
    types_pb2.COMPARISON_OP_GE: ">=",
}


def _value_text(value: types_pb2.FilterValue) -> str:
    field = value.WhichOneof("value")
    return "?" if field is None else repr(getattr(value, field))


def _membership_text(word: str) -> Callable[[types_pb2.Membership], str]:
    return lambda membership: (
        f"{membership.attribute} {word} [{', '.join(map(_value_text, membership.values))}]"
    )


def _joined_text(word: str) -> Callable[[types_pb2.FilterList], str]:
    return lambda parts: "(" + f" {word} ".join(map(_text, parts.filters)) + ")"


_TEXT: dict[str, Callable[..., str]] = {
    "comparison": lambda c: f"{c.attribute} {_OP_TEXT.get(c.op, '?')} {_value_text(c.value)}",
    "member_of": _membership_text("in"),
    "any_of": _membership_text("any of"),
    "all_of": _membership_text("all of"),
    "exists": lambda existence: f"{existence.attribute} exists",
    "conjunction": _joined_text("and"),
    "disjunction": _joined_text("or"),
    "negation": lambda negated: f"not {_text(negated)}",
}


def _text(condition: types_pb2.Filter) -> str:
    """Returns a filter as one line for people."""
    field = condition.WhichOneof("condition")
    return "?" if field is None else _TEXT[field](getattr(condition, field))
