"""Sealing and compaction: rows move from the log into segments, and nothing changes for readers."""

import asyncio
from dataclasses import replace

import pytest

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import NotPrimary, Unavailable
from shoal_cluster.domain.ids import SegmentId, Seq
from shoal_cluster.domain.point import SUM_MODULUS
from shoal_cluster.domain.session import Consistency
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.shard import sealing
from shoal_cluster.shard.calls import ReadLevel
from shoal_cluster.shard.compaction import plan_compaction
from tests.unit.shard.nodes import (
    Node,
    Shard,
    colored,
    delete,
    delete_where,
    patch,
    points_of,
    run,
    upsert,
)

STRONG = ReadLevel(consistency=Consistency.STRONG)


def holding_builds(node: Node, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, list]:
    """Makes the node's builds wait for the event; the list collects their orders."""
    release = asyncio.Event()
    orders: list = []
    build = node.ports.builds.build

    async def held(order):
        orders.append(order)
        entry = await build(order)
        await release.wait()
        return entry

    monkeypatch.setattr(node.ports.builds, "build", held)
    return release, orders


async def sealed_in_turns(node: Node, turns: int) -> None:
    for turn in range(turns):
        points = {f"{turn}-{number}": number for number in range(4)}
        await node.write(upsert(turn + 1, points))
        await node.seal()


def test_a_seal_moves_rows_into_a_segment_and_keeps_the_sum(tmp_path):
    """L-1, M-1."""

    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        await node.write(upsert(1, {"a": 1, "b": 2}))
        await node.write(delete(2, "a"))
        await node.write(upsert(3, {"c": 3}))
        before = (points_of(node.replica), node.replica.state.sum, node.replica.state.position)
        await node.seal()
        state, manifest = node.replica.state, node.replica.manifest
        assert (points_of(node.replica), state.sum, state.position) == before
        assert state.unsealed_rows == 0
        assert manifest.sum == state.sum == sum(entry.sum for entry in manifest.segments)
        assert (manifest.floor_slot, manifest.floor_seq) == (state.slot, state.seq)
        assert manifest.floor_put_id == state.last_put_id
        await node.crash()

    run(scenario())


