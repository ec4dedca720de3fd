"""Checks of plain arguments: what is wrong is said by its own name, before anything is sent.

The bounds are the server's. They are here as well because a value that its message cannot carry
could not be named by the server, and because 0 has a meaning of its own on the wire.
"""

import operator

import numpy as np

from shoal.errors import InvalidRequest

K_MAX = 1000
PAGE_SIZE_MAX = 1000
FACETS_MAX = 1000
GROUPS_MAX = 100
CANDIDATES_MAX = 1000
RANGE_HITS_MAX = 100_000
SEQ_MAX = (1 << 63) - 1


def checked_count(value: int, *, field: str, most: int, least: int = 1) -> int:
    """Returns the value as an int; numpy's integers are fine, bool and float are not.

    Raises: InvalidRequest naming field and limit unless it is a whole number from least to most.
    """
    limit = f"{least} to {most}"
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise InvalidRequest(
            f"{field} is {value!r}, it must be a whole number", field=field, limit=limit
        )
    number = operator.index(value)
    if not least <= number <= most:
        raise InvalidRequest(f"{field} {number} is out of range", field=field, limit=limit)
    return number


def checked_flag(value: bool, *, field: str) -> bool:
    """Raises: InvalidRequest naming the field unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise InvalidRequest(
            f"{field} is {value!r}, it must be True or False", field=field, limit="True or False"
        )
    return bool(value)


def checked_number(value: float, *, field: str) -> float:
    """Raises: InvalidRequest naming the field unless the value is a number; NaN is the server's."""
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise InvalidRequest(f"{field} is {value!r}, it must be a number", field=field)
    return float(value)


def checked_name(value: str, *, field: str) -> str:
    """Raises: InvalidRequest naming the field unless the value is a str."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} is a {type(value).__name__}, it must be a str", field=field)
    return value
