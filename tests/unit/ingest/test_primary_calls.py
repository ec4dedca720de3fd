"""Writes on their way to a primary: what travels together, who waits, how long, what is sent."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from shoal_cluster.domain.errors import (
    Conflict,
    Indeterminate,
    Outcome,
    Overloaded,
    Unavailable,
)
from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import Metric
from shoal_cluster.filtering.expression import Comparison, Operator
from shoal_cluster.ingest import primary_calls
from shoal_cluster.ingest.execute import Writer
from shoal_cluster.ingest.validate import DeleteWhereRequest, UpsertRequest
from tests.unit.query.fake_cluster import Behaviour, FakeCluster, a_schema
from tests.unit.shard.nodes import LoopClock, run

TAKEOVER_S = 3.0


def a_cluster():
    """One shard whose primary `a` hangs; `b` could lead. Time is the virtual loop's."""
    cluster = FakeCluster(LoopClock())
    schema = a_schema(shards=1, metric=Metric.DOT)
    cluster.add_collection(schema, [["a", "b"]])
    cluster.hanging.add(ServerId("a"))
    writer = Writer(caller=cluster, topology=cluster, clock=cluster.clock)
    return cluster, writer


def upsert(no=1, point_id="x"):
    return UpsertRequest(
        collection="docs",
        name=RequestName("client", no),
        ids=[point_id],
        vectors=np.ones((1, 4), dtype=np.float32),
    )


async def move_primary_later(cluster, *hops):
    for to in hops:
        await asyncio.sleep(TAKEOVER_S)
        cluster.move_primary("docs", 0, to)


def test_a_write_leaves_a_stopped_primary_as_soon_as_another_leads():
    async def scenario():
        cluster, writer = a_cluster()
        moving = asyncio.ensure_future(move_primary_later(cluster, "b"))
        await writer.upsert(upsert(), timeout_s=60)
        assert asyncio.get_running_loop().time() < TAKEOVER_S + 0.1
        assert [call.server for call in cluster.calls] == ["a", "b"]
        # The same request: had the first been applied, it would be answered and not repeated.
        assert (
            len({(call.message.client_id, call.message.request_no) for call in cluster.calls}) == 1
        )
        assert cluster.cancelled == ["a"]
        await moving

    run(scenario())


def test_a_topology_in_which_nothing_moved_disturbs_no_write():
    async def scenario():
        cluster, writer = a_cluster()
        moving = asyncio.ensure_future(move_primary_later(cluster, "a", "b"))
        await writer.upsert(upsert(), timeout_s=60)
        # The first attempt ends by its own timeout at 5 s, the second when `b` leads at 6 s.
        assert [call.server for call in cluster.calls] == ["a", "a", "b"]
        assert asyncio.get_running_loop().time() < 2 * TAKEOVER_S + 0.1
        await moving

    run(scenario())


def test_a_write_given_up_without_a_successor_is_unknown_and_not_failed():
    async def scenario():
        cluster, writer = a_cluster()
        moving = asyncio.ensure_future(move_primary_later(cluster, None))
        with pytest.raises(Indeterminate):
            await writer.upsert(upsert(), timeout_s=8)
        assert [call.server for call in cluster.calls] == ["a"]
        await moving

    run(scenario())


def test_writes_of_one_turn_go_as_one_group_and_each_has_its_own_fate():
    async def scenario():
        cluster, writer = a_cluster()
        cluster.hanging.clear()
        await writer.upsert(upsert(1), timeout_s=60)
        cluster.sent.clear()
        fates = await asyncio.gather(
            writer.upsert(upsert(2, "y"), timeout_s=60),
            writer.upsert(replace(upsert(3), if_absent=True), timeout_s=60),
            writer.upsert(upsert(4, "z"), timeout_s=60),
            return_exceptions=True,
        )
        assert [fate.seqs for fate in (fates[0], fates[2])] == [[2], [3]]
        assert isinstance(fates[1], Conflict) and fates[1].field == "conditions[0]"
        assert [len(message.calls) for message in cluster.sent] == [3]

    run(scenario())


def test_what_comes_while_two_groups_are_on_their_way_goes_as_the_next():
    async def scenario():
        cluster, writer = a_cluster()
        cluster.hanging.clear()
        cluster.scripts[ServerId("a")] += [1.0, 2.0]
        writing = []
        for no in range(1, 8):
            writing.append(asyncio.ensure_future(writer.upsert(upsert(no, f"p{no}"), timeout_s=60)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*writing)
        assert [len(message.calls) for message in cluster.sent] == [1, 1, 5]

    run(scenario())


def test_a_group_is_sent_again_without_those_that_were_answered():
    async def scenario():
        cluster, writer = a_cluster()
        cluster.hanging.clear()
        fate, refused = cluster._fate, []

        def refuse_once(server, call):
            if call.request_no == 2 and not refused:
                refused.append(call)
                return Overloaded("full", retry_after_ms=300)
            return fate(server, call)

        cluster._fate = refuse_once
        await asyncio.gather(
            *(writer.upsert(upsert(no, f"p{no}"), timeout_s=60) for no in (1, 2, 3))
        )
        assert [[call.request_no for call in message.calls] for message in cluster.sent] == [
            [1, 2, 3],
            [2],
        ]
        assert 0.3 <= asyncio.get_running_loop().time() < 0.4

    run(scenario())


def test_a_group_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(primary_calls, "GROUP_BYTES_MAX", 2 * primary_calls.CALL_BYTES + 100)

    async def scenario():
        cluster, writer = a_cluster()
        cluster.hanging.clear()
        await asyncio.gather(
            *(writer.upsert(upsert(no, f"p{no}"), timeout_s=60) for no in range(1, 6))
        )
        # Not more than two at a time, nor fewer: the second starts when the first was taken.
        assert [len(message.calls) for message in cluster.sent] == [2, 2, 1]

    run(scenario())


def test_a_write_that_waits_in_line_ends_at_its_own_deadline_and_was_not_applied():
    async def scenario():
        cluster, writer = a_cluster()
        writing = []
        for no in (1, 2):
            writing.append(asyncio.ensure_future(writer.upsert(upsert(no), timeout_s=60)))
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="deadline"):
            await writer.upsert(upsert(3, "late"), timeout_s=1)
        assert asyncio.get_running_loop().time() < 1.1
        cluster.hanging.clear()
        await asyncio.gather(*writing)
        assert 3 not in {call.message.request_no for call in cluster.calls}

    run(scenario())


