"""Answers the calls of exploring_calls.py on the replicas of a host.

Each call works on one snapshot, taken at the same moment as the position its reply claims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.wire import from_wire
from shoal_cluster.shard import facets, grouping, rows
from shoal_cluster.shard.calls import SearchReply, rows_body
from shoal_cluster.shard.exploring_calls import (
    FacetsCall,
    FacetsReply,
    FindGroupsCall,
    FindGroupsReply,
    GroupHitsCall,
    OrderedRowsReply,
    RangeCall,
    RangeReply,
    ScrollOrderedCall,
)
from shoal_cluster.shard.host import ShardHost, hit_tails, queries_of, raw
from shoal_cluster.shard.ordered_scroll import After, Order, scroll_ordered
from shoal_cluster.shard.range_search import RangeOrder, range_page
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.search_queue import INLINE_ROWS_MAX
from shoal_cluster.shard.state import Snapshot

T = TypeVar("T")


async def answer_facets(host: ShardHost, call: FacetsCall) -> FacetsReply:
    """Raises: InvalidRequest when there are too many distinct values to count them exactly."""
    async with host.reading((call.collection, call.shard), call.level) as replica:
        as_of, snapshot = replica.as_of(), replica.state.snapshot()
        expression = _expression(call.filter)
        found = await _computed(
            replica,
            snapshot,
            lambda: facets.count_values(snapshot, call.attribute, expression, explain=call.explain),
        )
    return FacetsReply(
        values=list(found.counts),
        counts=list(found.counts.values()),
        rows=found.rows,
        missing=found.missing,
        as_of=as_of,
        explain=found.explain if call.explain else None,
    )


async def answer_scroll_ordered(
    host: ShardHost, call: ScrollOrderedCall
) -> tuple[OrderedRowsReply, bytes]:
    """Returns a page and its vectors when asked for."""
    async with host.reading((call.collection, call.shard), call.level) as replica:
        as_of, snapshot = replica.as_of(), replica.state.snapshot()
        order = Order(
            attribute=call.attribute,
            descending=call.descending,
            filter=_expression(call.filter),
            after=None if call.after is None else After(*call.after),
        )

        def work() -> tuple[OrderedRowsReply, bytes]:
            page = scroll_ordered(snapshot, order, call.limit, explain=call.explain)
            places = [entry.place for entry in page.entries]
            fetched = _fetched(snapshot, places, call, replica.schema.dimension)
            entries = page.entries[: fetched.count]
            reply = OrderedRowsReply(
                values=[entry.value for entry in entries],
                ids=[entry.id for entry in entries],
                seqs=fetched.seqs,
                tails=fetched.tails,
                more=page.more or fetched.count < len(page.entries),
                as_of=as_of,
                explain=page.explain if call.explain else None,
            )
            return reply, fetched.vectors

        answer = await _computed(replica, snapshot, work)
    return answer


async def answer_find_groups(
    host: ShardHost, call: FindGroupsCall, body: bytes | memoryview
) -> FindGroupsReply:
    async with host.reading((call.collection, call.shard), call.level) as replica:
        as_of, snapshot, schema = replica.as_of(), replica.state.snapshot(), replica.schema
        order = grouping.GroupOrder(
            query=queries_of(body, schema.dimension),
            group_by=call.group_by,
            filter=_expression(call.filter),
            exact=call.exact,
            recall_target=call.recall_target or schema.recall_target,
            excluded=call.excluded,
            explain=call.explain,
        )
        found = await _computed(
            replica,
            snapshot,
            lambda: grouping.find_groups(snapshot, order, call.groups, schema.metric),
        )
    best = found.best.values()
    return FindGroupsReply(
        values=list(found.best),
        keys=np.array([key for key, _ in best], dtype=np.float32).tobytes(),
        ids=[point_id for _, point_id in best],
        bounded=found.bounded,
        as_of=as_of,
        explain=found.explain if call.explain else None,
    )


async def answer_group_hits(
    host: ShardHost, call: GroupHitsCall, body: bytes | memoryview
) -> tuple[SearchReply, bytes]:
    """Returns the hits and the reply's body."""
    async with host.reading((call.collection, call.shard), call.level) as replica:
        as_of, snapshot, schema = replica.as_of(), replica.state.snapshot(), replica.schema
        order = grouping.GroupOrder(
            query=queries_of(body, schema.dimension),
            group_by=call.group_by,
            filter=_expression(call.filter),
            exact=call.exact,
            recall_target=call.recall_target or schema.recall_target,
            excluded=call.excluded,
        )

        def work() -> tuple[SearchReply, bytes]:
            hits = grouping.group_hits(snapshot, order, call.values, call.size, schema.metric)
            vectors: bytes | memoryview = b""
            if call.with_vector:
                vectors = raw(rows.vectors_of(snapshot, hits.places, schema.dimension))
            tails = hit_tails(snapshot, hits.places) if call.with_tails else None
            reply = SearchReply(
                counts=hits.counts,
                ids=hits.ids,
                keys=hits.keys.tobytes(),
                seqs=hits.seqs,
                tails=tails,
                as_of=as_of,
            )
            return reply, rows_body(vectors, tails)

        answer = await _computed(replica, snapshot, work)
    return answer


