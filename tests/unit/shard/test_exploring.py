"""The reads of shard/exploring.py against brute force, over segments, tombstones and memtable."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.errors import InvalidRequest, Unavailable
from shoal_cluster.domain.ids import Epoch, Seq, ShardNumber
from shoal_cluster.domain.schema import Metric
from shoal_cluster.domain.session import Position
from shoal_cluster.filtering.expression import Expression, matches
from shoal_cluster.shard import facets, grouping, ordered_scroll, range_search
from shoal_cluster.shard.exploring import (
    answer_facets,
    answer_find_groups,
    answer_group_hits,
    answer_range,
    answer_scroll_ordered,
)
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
from shoal_cluster.shard.ordered_scroll import After, Order, scroll_ordered
from shoal_cluster.shard.range_search import RangeOrder, range_page
from tests.unit.shard.nodes import (
    DIMENSION,
    SCHEMA,
    SHARD,
    Shard,
    colored,
    patch,
    run,
    upsert,
    write,
)
from tests.unit.shard.test_host import led
from tests.unit.shard.test_search import FILTERS, brute_force, mixed_shard, passing


@pytest.mark.parametrize("tail_cost", [0, 1_000_000])
def test_facets_equal_brute_force_by_dictionary_and_by_tails(
    tmp_path: Path, tail_cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facets, "TAIL_COST", tail_cost)

    async def scenario() -> None:
        node, model = await mixed_shard(tmp_path)
        snapshot = node.replica.state.snapshot()
        for expression in FILTERS:
            rows = passing(model, expression)
            for attribute, values in (
                ("color", [color for _, color in rows.values()]),
                ("size", [int(value) for value, _ in rows.values()]),
            ):
                found = facets.count_values(snapshot, attribute, expression, explain=True)
                assert found.counts == Counter(values)
                assert (found.rows, found.missing) == (len(rows), 0)
                assert len(found.explain["segments"]) == 2
            absent = facets.count_values(snapshot, "undeclared", expression)
            assert (absent.counts, absent.missing) == ({}, len(rows))
        await node.crash()

    run(scenario())


def test_facets_refuse_more_values_than_a_reply_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        node, _ = await mixed_shard(tmp_path)
        snapshot = node.replica.state.snapshot()
        monkeypatch.setattr(facets, "FACET_VALUES_MAX", 4)
        facets.count_values(snapshot, "color", None)
        with pytest.raises(InvalidRequest, match="size") as caught:
            facets.count_values(snapshot, "size", None)
        assert caught.value.field == "attribute"
        await node.crash()

    run(scenario())


def test_facets_explain_why_a_segment_was_pruned(tmp_path: Path) -> None:
    async def scenario() -> None:
        node, _ = await mixed_shard(tmp_path)
        snapshot = node.replica.state.snapshot()
        found = facets.count_values(snapshot, "color", colored("nobody"), explain=True)
        assert all(entry["pruned"] and entry["reason"] for entry in found.explain["segments"])
        await node.crash()

    run(scenario())


@pytest.mark.parametrize("tail_cost", [0, 1_000_000])
@pytest.mark.parametrize("descending", [False, True])
def test_an_ordered_scroll_equals_sorting_everything(
    tmp_path: Path, tail_cost: int, descending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes tie all the time; some rows lose their value, in segments and in the memtable."""
    monkeypatch.setattr(ordered_scroll, "TAIL_COST", tail_cost)

    async def scenario() -> None:
        node, model = await mixed_shard(tmp_path)
        attributes = {
            point: {"color": color, "size": int(value)} for point, (value, color) in model.items()
        }
        for point in sorted(model)[::5]:
            del attributes[point]["size"]
        patches = {point: {"size": None} for point in sorted(model)[::5]}
        await node.write(patch(900, dict(list(patches.items())[::2])))
        await node.seal()
        await node.write(patch(901, dict(list(patches.items())[1::2])))
        snapshot = node.replica.state.snapshot()
        assert len(snapshot.segments) >= 2 and snapshot.memtables
        for attribute in ("size", "color", "undeclared"):
            for expression in FILTERS:
                rows = [p for p, of in sorted(attributes.items()) if holds(expression, of)]
                wanted = [p for p in rows if attribute in attributes[p]]
                wanted.sort(key=lambda p: attributes[p][attribute], reverse=descending)
                wanted += [p for p in rows if attribute not in attributes[p]]
                for limit in (1, 7, 1000):
                    found, after, more = [], None, True
                    while more:
                        order = Order(
                            attribute=attribute,
                            descending=descending,
                            filter=expression,
                            after=after,
                        )
                        page = scroll_ordered(snapshot, order, limit, explain=True)
                        assert len(page.entries) == limit or not page.more
                        assert len(page.explain["segments"]) == len(snapshot.segments)
                        found += page.entries
                        more = page.more
                        if more:
                            after = After(page.entries[-1].value, page.entries[-1].id)
                    assert [entry.id.decode() for entry in found] == wanted
                    assert [entry.value for entry in found] == [
                        attributes[p].get(attribute) for p in wanted
                    ]
        await node.crash()

    run(scenario())


