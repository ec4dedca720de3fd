"""What a shard of the fake cluster answers to shard/exploring_calls.py, straight from its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_cluster.domain.point import decode_tail
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
from shoal_cluster.shard.ordered_scroll import After, Entry, Order, in_order, is_ahead

if TYPE_CHECKING:
    from tests.unit.query.fake_cluster import FakeShard


def answer(shard: FakeShard, call: Any, body: bytes) -> tuple[list[Any], bytes]:
    return ANSWERS[type(call)](shard, call, body)


def attributes_of(shard: FakeShard, point_id: bytes) -> Mapping[str, Any]:
    return decode_tail(shard.rows[point_id].tail)[1]


def _explain(call: Any, rows: int) -> dict[str, Any] | None:
    return {"segments": [], "memtable_rows": rows} if call.explain else None


def _facets(shard: FakeShard, call: FacetsCall, body: bytes) -> tuple[list[Any], bytes]:
    ids = shard.matching(call.filter)
    values = [attributes_of(shard, point_id).get(call.attribute) for point_id in ids]
    counts: Counter[Any] = Counter()
    for value in values:
        if value is not None:
            counts.update(value if isinstance(value, list) else [value])
    reply = FacetsReply(
        values=list(counts),
        counts=list(counts.values()),
        rows=len(ids),
        missing=values.count(None),
        as_of=shard.as_of(),
        explain=_explain(call, len(ids)),
    )
    return reply.to_wire(), b""


def _scroll_ordered(
    shard: FakeShard, call: ScrollOrderedCall, body: bytes
) -> tuple[list[Any], bytes]:
    after = None if call.after is None else After(*call.after)
    order = Order(attribute=call.attribute, descending=call.descending, filter=None, after=after)
    ahead = [
        Entry(value, point_id, (0, 0))
        for point_id in shard.matching(call.filter)
        for value in [attributes_of(shard, point_id).get(call.attribute)]
        if is_ahead(value, point_id, order)
    ]
    limit = min(call.limit, shard.rows_per_reply_max)
    page = in_order(ahead, descending=call.descending)[:limit]
    rows = [shard.rows[entry.id] for entry in page]
    reply = OrderedRowsReply(
        values=[entry.value for entry in page],
        ids=[entry.id for entry in page],
        seqs=[row.seq for row in rows],
        tails=[row.tail for row in rows] if call.with_tails else None,
        more=len(ahead) > len(page),
        as_of=shard.as_of(),
        explain=_explain(call, len(page)),
    )
    raw = b"".join(row.vector.tobytes() for row in rows) if call.with_vector else b""
    return reply.to_wire(), raw


def _ranked(shard: FakeShard, call: Any, body: bytes) -> list[tuple[float, bytes]]:
    query = np.frombuffer(body, np.float32)
    return sorted(
        (shard.key(query, shard.rows[point_id].vector), point_id)
        for point_id in shard.matching(call.filter)
        if point_id != call.excluded
    )


def _find_groups(shard: FakeShard, call: FindGroupsCall, body: bytes) -> tuple[list[Any], bytes]:
    best: dict[Any, tuple[float, bytes]] = {}
    for hit in _ranked(shard, call, body):
        value = attributes_of(shard, hit[1]).get(call.group_by)
        if value is not None and len(best) < call.groups:
            best.setdefault(value, hit)
    reply = FindGroupsReply(
        values=list(best),
        keys=np.array([key for key, _ in best.values()], np.float32).tobytes(),
        ids=[point_id for _, point_id in best.values()],
        bounded=shard.number in shard.bounded_shards,
        as_of=shard.as_of(),
        explain=_explain(call, len(best)),
    )
    return reply.to_wire(), b""


def _group_hits(shard: FakeShard, call: GroupHitsCall, body: bytes) -> tuple[list[Any], bytes]:
    ranked = _ranked(shard, call, body)
    counts, hits = [], []
    for value in call.values:
        of_group = [
            hit for hit in ranked if attributes_of(shard, hit[1]).get(call.group_by) == value
        ][: call.size]
        counts.append(len(of_group))
        hits += of_group
    rows = [shard.rows[point_id] for _, point_id in hits]
    reply = SearchReply(
        counts=counts,
        ids=[point_id for _, point_id in hits],
        keys=np.array([key for key, _ in hits], np.float32).tobytes(),
        seqs=[row.seq for row in rows],
        tails=[row.tail for row in rows] if call.with_tails else None,
        as_of=shard.as_of(),
    )
    raw = b"".join(row.vector.tobytes() for row in rows if call.with_vector)
    return reply.to_wire(), rows_body(raw, reply.tails)


def _range(shard: FakeShard, call: RangeCall, body: bytes) -> tuple[list[Any], bytes]:
    query = np.frombuffer(body, np.float32)
    ahead = sorted(
        hit
        for point_id in shard.matching(call.filter)
        for hit in [(shard.key(query, shard.rows[point_id].vector), point_id)]
        if hit[0] <= call.key_max and (call.after is None or hit > call.after)
    )
    page = ahead[: min(call.limit, shard.rows_per_reply_max)]
    rows = [shard.rows[point_id] for _, point_id in page]
    reply = RangeReply(
        keys=np.array([key for key, _ in page], np.float32).tobytes(),
        ids=[point_id for _, point_id in page],
        seqs=[row.seq for row in rows],
        tails=[row.tail for row in rows] if call.with_tails else None,
        more=len(ahead) > len(page),
        as_of=shard.as_of(),
        explain=_explain(call, len(page)),
    )
    return reply.to_wire(), b"".join(row.vector.tobytes() for row in rows if call.with_vector)


ANSWERS: Mapping[type, Callable[[FakeShard, Any, bytes], tuple[list[Any], bytes]]] = {
    FacetsCall: _facets,
    RangeCall: _range,
    FindGroupsCall: _find_groups,
    GroupHitsCall: _group_hits,
    ScrollOrderedCall: _scroll_ordered,
}
