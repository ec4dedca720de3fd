"""Checks the attributes of a written row against the collection's declaration.

Runs once, before the row enters the WAL; everything below trusts its result.
"""

from collections.abc import Mapping

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import KEYWORD_LIST_LENGTH_MAX, KIB
from shoal_cluster.domain.schema import AttributeType, AttributeValue
from shoal_cluster.filtering.literals import (
    check_scalar,
    is_stored_form,
    show,
    show_names,
    show_typed,
)

ATTRIBUTE_BYTES_MAX = 256 * KIB
"""UTF-8 bytes of all keywords of one row, counted before duplicates are dropped.

64 attributes of 256 keywords of 1,024 bytes would be 16 MiB, more than a WAL record holds. 256 KiB
is what a payload may have, and one full keyword list.
"""


def validate_attributes(
    attributes: Mapping[str, object], declared: Mapping[str, AttributeType], *, field: str
) -> dict[str, AttributeValue]:
    """Returns the attributes as columns store them, in the order they came.

    field: where the mapping stands in the request, e.g. `points[3].attributes`. Ints become floats
    for float attributes; duplicates in a keyword list are dropped, the first one stays. A null is
    refused: a missing attribute is left out.

    Raises: InvalidRequest naming the field, e.g. `points[3].attributes.section` (nothing applied).
    """
    checked: dict[str, AttributeValue] = {}
    size_bytes = 0
    for name, value in attributes.items():
        kind = declared.get(name)
        if kind is None:
            raise InvalidRequest(
                f"attribute {show(name)} is not declared; declared are: {show_names(declared)}",
                field=field,
            )
        if is_stored_form(value, kind):
            checked[name] = value
            if isinstance(value, str):
                size_bytes += len(value)
            continue
        at = f"{field}.{name}"
        if kind is AttributeType.KEYWORD_LIST:
            words = _check_list(value, attribute=name, field=at)
            size_bytes += sum(len(word.encode()) for word in words)
            checked[name] = list(dict.fromkeys(words))
        else:
            scalar = check_scalar(value, kind, attribute=name, field=at)
            if isinstance(scalar, str):
                size_bytes += len(scalar.encode())
            checked[name] = scalar
    require_keyword_bytes(size_bytes, "one row", field=field)
    return checked


def keyword_bytes(attributes: Mapping[str, AttributeValue]) -> int:
    """Returns the UTF-8 bytes of all keywords of a row as it is stored."""
    size_bytes = 0
    for value in attributes.values():
        if isinstance(value, str):
            size_bytes += len(value.encode())
        elif isinstance(value, list):
            size_bytes += sum(len(word.encode()) for word in value)
    return size_bytes


def require_keyword_bytes(size_bytes: int, whose: str, *, field: str) -> None:
    """Raises: InvalidRequest when a row has more than ATTRIBUTE_BYTES_MAX."""
    if size_bytes > ATTRIBUTE_BYTES_MAX:
        raise InvalidRequest(
            f"the keywords of {whose} have {size_bytes} bytes together; text that is not "
            "filtered on belongs in the payload",
            field=field,
            limit=f"{ATTRIBUTE_BYTES_MAX} bytes of UTF-8",
        )


def _check_list(value: object, *, attribute: str, field: str) -> list[str]:
    if not isinstance(value, list | tuple):
        raise InvalidRequest(
            f"attribute {show(attribute)} is declared keyword_list, got {show_typed(value)}; "
            "send a list of keywords",
            field=field,
        )
    if len(value) > KEYWORD_LIST_LENGTH_MAX:
        raise InvalidRequest(
            f"attribute {show(attribute)} got a list of {len(value)} keywords",
            field=field,
            limit=f"{KEYWORD_LIST_LENGTH_MAX} keywords",
        )
    words = []
    for position, word in enumerate(value):
        if isinstance(word, str) and is_stored_form(word, AttributeType.KEYWORD):
            words.append(str(word))
            continue
        element = f"{field}[{position}]"
        checked = check_scalar(word, AttributeType.KEYWORD, attribute=attribute, field=element)
        words.append(str(checked))
    return words
