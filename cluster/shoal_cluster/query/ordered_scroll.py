"""Pages through a collection in the order of an attribute. The cursor is a place in that order.

Whether the row a cursor names still exists does not matter, and nothing is kept between pages.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import xxhash

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.limits import KEYWORD_BYTES_MAX, POINT_ID_BYTES_MAX, SCROLL_LIMIT_MAX
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.literals import Scalar, check_scalar
from shoal_cluster.filtering.validation import validate
from shoal_cluster.filtering.wire import to_wire
from shoal_cluster.query.asked import require_attribute, require_range
from shoal_cluster.query.execute import SearchExplain
from shoal_cluster.query.explanation import explained
from shoal_cluster.query.plan import Freshness
from shoal_cluster.query.pruning import reachable_shards
from shoal_cluster.query.replica_reads import ShardAnswer
from shoal_cluster.query.rows import PAGE_BYTES_MAX, RowsResult
from shoal_cluster.query.scatter import Reading, Scatter
from shoal_cluster.query.sorted_shards import Released, SortedPage, merged, page_bytes, rows_of
from shoal_cluster.shard.exploring_calls import OrderedRowsReply, ScrollOrderedCall

KINDS = frozenset(AttributeType) - {AttributeType.KEYWORD_LIST}

_CURSOR_BYTES_MAX = KEYWORD_BYTES_MAX + POINT_ID_BYTES_MAX + 64
"""The longest value, the longest id, and less than 64 bytes of everything else."""

_SHARD_ROWS_MIN = 16

Place = tuple[Scalar | None, bytes]
"""(value, id) of a row; value None when it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedScrollRequest:
    """cursor: b"" for the first page."""

    collection: str
    order_by: str
    limit: int
    descending: bool = False
    cursor: bytes = b""
    filter: Expression | None = None
    with_payload: bool = False
    with_vector: bool = False
    freshness: Freshness = field(default_factory=Freshness)
    explain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedRows:
    rows: RowsResult
    explain: SearchExplain | None = None


