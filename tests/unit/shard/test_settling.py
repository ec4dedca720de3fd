"""A shard that nobody writes to ends with few segments and a short log, at a bounded price."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from shoal_cluster.domain import limits
from shoal_cluster.domain.ids import SegmentId, Seq
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.shard import primary
from shoal_cluster.shard.compaction import plan_settling
from tests.unit.shard.nodes import Shard, points_of, run, upsert


def _segment(name: str, rows: int) -> SegmentEntry:
    return SegmentEntry(
        id=SegmentId(name),
        files=(),
        rows=rows,
        min_seq=Seq(1),
        max_seq=Seq(1),
        tombstones=None,
        dead=0,
        sum=0,
    )


def test_one_segment_is_left_alone() -> None:
    assert plan_settling([], 4) == ()
    assert plan_settling([_segment("a", 10)], 4) == ()


def test_comparable_segments_are_merged_into_one() -> None:
    segments = (_segment("a", 1000), _segment("b", 200))
    assert plan_settling(segments, 4) == segments


def test_a_large_segment_is_not_rewritten_for_a_few_rows() -> None:
    large, small, smaller = _segment("a", 10_000), _segment("b", 300), _segment("c", 200)
    assert plan_settling([large, small], 4) == ()
    assert set(plan_settling([large, small, smaller], 4)) == {small, smaller}


def test_what_is_too_large_to_settle_is_left_to_compaction() -> None:
    large = _segment("a", limits.SEGMENT_ROWS_MAX)
    assert plan_settling([large, replace(large, id=SegmentId("b"))], 4) == ()


def test_a_quiet_shard_settles_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SETTLE_OPERATIONS", 4)

    async def scenario() -> None:
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        expected = {}
        for number in range(12):
            await node.write(upsert(number + 1, {f"p{number}": float(number)}))
            expected[f"p{number}"] = float(number)
            if number in (3, 7):
                await node.seal()
        assert len(node.replica.state.segments) == 2
        # What is left is sealed, and everything merged at once: no second wait for quiet.
        await asyncio.sleep(1.5 * primary.IDLE_PROBE_S)
        await node.settle()
        assert len(node.replica.state.segments) == 1
        assert node.replica.state.unsealed_rows == 0
        assert points_of(node.replica) == expected

    run(scenario())
