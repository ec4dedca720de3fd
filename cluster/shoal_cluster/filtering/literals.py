"""Checks single values against the declared type of their attribute.

Rows (attributes.py) and filters (expression.py) share these rules, so that whatever can be stored
can also be asked for, and nothing else can.
"""

import math
from collections.abc import Iterable
from typing import TypeGuard

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import KEYWORD_BYTES_MAX
from shoal_cluster.domain.schema import AttributeType

Scalar = str | int | float | bool
"""Value of one attribute that is not a list; also one element of a keyword list."""

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1

INT64_TYPES = frozenset({AttributeType.INT, AttributeType.TIMESTAMP})
"""Types stored as signed 64-bit integers."""

NUMBER_TYPES = INT64_TYPES | {AttributeType.FLOAT}
"""Types that have an order, and so ranges."""

_SHOWN_LENGTH_MAX = 60
"""Characters of a literal that messages and descriptions repeat; the longest keyword has 1,024."""

_NAMES_SHOWN_MAX = 64
"""Names that one message lists: as many as a schema may declare."""


def show(value: Scalar) -> str:
    """Returns a literal as people write it, shortened: `"net"`, `3`, `true`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= _SHOWN_LENGTH_MAX else value[:_SHOWN_LENGTH_MAX] + "…"
        return '"' + text.encode("utf-8", "backslashreplace").decode() + '"'
    if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        # Printing an int takes quadratic time, and Python refuses above 4,300 digits.
        return f"<{value.bit_length()} bits>"
    return repr(value)


def show_names(names: Iterable[str]) -> str:
    """Returns the names in order, for a message that lists what is declared."""
    listed = list(names)
    if not listed:
        return "none"
    shown = ", ".join(listed[:_NAMES_SHOWN_MAX])
    rest = len(listed) - _NAMES_SHOWN_MAX
    return shown if rest <= 0 else f"{shown} and {rest} more"


def show_typed(value: object) -> str:
    """Returns the schema's word for the type of any value, and the value if it is short."""
    names = ((bool, "bool"), (str, "keyword"), (int, "int"), (float, "float"))
    for kind, name in names:
        if isinstance(value, kind):
            return f"{name} {show(value)}"
    if value is None:
        return "null"
    return "list" if isinstance(value, list | tuple) else type(value).__name__


def is_stored_form(value: object, kind: AttributeType) -> TypeGuard[Scalar]:
    """Tells quickly that `check_scalar` would return the value unchanged; False if unsure.

    Nearly every value is an ordinary one, and a batch of rows has thousands of them.
    """
    if isinstance(value, str):
        # In ASCII, characters are bytes, and none is a lone surrogate.
        return kind is _KEYWORD and value.isascii() and len(value) <= KEYWORD_BYTES_MAX
    if isinstance(value, bool):
        return kind is _BOOL
    if isinstance(value, int):
        return (kind is _INT or kind is _TIMESTAMP) and INT64_MIN <= value <= INT64_MAX
    return isinstance(value, float) and kind is _FLOAT and math.isfinite(value)


# Looking a member up in its enum costs 40 ns, more than the comparison it is for.
_KEYWORD = AttributeType.KEYWORD
_BOOL = AttributeType.BOOL
_INT = AttributeType.INT
_TIMESTAMP = AttributeType.TIMESTAMP
_FLOAT = AttributeType.FLOAT


def check_scalar(value: object, kind: AttributeType, *, attribute: str, field: str) -> Scalar:
    """Returns the value as a column of type `kind` stores it.

    kind: any type but KEYWORD_LIST, whose elements are checked as KEYWORD. An int is taken for a
    float attribute when a float holds it exactly; a bool is never a number.

    Raises: InvalidRequest naming attribute, declared type and what came (nothing was applied).
    """
    if kind is AttributeType.BOOL:
        if isinstance(value, bool):
            return value
    elif kind is AttributeType.FLOAT:
        if isinstance(value, float):
            return _finite(value, attribute, field)
        if isinstance(value, int) and not isinstance(value, bool):
            return _exact_float(value, attribute, field)
    elif kind in INT64_TYPES:
        if isinstance(value, int) and not isinstance(value, bool):
            return _int64(value, attribute, field)
    elif isinstance(value, str):
        return _keyword(value, attribute, field)
    raise InvalidRequest(
        f"attribute {show(attribute)} is declared {kind.value}, got {show_typed(value)}",
        field=field,
    )


def _finite(value: float, attribute: str, field: str) -> float:
    if not math.isfinite(value):
        raise InvalidRequest(
            f"attribute {show(attribute)} got {value}; leave the attribute out where there is no "
            "number",
            field=field,
            limit="finite numbers",
        )
    return value


def _exact_float(value: int, attribute: str, field: str) -> float:
    converted = float(_int64(value, attribute, field))
    if int(converted) != value:
        raise InvalidRequest(
            f"attribute {show(attribute)} is declared float, which cannot hold {value} exactly; "
            "send a float",
            field=field,
            limit="integers up to 2**53 for a float attribute",
        )
    return converted


def _int64(value: int, attribute: str, field: str) -> int:
    if not INT64_MIN <= value <= INT64_MAX:
        raise InvalidRequest(
            f"attribute {show(attribute)} got an integer out of range: {show(value)}",
            field=field,
            limit="signed 64-bit integers",
        )
    return value


def _keyword(value: str, attribute: str, field: str) -> str:
    try:
        size_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"attribute {show(attribute)} got text that is not valid Unicode: {error.reason}",
            field=field,
        ) from error
    if size_bytes > KEYWORD_BYTES_MAX:
        raise InvalidRequest(
            f"attribute {show(attribute)} got a keyword of {size_bytes} bytes",
            field=field,
            limit=f"{KEYWORD_BYTES_MAX} bytes of UTF-8",
        )
    return value