def holds(expression: Expression | None, attributes: Mapping[str, Any]) -> bool:
    return expression is None or matches(expression, attributes)


def group_order(query: float, attribute: str, expression: Expression | None, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "query": np.full((1, DIMENSION), query, dtype=np.float32),
        "group_by": attribute,
        "filter": expression,
        "exact": False,
        "recall_target": 0.9,
    }
    return grouping.GroupOrder(**{**fields, **changes})


@pytest.mark.parametrize("attribute", ["color", "size"])
@pytest.mark.parametrize("excluded", [None, "any"])
def test_groups_equal_brute_force(tmp_path: Path, attribute: str, excluded: str | None) -> None:
    async def scenario() -> None:
        node, model = await mixed_shard(tmp_path)
        snapshot = node.replica.state.snapshot()
        gone = sorted(model)[7].encode() if excluded else None
        for expression in FILTERS:
            rows = passing(model, expression)
            for query in (0.0, 2.2, 9.0):
                ordered = [p for p, _ in brute_force(rows, query, 10_000) if p.encode() != gone]
                wanted: dict[Any, list[str]] = {}
                for point in ordered:
                    value, color = rows[point]
                    group = color if attribute == "color" else int(value)
                    wanted.setdefault(group, []).append(point)
                order = group_order(query, attribute, expression, excluded=gone, explain=True)
                for groups in (1, 2, 50):
                    found = grouping.find_groups(snapshot, order, groups, Metric.L2)
                    assert list(found.best) == list(wanted)[:groups]
                    assert [p.decode() for _, p in found.best.values()] == [
                        points[0] for points in list(wanted.values())[:groups]
                    ]
                    assert not found.bounded
                    assert len(found.explain["segments"]) == len(snapshot.segments)
                    hits = grouping.group_hits(snapshot, order, list(found.best), 4, Metric.L2)
                    expected = [points[:4] for points in list(wanted.values())[:groups]]
                    assert hits.counts == [len(points) for points in expected]
                    assert [p.decode() for p in hits.ids] == [p for of in expected for p in of]
        await node.crash()

    run(scenario())


def test_a_group_larger_than_a_round_hides_no_other_and_few_rounds_say_so(tmp_path: Path) -> None:
    """The near group has 40 rows, a first round 16 hits."""

    async def scenario() -> None:
        node = await (await Shard(tmp_path).create()).lead()
        await node.write(upsert(1, {f"a-{n}": 0.0 for n in range(40)}, color="red"))
        await node.write(upsert(2, {f"b-{n}": 1.0 for n in range(40)}, color="green"))
        await node.write(upsert(3, {f"c-{n}": 2.0 for n in range(3)}, color="blue"))
        await node.seal()
        snapshot = node.replica.state.snapshot()
        order = group_order(0.0, "color", None)
        found = grouping.find_groups(snapshot, order, 4, Metric.L2)
        assert (list(found.best), found.bounded) == (["red", "green", "blue"], False)
        few = grouping.find_groups(snapshot, order, 4, Metric.L2, rounds_max=2)
        assert (list(few.best), few.bounded) == (["red", "green"], True)
        await node.crash()

    run(scenario())


