"""Streams every point within a distance, nearest first, until a bound of hits. Exact.

A hit qualifies by its score as the caller sees it; shards compare keys, so the bound is turned into
the greatest key whose score still qualifies. Nothing is kept between two streams: a cursor is the
(key, id) of the last hit.
"""

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np
import xxhash

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.limits import POINT_ID_BYTES_MAX, RANGE_HITS_MAX, SHARD_PAGE_BYTES_MAX
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.domain.session import Position
from shoal_cluster.query.asked import require_range
from shoal_cluster.query.examples import Example, example_vectors
from shoal_cluster.query.execute import SearchExplain
from shoal_cluster.query.explanation import explained
from shoal_cluster.query.merge import Hits
from shoal_cluster.query.plan import (
    SearchPlan,
    SearchRequest,
    check_search,
    plan_search,
    prepare_queries,
)
from shoal_cluster.query.replica_reads import ShardAnswer
from shoal_cluster.query.scatter import Reading, Scatter
from shoal_cluster.query.sorted_shards import Released, SortedPage, merged, page_bytes, rows_of
from shoal_cluster.shard.calls import AsOf
from shoal_cluster.shard.exploring_calls import RangeCall, RangeReply

MESSAGE_HITS_MAX = 1000
SHARD_HITS_MAX = 4096
"""Hits in one page of a shard; each page costs it a pass over its rows."""
SHARD_HITS_MIN, GATHERED_HITS_MAX = 64, 16 * SHARD_HITS_MAX
"""With more than 16 shards pages get smaller, so that what a coordinator holds does not grow."""

_CURSOR_BYTES_MAX = POINT_ID_BYTES_MAX + 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRequest:
    """search: everything but the query; its k stands for nothing. limit: hits in the whole stream.

    score_min (cosine, dot) or distance_max (l2). cursor: b"" to begin.
    """

    search: SearchRequest
    query: Example
    score_min: float | None = None
    distance_max: float | None = None
    limit: int = RANGE_HITS_MAX
    cursor: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeHits:
    """The next hits. cursor: continues behind them, b"" in the last of a stream.

    truncated, explain: in the last. truncated: more points qualify than were to be returned.
    """

    schema: CollectionSchema
    hits: Hits
    cursor: bytes
    as_of: Mapping[ShardNumber, Position]
    staleness_ms: float
    truncated: bool = False
    explain: SearchExplain | None = None


async def search_range(
    scatter: Scatter, request: RangeRequest, *, timeout_s: float
) -> AsyncGenerator[RangeHits, None]:
    """Yields the hits, nearest first, then one last item, perhaps without hits.

    Raises: InvalidRequest, NotFound (collection or the id), Overloaded, Unavailable.
    """
    reading = scatter.begin(request.search.collection, timeout_s)
    schema = reading.schema
    key_max = _key_max(request, schema.metric)
    require_range(request.limit, 1, RANGE_HITS_MAX, field="limit")
    placeholder = np.zeros((1, schema.dimension), np.float32)
    check_search(replace(request.search, k=1, queries=placeholder), schema)
    query = await example_vectors(reading, [request.query], request.search.freshness)
    body = prepare_queries(query, schema).data.cast("B")
    plan = plan_search(request.search, schema)
    stream = _stream_hash(plan, body, key_max)
    place, delivered = _decode_cursor(request.cursor, stream)
    asking = _Asking(reading, request, plan, body, after=place, key_max=key_max)
    taken: list[Released] = []
    size_bytes = 0
    truncated = False

    def released() -> RangeHits:
        hits = _hits_of(taken, schema, with_vector=request.search.with_vector)
        cursor = _encode_cursor(taken[-1][0], delivered, stream)
        return RangeHits(
            schema=schema,
            hits=hits,
            cursor=cursor,
            as_of=reading.positions,
            staleness_ms=reading.staleness_ms,
        )

    async with contextlib.aclosing(merged(plan.shards, asking.ask)) as lists:
        async for entries in lists:
            for entry in entries:
                if entry[0][1] == request.query.id:
                    continue
                if delivered == request.limit:
                    truncated = True
                    break
                taken.append(entry)
                delivered += 1
                size_bytes += _size_bytes(entry)
                if len(taken) == MESSAGE_HITS_MAX or size_bytes >= SHARD_PAGE_BYTES_MAX:
                    yield released()
                    taken.clear()
                    size_bytes = 0
            if taken:  # at once: the next ones may take another pass over a shard
                yield released()
                taken.clear()
                size_bytes = 0
            if truncated:
                break
    yield RangeHits(
        schema=schema,
        hits=_hits_of([], schema, with_vector=request.search.with_vector),
        cursor=b"",
        as_of=reading.positions,
        staleness_ms=reading.staleness_ms,
        truncated=truncated,
        explain=explained(reading, asking.shards, asking.answers, plan.pruned)
        if request.search.explain
        else None,
    )