def test_a_later_seal_buries_what_it_replaced_in_older_segments(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        await node.write(upsert(1, {"a": 1, "b": 2, "c": 3}))
        await node.seal()
        await node.write(upsert(2, {"a": 9}))
        first = node.replica.manifest.segments[0]
        await node.seal()
        older, newer = node.replica.manifest.segments
        assert older.id == first.id and older.files == first.files
        assert (older.dead, older.live, newer.live) == (1, 2, 1)
        assert older.tombstones.key in shard.objects
        assert points_of(node.replica) == {"a": 9, "b": 2, "c": 3}
        await node.crash()
        heir = await shard.lead()
        assert points_of(heir.replica) == {"a": 9, "b": 2, "c": 3}
        await heir.crash()

    run(scenario())


def test_writes_go_on_while_a_segment_is_built(tmp_path, monkeypatch):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node, follower = await shard.lead(), await shard.follow()
        release, orders = holding_builds(node, monkeypatch)
        await node.write(upsert(1, {"a": 1, "b": 2, "c": 3}))
        node.primary._sealer.start()
        await node.write(upsert(2, {"a": 8}))
        await node.write(delete(3, "b"))
        await node.write(patch(4, {"c": {"color": "blue"}}))
        expected = {"a": 8.0, "c": 3.0}
        assert points_of(node.replica) == expected
        release.set()
        await node.settle()
        assert [(order.wal_first, order.wal_last) for order in orders] == [(1, 2)]
        assert points_of(node.replica) == expected
        assert points_of(node.replica, colored("blue")) == {"c": 3.0}
        await follower.replica.wait_for(STRONG)
        assert points_of(follower.replica) == expected
        assert follower.replica.state.sum == node.replica.state.sum
        # Everything after the floor is still in the log, nothing of it in the manifest.
        assert node.replica.manifest.segments[0].dead == 0
        await node.seal()
        assert points_of(node.replica) == expected
        await node.crash()
        await follower.crash()

    run(scenario())


def test_a_memtable_of_deletes_alone_is_sealed_without_a_segment(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        await node.write(upsert(1, {"a": 1, "b": 2, "c": 3}))
        await node.seal()
        await node.write(delete(2, "a"))
        await node.seal()
        assert [entry.live for entry in node.replica.manifest.segments] == [2]
        await node.write(delete_where(3, colored("red")))
        await node.seal()
        assert node.replica.manifest.segments == ()
        assert (node.replica.manifest.sum, node.replica.state.live) == (0, 0)
        await node.crash()

    run(scenario())


def test_a_crash_before_the_commit_leaves_the_log_whole(tmp_path, monkeypatch):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        _, orders = holding_builds(node, monkeypatch)
        await node.write(upsert(1, {"a": 1, "b": 2}))
        node.primary._sealer.start()
        while not orders:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        assert any("/seg/" in key for key in shard.objects), "the segment is there, unlisted"
        await node.crash()
        heir = await shard.lead()
        assert heir.replica.manifest.segments == ()
        assert points_of(heir.replica) == {"a": 1, "b": 2}
        await heir.seal()
        assert points_of(heir.replica) == {"a": 1, "b": 2}
        await heir.crash()

    run(scenario())


def test_a_build_that_loses_a_row_is_not_committed(tmp_path, monkeypatch):
    """L-1."""

    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        build = node.ports.builds.build

        async def forgetful(order):
            entry = await build(order)
            return replace(entry, sum=(entry.sum + 1) % SUM_MODULUS)

        monkeypatch.setattr(node.ports.builds, "build", forgetful)
        await node.write(upsert(1, {"a": 1}))
        await node.seal()
        assert not node.primary.serving
        newest = await shard.manifests.newest()
        assert newest.segments == ()
        with pytest.raises(NotPrimary, match="L-1"):
            await node.write(upsert(2, {"b": 2}))
        await node.crash()
        heir = await shard.lead()
        assert points_of(heir.replica) == {"a": 1}
        await heir.crash()

    run(scenario())


def test_a_builder_that_dies_is_asked_again_under_another_name(tmp_path, monkeypatch):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        build, names = node.ports.builds.build, []

        async def dies_twice(order):
            names.append(order.segment)
            if len(names) <= 2:
                raise Unavailable("the builder died")
            return await build(order)

        monkeypatch.setattr(node.ports.builds, "build", dies_twice)
        await node.write(upsert(1, {"a": 1}))
        await node.seal()
        assert len(set(names)) == 3
        assert [entry.id for entry in node.replica.manifest.segments] == names[2:]
        await node.crash()

    run(scenario())


def test_a_seal_is_due_by_operations_bytes_or_slots(tmp_path, monkeypatch):
    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        sealer = node.primary._sealer
        await node.write(upsert(1, {"a": 1, "b": 2}))
        assert not sealer.due()
        for module, name, value in (
            (limits, "SEAL_OPERATIONS", 2),
            (sealing, "SEAL_BYTES", 10),
            (sealing, "SEAL_SLOTS", 2),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, value)
                assert sealer.due(), name
        await node.crash()

    run(scenario())


def test_many_small_segments_become_one(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "COMPACTION_FAN_IN", 3)

    async def scenario():
        shard = await Shard(tmp_path).create()
        node, follower = await shard.lead(), await shard.follow()
        await sealed_in_turns(node, 3)
        assert [entry.rows for entry in node.replica.manifest.segments] == [12]
        assert len(points_of(node.replica)) == 12
        await follower.replica.wait_for(STRONG)
        assert points_of(follower.replica) == points_of(node.replica)
        assert follower.replica.state.sum == node.replica.state.sum
        await node.crash()
        await follower.crash()

    run(scenario())


@pytest.mark.parametrize("many", [3, 4])
def test_merging_waits_while_writes_outrun_sealing_unless_segments_are_many(
    tmp_path, monkeypatch, many
):
    monkeypatch.setattr(limits, "COMPACTION_FAN_IN", 3)
    monkeypatch.setattr(limits, "SEGMENTS_WHILE_LOADING_MAX", many)

    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        await sealed_in_turns(node, 2)
        await node.write(upsert(10, {"2-0": 1}))
        release, orders = holding_builds(node, monkeypatch)
        sealer = node.primary._sealer
        sealer.start()
        while not orders:
            await asyncio.sleep(0.01)
        await node.write(upsert(11, {"3-0": 1}))
        monkeypatch.setattr(limits, "SEAL_OPERATIONS", 1)
        release.set()
        await sealer._seal  # the third segment, and the memtable is full again
        assert len(node.replica.manifest.segments) == 3
        assert sealer.compacting == (many == 3)
        while len(node.replica.manifest.segments) > 2:
            await asyncio.sleep(0.01)  # the writes have ended: now they are merged
        assert len(points_of(node.replica)) == 10
        await node.crash()

    run(scenario())


def test_rows_that_die_while_they_are_merged_stay_dead(tmp_path, monkeypatch):
    """Sealed deaths are found again in the merged segment, unsealed ones by the memtable."""
    monkeypatch.setattr(limits, "COMPACTION_FAN_IN", 3)

    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        await sealed_in_turns(node, 2)
        await node.write(upsert(10, {"2-0": 1}))
        release, orders = holding_builds(node, monkeypatch)
        sealer = node.primary._sealer
        sealer.start()
        while not orders:
            await asyncio.sleep(0.01)
        release.set()
        await sealer._seal  # sealed: three segments, so a compaction begins
        release.clear()
        while len(orders) < 2:
            await asyncio.sleep(0.01)
        assert len(orders[1].sources) == 3
        await node.write(delete(11, "0-0", "1-1"))
        await node.write(upsert(12, {"0-1": 77}))
        # This seal's build must pass the held compaction.
        build_of_seal = type(node.ports.builds).build
        monkeypatch.setattr(
            node.ports.builds, "build", lambda order: build_of_seal(node.ports.builds, order)
        )
        sealer.start()
        await sealer._seal
        assert sealer.compacting
        await node.write(delete(13, "1-2"))
        expected = points_of(node.replica)
        total = node.replica.state.sum
        release.set()
        await node.settle()
        assert node.primary.serving
        assert points_of(node.replica) == expected
        assert not {"0-0", "1-1", "1-2"} & expected.keys() and expected["0-1"] == 77
        assert node.replica.state.sum == total
        merged = [entry for entry in node.replica.manifest.segments if entry.rows == 9]
        assert [entry.dead for entry in merged] == [3]
        await node.crash()
        heir = await shard.lead()
        assert points_of(heir.replica) == expected
        await heir.crash()

    run(scenario())


def test_a_merge_is_committed_though_an_empty_slot_was_frozen_meanwhile(tmp_path, monkeypatch):
    """A patch of nothing takes a slot and leaves no operation. The seal that follows freezes an
    empty memtable, and a merge under way commits a floor that lies before that slot."""

    async def scenario():
        monkeypatch.setattr(limits, "COMPACTION_FAN_IN", 3)
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        await sealed_in_turns(node, 2)
        await node.write(upsert(3, {f"2-{number}": number for number in range(4)}))
        sealing_may_go, merging_may_go = asyncio.Event(), asyncio.Event()
        sealing_may_go.set()
        build = node.ports.builds.build

        async def held(order):
            entry = await build(order)
            await (merging_may_go if order.sources else sealing_may_go).wait()
            return entry

        monkeypatch.setattr(node.ports.builds, "build", held)
        sealer = node.primary._sealer
        sealer.start()
        await sealer._seal
        assert sealer.compacting, "three segments: a merge begins, and waits"
        sealing_may_go.clear()
        await node.write(patch(4, {"nobody": {"size": 1}}))
        sealer.start()
        await node.write(upsert(5, {"late": 5}))
        merging_may_go.set()
        await sealer._compaction
        assert len(node.replica.manifest.segments) == 1
        sealing_may_go.set()
        await node.settle()
        assert node.primary.serving
        assert len(points_of(node.replica)) == 13
        await node.crash()

    run(scenario())


def test_a_retried_request_is_recognised_after_its_record_was_sealed(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        first = await node.write(upsert(1, {"a": 1}))
        await node.seal()
        await node.crash()
        for key in [key for key in shard.objects if "/wal/" in key]:
            if b"\xa4kind\xa4data" in shard.objects[key]:
                del shard.objects[key]  # as garbage collection would
        heir = await shard.lead()
        assert await heir.write(upsert(1, {"a": 5})) == first
        assert points_of(heir.replica) == {"a": 1}
        await heir.crash()

    run(scenario())


def entry(name: int, rows: int, dead: int = 0) -> SegmentEntry:
    return SegmentEntry(
        id=SegmentId(f"{1:020d}-{name:06d}-aa"),
        files=(),
        rows=rows,
        min_seq=Seq(1),
        max_seq=Seq(1),
        tombstones=None,
        dead=dead,
        sum=0,
    )


def test_compaction_takes_segments_of_one_size_when_there_are_enough():
    small = [entry(number, 1000) for number in range(limits.COMPACTION_FAN_IN)]
    assert plan_compaction(small[1:], 4) == ()
    assert set(plan_compaction([entry(99, 100_000), *small], 4)) == set(small)


def test_compaction_takes_smaller_segments_along_unless_that_makes_too_large_a_segment():
    large = [entry(number, 100_000) for number in range(limits.COMPACTION_FAN_IN)]
    small = [entry(10 + number, 1000) for number in range(limits.COMPACTION_FAN_IN - 1)]
    assert set(plan_compaction([*small, *large], 4)) == {*small, *large}
    full = [
        entry(number, limits.SEGMENT_ROWS_MAX // limits.COMPACTION_FAN_IN)
        for number in range(limits.COMPACTION_FAN_IN)
    ]
    assert set(plan_compaction([*small, *full], 4)) == set(full)


def test_compaction_rewrites_a_segment_that_is_mostly_dead():
    mostly_dead = entry(2, 100, dead=51)
    assert plan_compaction([entry(1, 100, dead=50), mostly_dead], 4) == (mostly_dead,)


def test_compaction_makes_no_segment_larger_than_the_limit():
    large = [entry(number, limits.SEGMENT_ROWS_MAX // 2) for number in range(20)]
    assert plan_compaction(large, 4) == ()
