"""Messages of the reads beside search, get, scroll and count; the rules of calls.py hold.

FACETS -> FacetsReply
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from shoal_cluster.domain.ids import CollectionId, ShardNumber
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.shard.calls import AsOf, ReadLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class FacetsCall:
    """Asks how many living, matching rows have each value of an attribute."""

    METHOD: ClassVar[str] = "facets"
    collection: CollectionId
    shard: ShardNumber
    attribute: str
    filter: Any = None
    explain: bool = False
    level: ReadLevel = field(default_factory=ReadLevel)

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.attribute,
            self.filter,
            self.explain,
            self.level.to_wire(),
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "FacetsCall":
        return FacetsCall(
            collection=fields[0],
            shard=fields[1],
            attribute=fields[2],
            filter=fields[3],
            explain=fields[4],
            level=ReadLevel.from_wire(fields[5]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FacetsReply:
    """All values that some row has, in any order, and their counts. rows: that match.

    missing: of those, the rows without a value.
    """

    values: Sequence[Scalar]
    counts: Sequence[int]
    rows: int
    missing: int
    as_of: AsOf
    explain: Mapping[str, Any] | None = None

    def to_wire(self) -> list[Any]:
        return [
            self.values,
            self.counts,
            self.rows,
            self.missing,
            self.as_of.to_wire(),
            self.explain,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "FacetsReply":
        return FacetsReply(
            values=fields[0],
            counts=fields[1],
            rows=fields[2],
            missing=fields[3],
            as_of=AsOf.from_wire(fields[4]),
            explain=fields[5],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrollOrderedCall:
    """Asks for up to `limit` rows in the order of an attribute, behind `after`.

    bytes_max: of tails and vectors; a page has one row at least.
    after: (value, id) of the last row given out, value None among rows without one; None for the
    beginning. with_tails: domain/point.py tails of the rows.
    """

    METHOD: ClassVar[str] = "scroll_ordered"
    collection: CollectionId
    shard: ShardNumber
    attribute: str
    descending: bool
    limit: int
    bytes_max: int
    after: tuple[Scalar | None, bytes] | None = None
    filter: Any = None
    with_tails: bool = False
    with_vector: bool = False
    explain: bool = False
    level: ReadLevel = field(default_factory=ReadLevel)

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.attribute,
            self.descending,
            self.limit,
            self.bytes_max,
            self.after,
            self.filter,
            self.with_tails,
            self.with_vector,
            self.explain,
            self.level.to_wire(),
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "ScrollOrderedCall":
        return ScrollOrderedCall(
            collection=fields[0],
            shard=fields[1],
            attribute=fields[2],
            descending=fields[3],
            limit=fields[4],
            bytes_max=fields[5],
            after=None if fields[6] is None else (fields[6][0], fields[6][1]),
            filter=fields[7],
            with_tails=fields[8],
            with_vector=fields[9],
            explain=fields[10],
            level=ReadLevel.from_wire(fields[11]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedRowsReply:
    """Rows in order, parallel arrays; values: None where a row has none.

    Body: vectors (rows, dimension) float32 as stored, when asked for. more: rows follow behind
    these; there may be fewer than asked for, but never none while more follow.
    """

    values: Sequence[Scalar | None]
    ids: Sequence[bytes]
    seqs: Sequence[int]
    tails: Sequence[bytes] | None
    more: bool
    as_of: AsOf
    explain: Mapping[str, Any] | None = None

    def to_wire(self) -> list[Any]:
        return [
            self.values,
            self.ids,
            self.seqs,
            self.tails,
            self.more,
            self.as_of.to_wire(),
            self.explain,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "OrderedRowsReply":
        return OrderedRowsReply(
            values=fields[0],
            ids=fields[1],
            seqs=fields[2],
            tails=fields[3],
            more=fields[4],
            as_of=AsOf.from_wire(fields[5]),
            explain=fields[6],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FindGroupsCall:
    """Asks for the groups with the best best-hit; body: the query, (1, dimension) float32.

    groups: how many. excluded: the id of a point that is no hit. The rest is as in SearchCall.
    """

    METHOD: ClassVar[str] = "find_groups"
    collection: CollectionId
    shard: ShardNumber
    group_by: str
    groups: int
    excluded: bytes | None = None
    filter: Any = None
    exact: bool = False
    recall_target: float | None = None
    explain: bool = False
    level: ReadLevel = field(default_factory=ReadLevel)

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.group_by,
            self.groups,
            self.excluded,
            self.filter,
            self.exact,
            self.recall_target,
            self.explain,
            self.level.to_wire(),
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "FindGroupsCall":
        return FindGroupsCall(
            collection=fields[0],
            shard=fields[1],
            group_by=fields[2],
            groups=fields[3],
            excluded=fields[4],
            filter=fields[5],
            exact=fields[6],
            recall_target=fields[7],
            explain=fields[8],
            level=ReadLevel.from_wire(fields[9]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FindGroupsReply:
    """Values of the groups, by their best hit; keys (float32 bytes) and ids of those hits.

    bounded: the shard gave up before it had found all that were asked for, or that there are none.
    """

    values: Sequence[Scalar]
    keys: bytes
    ids: Sequence[bytes]
    bounded: bool
    as_of: AsOf
    explain: Mapping[str, Any] | None = None

    def to_wire(self) -> list[Any]:
        return [
            self.values,
            self.keys,
            self.ids,
            self.bounded,
            self.as_of.to_wire(),
            self.explain,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "FindGroupsReply":
        return FindGroupsReply(
            values=fields[0],
            keys=fields[1],
            ids=fields[2],
            bounded=fields[3],
            as_of=AsOf.from_wire(fields[4]),
            explain=fields[5],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHitsCall:
    """Asks for the best `size` hits of each of several groups; body: the query, as above."""

    METHOD: ClassVar[str] = "group_hits"
    collection: CollectionId
    shard: ShardNumber
    group_by: str
    values: Sequence[Scalar]
    size: int
    excluded: bytes | None = None
    filter: Any = None
    exact: bool = False
    recall_target: float | None = None
    with_tails: bool = False
    with_vector: bool = False
    level: ReadLevel = field(default_factory=ReadLevel)

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.group_by,
            self.values,
            self.size,
            self.excluded,
            self.filter,
            self.exact,
            self.recall_target,
            self.with_tails,
            self.with_vector,
            self.level.to_wire(),
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "GroupHitsCall":
        return GroupHitsCall(
            collection=fields[0],
            shard=fields[1],
            group_by=fields[2],
            values=fields[3],
            size=fields[4],
            excluded=fields[5],
            filter=fields[6],
            exact=fields[7],
            recall_target=fields[8],
            with_tails=fields[9],
            with_vector=fields[10],
            level=ReadLevel.from_wire(fields[11]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeCall:
    """Asks for the next up to `limit` rows whose key is at most `key_max`; body: the query.

    after: (key, id) of the last hit given out, None for the beginning. bytes_max: of tails and
    vectors; a page has one hit at least.
    """

    METHOD: ClassVar[str] = "range"
    collection: CollectionId
    shard: ShardNumber
    key_max: float
    limit: int
    bytes_max: int
    after: tuple[float, bytes] | None = None
    filter: Any = None
    with_tails: bool = False
    with_vector: bool = False
    explain: bool = False
    level: ReadLevel = field(default_factory=ReadLevel)

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.key_max,
            self.limit,
            self.bytes_max,
            self.after,
            self.filter,
            self.with_tails,
            self.with_vector,
            self.explain,
            self.level.to_wire(),
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "RangeCall":
        return RangeCall(
            collection=fields[0],
            shard=fields[1],
            key_max=fields[2],
            limit=fields[3],
            bytes_max=fields[4],
            after=None if fields[5] is None else (fields[5][0], fields[5][1]),
            filter=fields[6],
            with_tails=fields[7],
            with_vector=fields[8],
            explain=fields[9],
            level=ReadLevel.from_wire(fields[10]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeReply:
    """Hits by (key, id), parallel arrays; keys: float32 bytes. Body: vectors when asked for.

    more: hits follow behind these; never none while more follow.
    """

    keys: bytes
    ids: Sequence[bytes]
    seqs: Sequence[int]
    tails: Sequence[bytes] | None
    more: bool
    as_of: AsOf
    explain: Mapping[str, Any] | None = None

    def to_wire(self) -> list[Any]:
        return [
            self.keys,
            self.ids,
            self.seqs,
            self.tails,
            self.more,
            self.as_of.to_wire(),
            self.explain,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "RangeReply":
        return RangeReply(
            keys=fields[0],
            ids=fields[1],
            seqs=fields[2],
            tails=fields[3],
            more=fields[4],
            as_of=AsOf.from_wire(fields[5]),
            explain=fields[6],
        )