def test_a_caller_that_leaves_while_in_line_has_written_nothing():
    async def scenario():
        cluster, writer = a_cluster()
        writing = []
        for no in (1, 2, 3):
            writing.append(asyncio.ensure_future(writer.upsert(upsert(no, f"p{no}"), timeout_s=60)))
            await asyncio.sleep(0.01)
        gone = writing.pop()
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        cluster.hanging.clear()
        await asyncio.gather(*writing)
        assert 3 not in {call.message.request_no for call in cluster.calls}

    run(scenario())


def a_forgetful_cluster(horizon: int):
    """A living primary whose shard has forgotten clients that wrote before `horizon`."""
    cluster, writer = a_cluster()
    cluster.hanging.clear()
    shard = cluster.shard(cluster.topology.collections["docs"].schema, 0)
    shard.seq, shard.horizon = 50, horizon
    return cluster, writer, shard


def test_a_first_attempt_is_taken_for_one_though_the_coordinator_has_heard_nothing_yet():
    async def scenario():
        cluster, writer, shard = a_forgetful_cluster(horizon=40)
        result = await writer.upsert(upsert(), timeout_s=60)
        assert result.seqs == [51]
        assert [call.method for call in cluster.calls] == ["write", "get", "write"]
        assert [call.message.since for call in cluster.methods("write")] == [0, 50]
        shard.horizon = 51
        await writer.upsert(replace(upsert(), name=RequestName("another", 1)), timeout_s=60)
        assert len(cluster.calls) == 4, "now it knows how far the shard is"

    run(scenario())


def test_a_request_sent_before_is_not_taken_for_a_first_one_by_a_shard_that_forgot():
    async def scenario():
        cluster, writer, shard = a_forgetful_cluster(horizon=40)
        with pytest.raises(Indeterminate) as refused:
            await writer.upsert(replace(upsert(), again=True), timeout_s=60)
        assert refused.value.field == "request_id.client_id"
        assert refused.value.outcome is Outcome.MAYBE_APPLIED
        assert [call.message.since for call in cluster.calls] == [0]
        assert not shard.rows
        shard.horizon = 0  # nobody was ever forgotten, so that it is unknown says enough
        await writer.upsert(replace(upsert(), again=True), timeout_s=60)

    run(scenario())


def test_a_lost_attempt_is_sent_again_with_what_was_known_before_it():
    """Were the slot newer, the shard could take the second attempt for a first one."""

    async def scenario():
        cluster, writer, shard = a_forgetful_cluster(horizon=0)
        await writer.upsert(replace(upsert(), name=RequestName("another", 1)), timeout_s=60)
        cluster.scripts[ServerId("a")].append(Behaviour.LOSE_REPLY)
        writing = asyncio.ensure_future(writer.upsert(upsert(), timeout_s=60))
        while len(cluster.calls) < 2:
            await asyncio.sleep(0)
        await writer.upsert(replace(upsert(), name=RequestName("another", 2)), timeout_s=60)
        await writing
        sent = [call.message for call in cluster.methods("write")]
        assert [call.since for call in sent if call.client_id == "client"] == [51, 51]
        assert shard.seq == 53, "applied once"

    run(scenario())


def test_a_lost_attempt_that_is_then_refused_is_unknown():
    async def scenario():
        cluster, writer, shard = a_forgetful_cluster(horizon=0)

        cluster.scripts[ServerId("a")].append(Behaviour.LOSE_REPLY)
        writing = asyncio.ensure_future(writer.upsert(upsert(), timeout_s=60))
        while not shard.rows:
            await asyncio.sleep(0)
        shard.answered.clear()
        shard.horizon = 60
        with pytest.raises(Indeterminate) as refused:
            await writing
        assert refused.value.field == "request_id.client_id"
        assert [call.method for call in cluster.calls] == ["write", "write"]

    run(scenario())


def test_the_passes_of_a_delete_sent_again_are_sent_since_the_pass_before_them():
    async def scenario():
        cluster, writer, shard = a_forgetful_cluster(horizon=0)
        rows = {"ids": [f"p{n}" for n in range(9)], "vectors": np.ones((9, 4), dtype=np.float32)}
        attributes = [{"size": 1}] * 9
        await writer.upsert(replace(upsert(), attributes=attributes, **rows), timeout_s=60)
        shard.delete_where_max = 4
        request = DeleteWhereRequest(
            collection="docs",
            name=RequestName("client", 2),
            filter=Comparison("size", Operator.EQ, 1),
        )
        cluster.scripts[ServerId("a")] += [None, Indeterminate("lost", field="made up")]
        with pytest.raises(Indeterminate):
            await writer.delete_where(request, timeout_s=60)
        shard.horizon = 61  # somebody was forgotten since, but not after the first pass
        result = await writer.delete_where(replace(request, again=True), timeout_s=60)
        assert result.affected == 9
        assert not shard.rows
        again = [call.message for call in cluster.methods("write")][-3:]
        assert [call.since for call in again] == [0, 63, 67]

    run(scenario())