def greatest_key(metric: Metric, bound: float) -> float:
    """Returns the greatest float32 key whose score satisfies the bound, inclusive.

    bound: least score for cosine and dot, whose score is minus the key; for l2 the greatest
    distance, the key's root as a float32.
    """
    with np.errstate(over="ignore"):
        if metric is not Metric.L2:
            key = np.float32(-bound)
            return float(key if float(key) <= -bound else np.nextafter(key, _LEAST))
        key = np.float32(bound * bound)
        for _ in range(_ROOT_STEPS_MAX):
            key = np.nextafter(key, _LEAST) if float(np.sqrt(key)) > bound else key
        for _ in range(_ROOT_STEPS_MAX):
            above = np.nextafter(key, _GREATEST)
            key = above if float(np.sqrt(above)) <= bound else key
        return float(key)


_LEAST, _GREATEST = np.float32(-np.inf), np.float32(np.inf)
_ROOT_STEPS_MAX = 4
"""Keys that share a root as a float32, at most: two or three, as a root halves relative distances.

Bounded, because with FAISS loaded subnormal numbers count as 0, and all have the same root.
"""


@dataclass(frozen=True, slots=True)
class _ShardRange:
    reply: RangeReply
    body: memoryview

    @property
    def as_of(self) -> AsOf:
        return self.reply.as_of

    @property
    def explain(self) -> Mapping[str, Any] | None:
        return self.reply.explain