async def answer_range(
    host: ShardHost, call: RangeCall, body: bytes | memoryview
) -> tuple[RangeReply, bytes]:
    """Returns a page and its vectors when asked for."""
    async with host.reading((call.collection, call.shard), call.level) as replica:
        as_of, snapshot, schema = replica.as_of(), replica.state.snapshot(), replica.schema
        order = RangeOrder(
            query=queries_of(body, schema.dimension),
            key_max=call.key_max,
            filter=_expression(call.filter),
            after=call.after,
        )

        def work() -> tuple[RangeReply, bytes]:
            page = range_page(snapshot, order, call.limit, schema.metric, explain=call.explain)
            places = [hit.place for hit in page.hits]
            fetched = _fetched(snapshot, places, call, schema.dimension)
            hits = page.hits[: fetched.count]
            reply = RangeReply(
                keys=np.array([hit.key for hit in hits], dtype=np.float32).tobytes(),
                ids=[hit.id for hit in hits],
                seqs=fetched.seqs,
                tails=fetched.tails,
                more=page.more or fetched.count < len(page.hits),
                as_of=as_of,
                explain=page.explain if call.explain else None,
            )
            return reply, fetched.vectors

        answer = await _computed(replica, snapshot, work)
    return answer


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What a page's rows hold. count: how many of them fit."""

    count: int
    seqs: list[int]
    tails: list[bytes] | None
    vectors: bytes


def _fetched(
    snapshot: Snapshot,
    places: Sequence[rows.Place],
    call: ScrollOrderedCall | RangeCall,
    dimension: int,
) -> _Fetched:
    """Returns seqs, tails and vectors of as many rows as `call.bytes_max` allows, one at least."""
    row_bytes = 4 * dimension if call.with_vector else 0
    count = len(places)
    if row_bytes:
        count = min(count, max(1, call.bytes_max // row_bytes))
    tails: list[bytes] | None = None
    if call.with_tails:
        tails = rows.tails_within(snapshot, places[:count], call.bytes_max, row_bytes=row_bytes)
        count = len(tails)
    kept = places[:count]
    vectors = b""
    if call.with_vector:
        vectors = rows.vectors_of(snapshot, kept, dimension).tobytes()
    return _Fetched(count, rows.seqs_of(snapshot, kept), tails, vectors)


async def _computed(replica: Replica, snapshot: Snapshot, work: Callable[[], T]) -> T:
    """Runs work on the snapshot: on the loop when that is cheaper than handing it to a thread."""
    if snapshot.live <= INLINE_ROWS_MAX:
        return work()
    return await replica.ports.compute.run(work)


def _expression(wire: Any) -> Expression | None:
    return None if wire is None else from_wire(wire)
