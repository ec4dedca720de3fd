"""Checks that the reads of explore.py share. Pure."""

from collections.abc import Collection

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.schema import AttributeType, CollectionSchema
from shoal_cluster.filtering.literals import show, show_names


def require_range(value: int, low: int, high: int, *, field: str) -> None:
    """Raises: InvalidRequest naming the field and the limit."""
    if not low <= value <= high:
        raise InvalidRequest(
            f"{field} {value} is out of range", field=field, limit=f"{low} to {high}"
        )


def require_attribute(
    schema: CollectionSchema, attribute: str, kinds: Collection[AttributeType], *, field: str
) -> AttributeType:
    """Returns the declared type of an attribute.

    Raises: InvalidRequest when it is not declared, or not of one of the types.
    """
    kind = schema.attributes.get(attribute)
    if kind is None:
        raise InvalidRequest(
            f"attribute {show(attribute)} is not declared; "
            f"declared are: {show_names(schema.attributes)}",
            field=field,
        )
    if kind not in kinds:
        raise InvalidRequest(
            f"attribute {show(attribute)} is declared {kind.value}",
            field=field,
            limit=", ".join(known.value for known in AttributeType if known in kinds),
        )
    return kind