class _Asking:
    """Asks shards for their next pages. shards, answers: of the first round, for explain."""

    def __init__(
        self,
        reading: Reading,
        request: RangeRequest,
        plan: SearchPlan,
        body: memoryview,
        *,
        after: tuple[float, bytes] | None,
        key_max: float,
    ) -> None:
        self._reading = reading
        self._search = request.search
        self._plan = plan
        self._body = body
        self._after = after
        self._key_max = key_max
        # One more than wanted, to tell whether there are more, and one that may be left out.
        share = max(SHARD_HITS_MIN, GATHERED_HITS_MAX // reading.schema.shards)
        self._limit = min(SHARD_HITS_MAX, share, request.limit + 2)
        self.shards: Sequence[ShardNumber] = ()
        self.answers: Sequence[ShardAnswer[_ShardRange]] = ()

    async def ask(
        self, wanted: Sequence[tuple[ShardNumber, SortedPage | None]]
    ) -> Sequence[SortedPage]:
        search, schema = self._search, self._reading.schema
        freshness = self._reading.continued(search.freshness)
        calls = [
            RangeCall(
                collection=schema.id,
                shard=shard,
                key_max=self._key_max,
                limit=self._limit,
                bytes_max=page_bytes(schema.shards),
                after=self._after if page is None else page.places[-1],
                filter=self._plan.filter_wire,
                with_tails=self._plan.with_tails,
                with_vector=search.with_vector,
                explain=search.explain and page is None,
                level=freshness.level(shard, schema),
            )
            for shard, page in wanted
        ]
        answers = await self._reading.ask(calls, _parse, body=self._body, stage="scatter")
        if not self.answers:
            self.shards, self.answers = [shard for shard, _ in wanted], answers
        return [self._page(answer.reply) for answer in answers]

    def _page(self, found: _ShardRange) -> SortedPage:
        reply = found.reply
        keys = np.frombuffer(reply.keys, np.float32).tolist()
        places = list(zip(keys, reply.ids, strict=True))
        vectors: Vectors | None = None
        if self._search.with_vector:
            vectors = np.frombuffer(found.body, np.float32)
            vectors = vectors.reshape(len(places), self._reading.schema.dimension)
        return SortedPage(
            order=places,
            places=places,
            ids=reply.ids,
            seqs=reply.seqs,
            tails=reply.tails,
            vectors=vectors,
            more=reply.more,
        )


def _key_max(request: RangeRequest, metric: Metric) -> float:
    """Raises: InvalidRequest unless the one bound of the metric is given, and finite."""
    wanted, other = ("distance_max", "score_min")
    bound, wrong = request.distance_max, request.score_min
    if metric is not Metric.L2:
        wanted, other, bound, wrong = other, wanted, wrong, bound
    if bound is None or wrong is not None:
        raise InvalidRequest(
            f"a range under {metric.value} is bounded by {wanted}"
            + (f", not by {other}" if wrong is not None else ", which is not given"),
            field=wanted if wrong is None else other,
        )
    if not np.isfinite(bound) or (metric is Metric.L2 and bound < 0):
        limit = "a finite number" if metric is not Metric.L2 else "a finite number, 0 or more"
        raise InvalidRequest(f"{wanted} {bound} is out of range", field=wanted, limit=limit)
    return greatest_key(metric, bound)


def _hits_of(entries: Sequence[Released], schema: CollectionSchema, *, with_vector: bool) -> Hits:
    rows = rows_of(entries)
    vectors = rows.vectors
    if with_vector and vectors is None:
        vectors = np.empty((0, schema.dimension), np.float32)
    return Hits(
        counts=[len(rows.ids)],
        ids=rows.ids,
        keys=np.array([key for key, _ in rows.places], np.float32),
        seqs=rows.seqs,
        tails=rows.tails,
        vectors=vectors,
    )


def _size_bytes(entry: Released) -> int:
    _, page, i = entry
    tail_bytes = 0 if page.tails is None else len(page.tails[i])
    return tail_bytes + (0 if page.vectors is None else page.vectors[i].nbytes)


def _parse(header: Any, body: memoryview) -> _ShardRange:
    return _ShardRange(RangeReply.from_wire(header), body)


def _encode_cursor(place: tuple[float, bytes], delivered: int, stream: bytes) -> bytes:
    packed: bytes = msgpack.packb([stream, *place, delivered])
    return packed


def _decode_cursor(cursor: bytes, stream: bytes) -> tuple[tuple[float, bytes] | None, int]:
    """Returns the last hit given out and how many were.

    Raises: InvalidRequest when the cursor is damaged, or of another range.
    """
    if not cursor:
        return None, 0
    fields = None
    if len(cursor) <= _CURSOR_BYTES_MAX:
        with contextlib.suppress(ValueError, msgpack.UnpackException):
            fields = msgpack.unpackb(cursor)
    match fields:
        case [bytes(begun), float(key), bytes(point_id), int(delivered)]:
            if begun == stream:
                return (key, point_id), delivered
            raise InvalidRequest(
                "the cursor belongs to another query, bound, filter or collection; begin without",
                field="cursor",
            )
    raise InvalidRequest(
        "not a cursor that a range search returned; begin without one", field="cursor"
    )


def _stream_hash(plan: SearchPlan, body: memoryview, key_max: float) -> bytes:
    """Names what is asked: a stored point that got another vector is another query."""
    asked = [plan.schema.id, plan.filter_wire, bytes(body), key_max]
    return xxhash.xxh3_64_digest(msgpack.packb(asked))
