"""Reads rows by id, page by page, and counts them.

Where a point lies: in a collection partitioned by an attribute, an id alone does not tell the
shard, so a read by id asks all shards. While a point moves to another partition (ingest/execute.py)
two shards may hold it for a moment; a read by id then returns the row of the lower shard number,
and scroll and count see both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import PointId, ShardNumber
from shoal_cluster.domain.limits import (
    BATCH_POINTS_MAX,
    GATHERED_BYTES_MAX,
    MIB,
    POINT_ID_BYTES_MAX,
    SCROLL_LIMIT_MAX,
)
from shoal_cluster.domain.partition import shard_of_id
from shoal_cluster.domain.point import Tail, Vectors
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.shard_caller import TopologySource
from shoal_cluster.domain.topology import Topology
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.validation import validate
from shoal_cluster.filtering.wire import to_wire
from shoal_cluster.query.cursor import Cursor
from shoal_cluster.query.gather import gather
from shoal_cluster.query.plan import Freshness, collection_of
from shoal_cluster.query.pruning import reachable_shards
from shoal_cluster.query.replica_reads import ReplicaReads, ShardRead
from shoal_cluster.shard.calls import (
    AsOf,
    CountCall,
    CountReply,
    GetCall,
    RowsReply,
    ScrollCall,
)

PAGE_BYTES_MAX = 16 * MIB
"""A page that is this large ends, however few rows it has, so that a reply fits one message."""

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsResult:
    """Rows as parallel arrays; vectors (rows, dimension) float32 as stored; None if not asked for.

    next_cursor: of a scroll, b"" after the last page.
    """

    schema: CollectionSchema
    ids: Sequence[bytes]
    seqs: Sequence[int]
    tails: Sequence[Tail] | None
    vectors: Vectors | None
    as_of: Mapping[ShardNumber, Position]
    staleness_ms: float
    next_cursor: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountResult:
    schema: CollectionSchema
    rows: int
    as_of: Mapping[ShardNumber, Position]
    staleness_ms: float


@dataclass(frozen=True, slots=True)
class _ShardRows:
    reply: RowsReply
    body: memoryview


class RowReader:
    """Reads rows for one coordinator. Used from one event loop."""

    def __init__(self, *, reads: ReplicaReads, topology: TopologySource, clock: Clock) -> None:
        self._reads = reads
        self._topology = topology
        self._clock = clock

    async def get(
        self,
        collection: str,
        ids: Sequence[bytes],
        *,
        with_vector: bool,
        with_payload: bool = True,
        freshness: Freshness,
        timeout_s: float,
    ) -> RowsResult:
        """Returns the points that exist, in the order of `ids`.

        ids: 1 to BATCH_POINTS_MAX, UTF-8, no duplicates. with_payload False: no tails,
        not even for the lengths of vectors under cosine.

        Raises: InvalidRequest, NotFound (the collection), Overloaded, Unavailable.
        """
        deadline_s = self._clock.monotonic_s() + timeout_s
        topology = self._topology.current()
        schema = collection_of(topology, collection).schema
        check_ids(ids)
        calls = [
            GetCall(
                collection=schema.id,
                shard=shard,
                ids=of_shard,
                with_vector=with_vector,
                with_tails=with_payload,
                level=freshness.level(shard, schema),
            )
            for shard, of_shard in _ids_by_shard(ids, schema).items()
        ]
        pages: list[_ShardRows] = []
        as_of: dict[ShardNumber, AsOf] = {}
        size_bytes = 0
        while calls:
            answers = await self._read_all(calls, _parse_rows, schema, topology, deadline_s)
            pages += answers
            size_bytes += sum(len(page.body) for page in answers)
            for call, page in zip(calls, answers, strict=True):
                as_of[call.shard] = page.reply.as_of
            calls = [
                replace(call, ids=_after(call.ids, page.reply.ids[-1]))
                for call, page in zip(calls, answers, strict=True)
                if page.reply.cut
            ]
            if size_bytes > GATHERED_BYTES_MAX:
                raise InvalidRequest(
                    f"{len(ids)} points have more than {size_bytes} bytes; get fewer at a time",
                    field="ids",
                    limit=f"{GATHERED_BYTES_MAX} bytes of payloads, attributes and vectors",
                )
        rows = _collected(schema, pages, as_of, with_vector=with_vector, with_tails=with_payload)
        return _in_order_of(ids, rows)

    async def scroll(
        self,
        collection: str,
        *,
        filter: Expression | None,
        limit: int,
        cursor: bytes,
        with_vector: bool,
        with_payload: bool = True,
        freshness: Freshness,
        timeout_s: float,
    ) -> RowsResult:
        """Returns the next page, shard by shard and by id within a shard.

        cursor: b"" for the first page. A page may hold fewer rows than `limit` (PAGE_BYTES_MAX);
        only an empty `next_cursor` says that it is the last.

        Raises: InvalidRequest, NotFound (the collection), Overloaded, Unavailable.
        """
        deadline_s = self._clock.monotonic_s() + timeout_s
        topology = self._topology.current()
        schema = collection_of(topology, collection).schema
        if not 1 <= limit <= SCROLL_LIMIT_MAX:
            raise InvalidRequest(
                f"limit {limit} is out of range", field="limit", limit=f"1 to {SCROLL_LIMIT_MAX}"
            )
        if filter is not None:
            filter = validate(filter, schema.attributes)
        wire = None if filter is None else to_wire(filter)
        place = Cursor.decode(cursor, schema=schema, filter_wire=wire)
        shards, _ = reachable_shards(schema, filter)
        # Under cosine vectors are stored with unit length; the caller's length is in the tail.
        with_tails = with_payload or (with_vector and schema.metric is Metric.COSINE)
        pages: list[_ShardRows] = []
        as_of: dict[ShardNumber, AsOf] = {}
        rows = size_bytes = 0
        remaining = [shard for shard in shards if shard >= place.shard]
        while remaining:
            shard = remaining[0]
            if rows >= limit or size_bytes >= PAGE_BYTES_MAX:
                break
            if place.shard != shard:
                place = Cursor(shard=shard, after=b"")
            call = ScrollCall(
                collection=schema.id,
                shard=shard,
                after=place.after,
                limit=limit - rows,
                filter=wire,
                with_vector=with_vector,
                with_tails=with_tails,
                level=freshness.level(shard, schema),
            )
            [page] = await self._read_all([call], _parse_rows, schema, topology, deadline_s)
            as_of[shard] = page.reply.as_of
            if page.reply.ids:
                # A shard may send fewer rows than asked for, to keep its reply small; only an
                # empty one means that it has no more.
                place = Cursor(shard=shard, after=page.reply.ids[-1])
                pages.append(page)
                rows += len(page.reply.ids)
                size_bytes += len(page.body)
            else:
                remaining.pop(0)
        return _collected(
            schema,
            pages,
            as_of,
            with_vector=with_vector,
            with_tails=with_tails,
            next_cursor=place.encode(schema=schema, filter_wire=wire) if remaining else b"",
        )

    async def count(
        self,
        collection: str,
        *,
        filter: Expression | None,
        freshness: Freshness,
        timeout_s: float,
    ) -> CountResult:
        """Returns how many live points satisfy the filter.

        Raises: InvalidRequest, NotFound (the collection), Overloaded, Unavailable.
        """
        deadline_s = self._clock.monotonic_s() + timeout_s
        topology = self._topology.current()
        schema = collection_of(topology, collection).schema
        if filter is not None:
            filter = validate(filter, schema.attributes)
        shards, _ = reachable_shards(schema, filter)
        calls = [
            CountCall(
                collection=schema.id,
                shard=shard,
                filter=None if filter is None else to_wire(filter),
                level=freshness.level(shard, schema),
            )
            for shard in shards
        ]
        counts = await self._read_all(calls, _parse_count, schema, topology, deadline_s)
        as_of = {call.shard: count.as_of for call, count in zip(calls, counts, strict=True)}
        return CountResult(
            schema=schema,
            rows=sum(count.rows for count in counts),
            as_of=_positions(as_of),
            staleness_ms=_staleness_ms(as_of),
        )

    async def _read_all(
        self,
        calls: Sequence[GetCall | ScrollCall | CountCall],
        parse: Callable[[Any, memoryview], Reply],
        schema: CollectionSchema,
        topology: Topology,
        deadline_s: float,
    ) -> list[Reply]:
        """Returns the reply of each call, in their order."""
        answers = await gather(
            [
                self._reads.read(
                    ShardRead(
                        collection=schema.name,
                        collection_id=schema.id,
                        shard=call.shard,
                        method=call.METHOD,
                        header=call.to_wire(),
                        parse=parse,
                        consistency=call.level.consistency,
                        kind=call.METHOD,
                    ),
                    topology,
                    deadline_s=deadline_s,
                )
                for call in calls
            ]
        )
        return [answer.reply for answer in answers]


def check_ids(ids: Sequence[bytes]) -> None:
    """Raises: InvalidRequest naming the first id that is too short, too long or there twice."""
    if not 1 <= len(ids) <= BATCH_POINTS_MAX:
        raise InvalidRequest(
            f"{len(ids)} ids given", field="ids", limit=f"1 to {BATCH_POINTS_MAX} ids"
        )
    seen: set[bytes] = set()
    for i, point_id in enumerate(ids):
        if not 1 <= len(point_id) <= POINT_ID_BYTES_MAX:
            raise InvalidRequest(
                f"the id has {len(point_id)} bytes",
                field=f"ids[{i}]",
                limit=f"1 to {POINT_ID_BYTES_MAX} bytes",
            )
        if point_id in seen:
            raise InvalidRequest(f"the id {point_id.decode()!r} is there twice", field=f"ids[{i}]")
        seen.add(point_id)


def _after(ids: Sequence[bytes], last: bytes) -> Sequence[bytes]:
    return ids[ids.index(last) + 1 :]


def _parse_rows(header: Any, body: memoryview) -> _ShardRows:
    return _ShardRows(RowsReply.from_wire(header, body), body)


def _parse_count(header: Any, body: memoryview) -> CountReply:
    return CountReply.from_wire(header)


def _ids_by_shard(
    ids: Sequence[bytes], schema: CollectionSchema
) -> dict[ShardNumber, Sequence[bytes]]:
    """Returns what to ask each shard for; without a partition attribute, each id goes to one."""
    if schema.shards == 1 or schema.partition_by is not None:
        return dict.fromkeys(map(ShardNumber, range(schema.shards)), ids)
    by_shard: dict[ShardNumber, list[bytes]] = {}
    for point_id in ids:
        shard = shard_of_id(PointId(point_id.decode()), schema.shards)
        by_shard.setdefault(shard, []).append(point_id)
    return dict(by_shard)


def _collected(
    schema: CollectionSchema,
    pages: Sequence[_ShardRows],
    as_of: Mapping[ShardNumber, AsOf],
    *,
    with_vector: bool,
    with_tails: bool,
    next_cursor: bytes = b"",
) -> RowsResult:
    """Lays the rows of all pages end to end."""
    ids: list[bytes] = []
    seqs: list[int] = []
    tails: list[Tail] = []
    for page in pages:
        ids.extend(page.reply.ids)
        seqs.extend(page.reply.seqs)
        tails.extend(page.reply.tails or ())
    vectors = None
    if with_vector:
        blocks = [
            np.frombuffer(page.body, np.float32, len(page.reply.ids) * schema.dimension)
            for page in pages
        ]
        flat = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
        vectors = flat.reshape(len(ids), schema.dimension)
    return RowsResult(
        schema=schema,
        ids=ids,
        seqs=seqs,
        tails=tails if with_tails else None,
        vectors=vectors,
        as_of=_positions(as_of),
        staleness_ms=_staleness_ms(as_of),
        next_cursor=next_cursor,
    )


def _in_order_of(ids: Sequence[bytes], rows: RowsResult) -> RowsResult:
    """Returns the rows in the order of `ids`, each once (the first one given)."""
    position: dict[bytes, int] = {}
    for i, point_id in enumerate(rows.ids):
        position.setdefault(point_id, i)
    order = [position[point_id] for point_id in ids if point_id in position]
    return replace(
        rows,
        ids=[rows.ids[i] for i in order],
        seqs=[rows.seqs[i] for i in order],
        tails=None if rows.tails is None else [rows.tails[i] for i in order],
        vectors=None if rows.vectors is None else rows.vectors[order],
    )


def _positions(as_of: Mapping[ShardNumber, AsOf]) -> dict[ShardNumber, Position]:
    return {shard: reflected.position for shard, reflected in as_of.items()}


def _staleness_ms(as_of: Mapping[ShardNumber, AsOf]) -> float:
    return max((reflected.staleness_ms for reflected in as_of.values()), default=0.0)