async def scroll_ordered(
    scatter: Scatter, request: OrderedScrollRequest, *, timeout_s: float
) -> OrderedRows:
    """Returns the next page; only an empty `next_cursor` says that it is the last.

    Raises: InvalidRequest, NotFound (the collection), Overloaded, Unavailable.
    """
    reading = scatter.begin(request.collection, timeout_s)
    schema = reading.schema
    kind = require_attribute(schema, request.order_by, KINDS, field="order_by")
    require_range(request.limit, 1, SCROLL_LIMIT_MAX, field="limit")
    filter = None if request.filter is None else validate(request.filter, schema.attributes)
    wire = None if filter is None else to_wire(filter)
    shards, pruned = reachable_shards(schema, filter)
    asking = _Asking(
        reading,
        request,
        wire,
        after=_decode_cursor(request, schema, kind, wire),
        # Twice a fair share: most pages then need one round, and not all rows of every shard.
        limit=min(request.limit, 2 * request.limit // max(len(shards), 1) + _SHARD_ROWS_MIN),
    )
    taken: list[Released] = []
    full = False
    size_bytes = 0
    async with contextlib.aclosing(merged(shards, asking.ask)) as lists:
        async for entries in lists:
            for entry in entries:
                taken.append(entry)
                size_bytes += _size_bytes(entry, schema)
                full = len(taken) == request.limit or size_bytes >= PAGE_BYTES_MAX
                if full:
                    break
            if full:
                break
    rows = rows_of(taken)
    vectors = rows.vectors
    if request.with_vector and vectors is None:
        vectors = np.empty((0, schema.dimension), np.float32)
    # A page that is full may happen to be the last; an empty one then follows.
    next_cursor = _encode_cursor(rows.places[-1], request, schema, wire) if full else b""
    return OrderedRows(
        rows=RowsResult(
            schema=schema,
            ids=rows.ids,
            seqs=rows.seqs,
            tails=rows.tails or (),
            vectors=vectors,
            as_of=reading.positions,
            staleness_ms=reading.staleness_ms,
            next_cursor=next_cursor,
        ),
        explain=explained(reading, asking.shards, asking.answers, pruned)
        if request.explain
        else None,
    )


@dataclass(frozen=True, slots=True)
class _ShardRows:
    reply: OrderedRowsReply
    body: memoryview

    @property
    def as_of(self) -> Any:
        return self.reply.as_of

    @property
    def explain(self) -> Any:
        return self.reply.explain


class _Asking:
    """Asks shards for their next pages. shards, answers: of the first round, for explain."""

    def __init__(
        self,
        reading: Reading,
        request: OrderedScrollRequest,
        wire: Any,
        *,
        after: Place | None,
        limit: int,
    ) -> None:
        self._reading = reading
        self._request = request
        self._wire = wire
        self._after = after
        self._limit = limit
        schema = reading.schema
        # Under cosine the length that a vector is given back with is in its tail.
        self._with_tails = request.with_payload or (
            request.with_vector and schema.metric is Metric.COSINE
        )
        self.shards: Sequence[ShardNumber] = ()
        self.answers: Sequence[ShardAnswer[_ShardRows]] = ()

    async def ask(
        self, wanted: Sequence[tuple[ShardNumber, SortedPage | None]]
    ) -> Sequence[SortedPage]:
        request, schema = self._request, self._reading.schema
        freshness = self._reading.continued(request.freshness)
        calls = [
            ScrollOrderedCall(
                collection=schema.id,
                shard=shard,
                attribute=request.order_by,
                descending=request.descending,
                limit=self._limit,
                bytes_max=page_bytes(schema.shards),
                after=self._after if page is None else page.places[-1],
                filter=self._wire,
                with_tails=self._with_tails,
                with_vector=request.with_vector,
                explain=request.explain and page is None,
                level=freshness.level(shard, schema),
            )
            for shard, page in wanted
        ]
        answers = await self._reading.ask(calls, _parse, stage="scatter")
        if not self.answers:
            self.shards, self.answers = [shard for shard, _ in wanted], answers
        return [self._page(answer.reply) for answer in answers]

    def _page(self, rows: _ShardRows) -> SortedPage:
        reply, request = rows.reply, self._request
        places: list[Place] = list(zip(reply.values, reply.ids, strict=True))
        vectors: Vectors | None = None
        if request.with_vector:
            vectors = np.frombuffer(rows.body, np.float32)
            vectors = vectors.reshape(len(places), self._reading.schema.dimension)
        return SortedPage(
            order=[sort_key(place, descending=request.descending) for place in places],
            places=places,
            ids=reply.ids,
            seqs=reply.seqs,
            tails=reply.tails,
            vectors=vectors,
            more=reply.more,
        )


def sort_key(place: Place, *, descending: bool) -> Any:
    """Returns what orders rows of one attribute: by value, ties by id, those without a value last.

    Keywords that descend are compared by negated characters, a word after those it begins.
    """
    value, point_id = place
    if value is None:
        return (True, 0, point_id)
    if not descending:
        return (False, value, point_id)
    if isinstance(value, str):
        return (False, (*(-ord(letter) for letter in value), 1), point_id)
    return (False, -value, point_id)


def _size_bytes(entry: Released, schema: CollectionSchema) -> int:
    _, page, i = entry
    tail_bytes = 0 if page.tails is None else len(page.tails[i])
    return tail_bytes + (0 if page.vectors is None else 4 * schema.dimension)


def _parse(header: Any, body: memoryview) -> _ShardRows:
    return _ShardRows(OrderedRowsReply.from_wire(header), body)


def _encode_cursor(
    place: Place, request: OrderedScrollRequest, schema: CollectionSchema, wire: Any
) -> bytes:
    packed: bytes = msgpack.packb([_scroll_hash(request, schema, wire), *place])
    return packed


def _decode_cursor(
    request: OrderedScrollRequest, schema: CollectionSchema, kind: AttributeType, wire: Any
) -> Place | None:
    """Returns the place a page starts behind, None at the beginning.

    Raises: InvalidRequest when the cursor is damaged, or of another scroll.
    """
    if not request.cursor:
        return None
    fields = None
    if len(request.cursor) <= _CURSOR_BYTES_MAX:
        with contextlib.suppress(ValueError, msgpack.UnpackException):
            fields = msgpack.unpackb(request.cursor)
    match fields:
        case [bytes(scroll), value, bytes(point_id)]:
            if scroll != _scroll_hash(request, schema, wire):
                raise InvalidRequest(
                    "the cursor belongs to another collection, filter or order; begin without one",
                    field="cursor",
                )
            if value is not None:
                value = check_scalar(value, kind, attribute=request.order_by, field="cursor")
            return value, point_id
    raise InvalidRequest("not a cursor that a scroll returned; begin without one", field="cursor")


def _scroll_hash(request: OrderedScrollRequest, schema: CollectionSchema, wire: Any) -> bytes:
    scroll = [schema.id, wire, request.order_by, request.descending]
    return xxhash.xxh3_64_digest(msgpack.packb(scroll))
