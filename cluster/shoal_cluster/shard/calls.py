"""What coordinators and shard servers say to each other over links: one class a message.

A message travels as a msgpack header (`to_wire`) and a raw body, so that vectors are never
re-encoded. The body of a reply with rows is `rows_body`: their vectors as float32, then their
tails, whose lengths are in the header, which is too small for large tails. Ids are UTF-8 bytes on
the wire. Filters are the wire form of filtering/expression.py. Sequence numbers are per shard.
Methods: the `METHOD` of each call.

    SEARCH -> SearchReply   GET -> RowsReply    SCROLL -> RowsReply   COUNT -> CountReply
    WRITE  -> a WriteReply or an error for each call of the group
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar

from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.domain.errors import from_wire as error_from_wire
from shoal_cluster.domain.errors import to_wire as error_to_wire
from shoal_cluster.domain.ids import NO_SLOT, CollectionId, Epoch, Seq, ShardNumber, Slot
from shoal_cluster.domain.point import Tail
from shoal_cluster.domain.session import ORIGIN, Consistency, Position

UNKNOWN_CLIENT = "request_id.client_id"
"""The field of the error that refuses a request because its client may have been forgotten."""

AFTER_EVERY_SLOT = Slot((1 << 63) - 1)
"""The `since` of a write whose conditions alone keep it from being carried out twice."""


def rows_body(vectors: bytes | memoryview, tails: Sequence[Tail] | None) -> bytes:
    """Returns the body of a reply with these rows: their float32 bytes, b"" for none, and tails."""
    return b"".join((vectors, *(tails or ())))


def _lengths(tails: Sequence[Tail] | None) -> list[int] | None:
    return None if tails is None else list(map(len, tails))


def _tails_in(body: bytes | memoryview, lengths: Sequence[int] | None) -> list[Tail] | None:
    """Returns views of the tails, which end the body; nothing is copied."""
    if lengths is None:
        return None
    view = memoryview(body)
    bounds = accumulate(lengths, initial=len(view) - sum(lengths))
    return [view[start:end] for start, end in pairwise(bounds)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLevel:
    """How fresh a read must be. at_least: the session token's position of this shard."""

    consistency: Consistency = Consistency.EVENTUAL
    at_least: Position = ORIGIN

    def to_wire(self) -> list[Any]:
        return [self.consistency.value, self.at_least.epoch, self.at_least.seq]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "ReadLevel":
        return ReadLevel(
            consistency=Consistency(fields[0]),
            at_least=Position(Epoch(fields[1]), Seq(fields[2])),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchCall:
    """Asks one shard for its top k of each query; body: (queries, dimension) float32.

    Queries are as the index wants them (unit length under cosine). recall_target None means the
    collection's own. max_cost_ms: instead of a recall, what one query may cost this shard, of one
    processor. filter None means every row.
    """

    METHOD: ClassVar[str] = "search"
    collection: CollectionId
    shard: ShardNumber
    k: int
    filter: Any = None
    exact: bool = False
    recall_target: float | None = None
    with_payload: bool = False
    with_vector: bool = False
    explain: bool = False
    max_cost_ms: float | None = None
    level: ReadLevel = ReadLevel()

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.k,
            self.filter,
            self.exact,
            self.recall_target,
            self.with_payload,
            self.with_vector,
            self.explain,
            self.max_cost_ms,
            self.level.to_wire(),
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "SearchCall":
        return SearchCall(
            collection=fields[0],
            shard=fields[1],
            k=fields[2],
            filter=fields[3],
            exact=fields[4],
            recall_target=fields[5],
            with_payload=fields[6],
            with_vector=fields[7],
            explain=fields[8],
            max_cost_ms=fields[9],
            level=ReadLevel.from_wire(fields[10]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AsOf:
    """What a reply reflects. staleness_ms: since the replica was last known to be at the tail.

    slot: of the last record it reflects.
    """

    position: Position
    staleness_ms: float
    slot: Slot = NO_SLOT

    def to_wire(self) -> list[Any]:
        return [self.position.epoch, self.position.seq, self.staleness_ms, self.slot]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "AsOf":
        return AsOf(position=Position(fields[0], fields[1]), staleness_ms=fields[2], slot=fields[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReply:
    """Hits of all queries laid end to end; query i owns the next counts[i] of them.

    keys: float32 bytes, ascending within a query (smaller is better: minus inner product, or
    squared distance), ties by id. tails: domain/point.py tails, parallel to ids, when payloads were
    asked for. Body: `rows_body`; vectors of all hits (hits, dimension) float32 when asked for, as
    stored (unit length under cosine; the norm is in the tail). explain: a map, see shard/search.py.
    search_us: microseconds spent in the shard, by stage.
    """

    counts: Sequence[int]
    ids: Sequence[bytes]
    keys: bytes
    seqs: Sequence[int]
    tails: Sequence[Tail] | None
    as_of: AsOf
    explain: Mapping[str, Any] | None = None

    def to_wire(self) -> list[Any]:
        return [
            self.counts,
            self.ids,
            self.keys,
            self.seqs,
            _lengths(self.tails),
            self.as_of.to_wire(),
            self.explain,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any], body: bytes | memoryview) -> "SearchReply":
        return SearchReply(
            counts=fields[0],
            ids=fields[1],
            keys=fields[2],
            seqs=fields[3],
            tails=_tails_in(body, fields[4]),
            as_of=AsOf.from_wire(fields[5]),
            explain=fields[6],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GetCall:
    """Asks for rows by id; ids that are not there are simply missing from the reply."""

    METHOD: ClassVar[str] = "get"
    collection: CollectionId
    shard: ShardNumber
    ids: Sequence[bytes]
    with_vector: bool = False
    with_tails: bool = True
    level: ReadLevel = ReadLevel()

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.ids,
            self.with_vector,
            self.with_tails,
            self.level.to_wire(),
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "GetCall":
        return GetCall(
            collection=fields[0],
            shard=fields[1],
            ids=fields[2],
            with_vector=fields[3],
            with_tails=fields[4],
            level=ReadLevel.from_wire(fields[5]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrollCall:
    """Asks for up to `limit` rows with id > after (b"" for the start), in byte order of ids."""

    METHOD: ClassVar[str] = "scroll"
    collection: CollectionId
    shard: ShardNumber
    after: bytes
    limit: int
    filter: Any = None
    with_vector: bool = False
    with_tails: bool = True
    level: ReadLevel = ReadLevel()

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.after,
            self.limit,
            self.filter,
            self.with_vector,
            self.with_tails,
            self.level.to_wire(),
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "ScrollCall":
        return ScrollCall(
            collection=fields[0],
            shard=fields[1],
            after=fields[2],
            limit=fields[3],
            filter=fields[4],
            with_vector=fields[5],
            with_tails=fields[6],
            level=ReadLevel.from_wire(fields[7]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsReply:
    """Rows, parallel arrays. Body: `rows_body`, vectors (rows, dimension) float32 as stored.

    cut: what follows the last row did not fit (SHARD_PAGE_BYTES_MAX); there is one row at least.
    """

    ids: Sequence[bytes]
    seqs: Sequence[int]
    tails: Sequence[Tail] | None
    as_of: AsOf
    cut: bool = False

    def to_wire(self) -> list[Any]:
        return [self.ids, self.seqs, _lengths(self.tails), self.as_of.to_wire(), self.cut]

    @staticmethod
    def from_wire(fields: Sequence[Any], body: bytes | memoryview) -> "RowsReply":
        return RowsReply(
            ids=fields[0],
            seqs=fields[1],
            tails=_tails_in(body, fields[2]),
            as_of=AsOf.from_wire(fields[3]),
            cut=fields[4],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CountCall:
    METHOD: ClassVar[str] = "count"
    collection: CollectionId
    shard: ShardNumber
    filter: Any = None
    level: ReadLevel = ReadLevel()

    def to_wire(self) -> list[Any]:
        return [self.collection, self.shard, self.filter, self.level.to_wire()]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "CountCall":
        return CountCall(
            collection=fields[0],
            shard=fields[1],
            filter=fields[2],
            level=ReadLevel.from_wire(fields[3]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CountReply:
    rows: int
    as_of: AsOf

    def to_wire(self) -> list[Any]:
        return [self.rows, self.as_of.to_wire()]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "CountReply":
        return CountReply(rows=fields[0], as_of=AsOf.from_wire(fields[1]))


class WriteKind(enum.Enum):
    UPSERT = "upsert"
    PATCH = "patch"
    DELETE = "delete"
    DELETE_WHERE = "delete_where"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteCall:
    """One request's writes to one shard: atomic, in one WAL record. Goes to the primary.

    (client_id, request_no) names the request for ever; sending it again returns the first answer.
    UPSERT: ids, tails (domain/point.py encode_tail) and body (n, dimension) float32 as stored.
    PATCH: ids and patches, one map of attributes to set (None removes) per id; ids not there are
    skipped. DELETE: ids. DELETE_WHERE: filter; removes at most DELETE_BY_FILTER_MAX rows.
    if_absent: refuse (Conflict) when any id exists. if_seqs: refuse unless each id's row has
    exactly this seq (0: absent).

    since: a slot that was full before the request can have been carried out, NO_SLOT when none is
    known, None when nobody sent it before its group. Decides what an unknown client's request is: a
    first one, or one that may have been forgotten.
    """

    collection: CollectionId
    shard: ShardNumber
    client_id: str
    request_no: int
    kind: WriteKind
    ids: Sequence[bytes] = ()
    tails: Sequence[bytes] = ()
    patches: Sequence[Mapping[str, Any]] = ()
    filter: Any = None
    if_absent: bool = False
    if_seqs: Sequence[int] | None = None
    since: Slot | None = None
    body: bytes | memoryview = field(default=b"", repr=False)

    @property
    def size_bytes(self) -> int:
        """What the call takes in memory and in the log, but for some 100 bytes."""
        rows_bytes = sum(map(len, self.ids)) + sum(map(len, self.tails))
        return memoryview(self.body).nbytes + rows_bytes

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.client_id,
            self.request_no,
            self.kind.value,
            self.ids,
            self.tails,
            self.patches,
            self.filter,
            self.if_absent,
            self.if_seqs,
            self.since,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any], body: bytes | memoryview, since: Slot) -> "WriteCall":
        """since: if the call has none of its own."""
        return WriteCall(
            collection=fields[0],
            shard=fields[1],
            client_id=fields[2],
            request_no=fields[3],
            kind=WriteKind(fields[4]),
            ids=fields[5],
            tails=fields[6],
            patches=fields[7],
            filter=fields[8],
            if_absent=fields[9],
            if_seqs=fields[10],
            since=since if fields[11] is None else fields[11],
            body=body,
        )


@dataclass(frozen=True, slots=True)
class WriteGroup:
    """Writes to one shard that travel together. Each has its own fate, as if it had come alone.

    since: of the calls that have none of their own, known before the group was sent.
    """

    METHOD: ClassVar[str] = "write"
    calls: Sequence[WriteCall]
    since: Slot = NO_SLOT

    def to_wire(self) -> list[Any]:
        first = self.calls[0]
        calls = [[call.to_wire(), memoryview(call.body).nbytes] for call in self.calls]
        return [first.collection, first.shard, calls, self.since]

    def bodies(self) -> list[bytes | memoryview]:
        return [call.body for call in self.calls]

    @staticmethod
    def from_wire(fields: Sequence[Any], body: bytes | memoryview) -> "WriteGroup":
        calls = []
        start = 0
        rest = memoryview(body)
        for call_fields, size_bytes in fields[2]:
            call_body = rest[start : start + size_bytes]
            calls.append(WriteCall.from_wire(call_fields, call_body, fields[3]))
            start += size_bytes
        return WriteGroup(calls, fields[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReply:
    """position: of the request's last operation (merge it into the session token).

    first_seq: of its first operation. affected: rows written, patched or deleted. more: a
    DELETE_WHERE left matching rows; send another with a fresh request number. slot: of its record.
    """

    position: Position
    first_seq: int
    affected: int
    more: bool = False
    slot: Slot = NO_SLOT

    def to_wire(self) -> list[Any]:
        return [
            self.position.epoch,
            self.position.seq,
            self.first_seq,
            self.affected,
            self.more,
            self.slot,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "WriteReply":
        return WriteReply(
            position=Position(fields[0], fields[1]),
            first_seq=fields[2],
            affected=fields[3],
            more=fields[4],
            slot=fields[5],
        )


WriteFate = WriteReply | ShoalError
"""What became of one call of a group."""


def fates_to_wire(fates: Sequence[WriteFate]) -> list[Any]:
    return [
        error_to_wire(fate) if isinstance(fate, ShoalError) else fate.to_wire() for fate in fates
    ]


def fates_from_wire(fields: Sequence[Any]) -> list[WriteFate]:
    return [
        error_from_wire(fate) if isinstance(fate, dict) else WriteReply.from_wire(fate)
        for fate in fields
    ]
