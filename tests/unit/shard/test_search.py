"""Reads of one shard against brute force, whatever lies in segments and what in memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal_cluster.domain.schema import Metric
from shoal_cluster.filtering.expression import Comparison, Expression, Operator, matches
from shoal_cluster.index.cost_model import CostModel
from shoal_cluster.shard import rows, search
from tests.unit.shard.nodes import (
    DIMENSION,
    Node,
    Shard,
    colored,
    delete,
    patch,
    points_of,
    run,
    upsert,
)

COLORS = ("red", "green", "blue")


async def mixed_shard(tmp_path: Path) -> tuple[Node, dict[str, tuple[float, str]]]:
    """Returns a leader with two segments, tombstones and a memtable, and what it should show."""
    node = await (await Shard(tmp_path).create()).lead()
    model: dict[str, tuple[float, str]] = {}
    request_no = 0
    rng = np.random.default_rng(11)
    for stage in range(3):
        for color in COLORS:
            # Few distinct numbers: most keys tie, within and across segments and memtable.
            points = {
                f"{color}-{rng.integers(0, 60)}": float(rng.integers(0, 5)) for _ in range(20)
            }
            request_no += 1
            await node.write(upsert(request_no, points, color=color))
            model.update({point: (value, color) for point, value in points.items()})
        victims = sorted(model)[stage::9]
        request_no += 1
        await node.write(delete(request_no, *victims))
        for point in victims:
            del model[point]
        if stage < 2:
            await node.seal()
    moved = sorted(model)[0]
    await node.write(patch(request_no + 1, {moved: {"color": "green"}}))
    model[moved] = (model[moved][0], "green")
    assert len(node.replica.state.segments) == 2 and node.replica.state.unsealed_rows
    return node, model


FILTERS: list[Expression | None] = [
    None,
    colored("red"),
    colored("nobody"),
    Comparison("size", Operator.LE, 1),
    Comparison("size", Operator.GT, 3),
]


def passing(
    model: dict[str, tuple[float, str]], expression: Expression | None
) -> dict[str, tuple[float, str]]:
    return {
        point: (value, color)
        for point, (value, color) in model.items()
        if expression is None or matches(expression, {"color": color, "size": int(value)})
    }


def brute_force(
    model: dict[str, tuple[float, str]], query: float, k: int
) -> list[tuple[str, float]]:
    keyed = [(DIMENSION * (value - query) ** 2, point) for point, (value, _) in model.items()]
    return [(point, key) for key, point in sorted(keyed)[:k]]


@pytest.mark.parametrize("k", [1, 3, 10, 200])
def test_search_equals_brute_force_with_ties_in_the_order_of_ids(tmp_path, k):
    """Q-1, Q-3."""

    async def scenario():
        node, model = await mixed_shard(tmp_path)
        queries = [0.0, 1.0, 2.2, 9.0]
        for expression in FILTERS:
            order = search.SearchOrder(
                queries=np.array([[query] * DIMENSION for query in queries], dtype=np.float32),
                k=k,
                filter=expression,
                exact=True,
                recall_target=0.9,
            )
            hits = search.execute(search.prepare(node.replica.state, order), Metric.L2)
            start = 0
            for query, count in zip(queries, hits.counts, strict=True):
                found = [
                    (point.decode(), pytest.approx(key, rel=1e-5))
                    for point, key in zip(
                        hits.ids[start : start + count],
                        hits.keys[start : start + count].tolist(),
                        strict=True,
                    )
                ]
                assert brute_force(passing(model, expression), query, k) == found
                start += count
            snapshot = node.replica.state.snapshot()
            stored = rows.vectors_of(snapshot, hits.places, DIMENSION)[:, 0].tolist()
            assert stored == [model[point.decode()][0] for point in hits.ids]
            assert hits.seqs == rows.seqs_of(snapshot, hits.places)
            assert len(rows.tails_of(snapshot, hits.places)) == len(hits.ids)
        await node.crash()

    run(scenario())


def test_scroll_and_count_equal_brute_force(tmp_path):
    async def scenario():
        node, model = await mixed_shard(tmp_path)
        snapshot = node.replica.state.snapshot()
        for expression in FILTERS:
            expected = sorted(passing(model, expression))
            assert rows.count(snapshot, expression) == len(expected)
            for limit in (1, 7, 1000):
                found, after = [], b""
                while page := rows.scroll(snapshot, after, limit, expression)[0]:
                    assert len(page) <= limit
                    found += page
                    after = page[-1]
                assert [point.decode() for point in found] == expected
        await node.crash()

    run(scenario())


def test_get_finds_living_points_only_and_in_the_order_asked(tmp_path):
    async def scenario():
        node, model = await mixed_shard(tmp_path)
        asked = [*sorted(model, reverse=True), "nobody", "red-0", "red-1", "blue-2"]
        found, places = rows.find_rows(
            node.replica.state.snapshot(), [point.encode() for point in asked]
        )
        assert [point.decode() for point in found] == [point for point in asked if point in model]
        vectors = rows.vectors_of(node.replica.state.snapshot(), places, DIMENSION)
        assert vectors[:, 0].tolist() == [model[point.decode()][0] for point in found]
        await node.crash()

    run(scenario())


def test_explain_names_every_segment_and_why_it_was_pruned(tmp_path):
    async def scenario():
        node, _ = await mixed_shard(tmp_path)
        order = search.SearchOrder(
            queries=np.zeros((1, DIMENSION), dtype=np.float32),
            k=3,
            filter=Comparison("size", Operator.GT, 1000),
            exact=False,
            recall_target=0.9,
            explain=True,
        )
        explain = search.execute(search.prepare(node.replica.state, order), Metric.L2).explain
        assert {entry["segment"] for entry in explain["segments"]} == set(
            node.replica.state.segments
        )
        assert all(entry["pruned"] and entry["reason"] for entry in explain["segments"])
        assert explain["memtable_rows"] == 0
        assert explain["live_rows"] == len(points_of(node.replica))
        await node.crash()

    run(scenario())


def test_segments_share_what_memtables_leave_of_a_budget_by_their_rows():
    order = search.SearchOrder(
        queries=np.zeros((1, 384), dtype=np.float32),
        k=3,
        filter=None,
        exact=False,
        recall_target=0.9,
    )
    assert search.budgets(order, 4096, [10, 20]) == [None, None]
    of_memtable_ns = CostModel(dimension=384).exact_ns(4096)
    limited = replace(order, max_cost_ns=of_memtable_ns + 300)
    assert search.budgets(limited, 4096, [10, 20]) == pytest.approx([100, 200])
    assert search.budgets(replace(order, max_cost_ns=1.0), 4096, [10, 20]) == [0, 0]
    assert search.budgets(limited, 0, []) == []


def test_an_empty_shard_answers_with_nothing(tmp_path):
    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        order = search.SearchOrder(
            queries=np.zeros((2, DIMENSION), dtype=np.float32),
            k=3,
            filter=None,
            exact=False,
            recall_target=0.9,
        )
        hits = search.execute(search.prepare(node.replica.state, order), Metric.L2)
        assert (hits.counts, hits.ids, hits.keys.shape) == ([0, 0], [], (0,))
        await node.crash()

    run(scenario())
