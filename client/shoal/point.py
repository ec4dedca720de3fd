"""Points as the SDK's user sees them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from shoal.vectors import VectorLike

AttributeInput = str | bool | int | float | datetime | list[str] | tuple[str, ...] | None
"""What an attribute can be given as; None means no value, a datetime needs a time zone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a row came from. Times are milliseconds since 1970-01-01 UTC; 0 and "" mean unknown."""

    source_id: str = ""
    source_version: str = ""
    source_changed_at_ms: int = 0
    embedded_at_ms: int = 0


# Not comparable: == on vectors gives an array, and two points are one by id only.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """One point, to be written or as it was read.

    vector: required to write; read back as float32, None when it was not asked for.
    attributes: declared, typed and filterable; a timestamp is read as int ms since 1970-01-01 UTC.
    payload: any JSON object, never filterable; None for none. seq: the sequence number of this
    version in its shard's order when it was read, for `if_seq`; 0 otherwise.
    """

    id: str
    vector: VectorLike | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    payload: Mapping[str, Any] | None = None
    provenance: Provenance | None = None
    seq: int = 0