@pytest.mark.parametrize("block_rows", [7, 65_536])
def test_range_pages_together_are_every_row_within_the_key(
    tmp_path: Path, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_search, "SCAN_BLOCK_ROWS", block_rows)

    async def scenario() -> None:
        node, model = await mixed_shard(tmp_path)
        snapshot = node.replica.state.snapshot()
        for expression in FILTERS:
            everything = brute_force(passing(model, expression), 1.0, 10_000)
            for key_max in (-1.0, 0.0, 4.0, 1000.0):
                wanted = [point for point, key in everything if key <= key_max]
                for limit in (1, 7, 1000):
                    found, after, more = [], None, True
                    while more:
                        order = RangeOrder(
                            query=np.ones((1, DIMENSION), dtype=np.float32),
                            key_max=key_max,
                            filter=expression,
                            after=after,
                        )
                        page = range_page(snapshot, order, limit, Metric.L2, explain=True)
                        assert len(page.hits) == limit or not page.more
                        assert len(page.explain["segments"]) == len(snapshot.segments)
                        found += page.hits
                        more = page.more
                        if more:
                            after = (page.hits[-1].key, page.hits[-1].id)
                    assert [hit.id.decode() for hit in found] == wanted
        await node.crash()

    run(scenario())


def test_calls_travel_as_messages_and_pages_are_bounded_by_bytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = await led(tmp_path)
        await write(host, upsert(1, {f"p{n}": float(n) for n in range(9)}))
        await write(host, upsert(2, {f"q{n}": float(n) for n in range(3)}, color="green"))
        where: dict[str, Any] = {"collection": SCHEMA.id, "shard": SHARD}
        query = np.zeros(DIMENSION, dtype=np.float32).tobytes()

        facets_call = FacetsCall(**where, attribute="color", explain=True)
        counted = FacetsReply.from_wire(
            (await answer_facets(host, FacetsCall.from_wire(facets_call.to_wire()))).to_wire()
        )
        assert dict(zip(counted.values, counted.counts, strict=True)) == {"red": 9, "green": 3}

        for with_tails, with_vector in ((True, False), (False, True), (True, True)):
            options = {"with_tails": with_tails, "with_vector": with_vector}
            scroll = ScrollOrderedCall(
                **where, attribute="size", descending=True, limit=9, bytes_max=50, **options
            )
            page, body = await answer_scroll_ordered(
                host, ScrollOrderedCall.from_wire(scroll.to_wire())
            )
            page = OrderedRowsReply.from_wire(page.to_wire())
            assert page.more and 1 <= len(page.ids) < 9
            assert len(page.values) == len(page.seqs) == len(page.ids)
            assert page.tails is None or len(page.tails) == len(page.ids)
            assert len(body) == (4 * DIMENSION * len(page.ids) if with_vector else 0)

            within = RangeCall(**where, key_max=100.0, limit=9, bytes_max=1, **options)
            hits, body = await answer_range(host, RangeCall.from_wire(within.to_wire()), query)
            hits = RangeReply.from_wire(hits.to_wire())
            assert (hits.ids, hits.more, len(hits.keys)) == ([b"p0"], True, 4)
            assert len(body) == (4 * DIMENSION if with_vector else 0)

        find = FindGroupsCall(**where, group_by="color", groups=5, explain=True)
        found = await answer_find_groups(host, FindGroupsCall.from_wire(find.to_wire()), query)
        found = FindGroupsReply.from_wire(found.to_wire())
        assert (found.values, found.ids, found.bounded) == (["red", "green"], [b"p0", b"q0"], False)
        fill = GroupHitsCall(
            **where, group_by="color", values=found.values, size=2, with_tails=True,
            with_vector=True, excluded=b"p0",
        )  # fmt: skip
        filled, body = await answer_group_hits(host, GroupHitsCall.from_wire(fill.to_wire()), query)
        assert (filled.counts, filled.ids) == ([2, 2], [b"p1", b"p2", b"q0", b"q1"])
        assert filled.tails is not None and len(filled.tails) == 4
        assert len(body) == 4 * 4 * DIMENSION + sum(map(len, filled.tails))
        assert filled.as_of.position == Position(Epoch(1), Seq(12))

        elsewhere = FacetsCall(collection=SCHEMA.id, shard=ShardNumber(7), attribute="color")
        with pytest.raises(Unavailable, match="no replica of shard 7"):
            await answer_facets(host, elsewhere)
        await host.close_all()

    run(scenario())
