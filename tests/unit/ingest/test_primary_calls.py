"""A write under way when its primary stops answering: who waits, how long, and what is sent."""

import asyncio

import numpy as np
import pytest

from shoal_cluster.domain.errors import Indeterminate
from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import Metric
from shoal_cluster.ingest.execute import Writer
from shoal_cluster.ingest.validate import UpsertRequest
from tests.unit.query.fake_cluster import FakeCluster, a_schema
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


def upsert():
    return UpsertRequest(
        collection="docs",
        name=RequestName("client", 1),
        ids=["x"],
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


def test_a_caller_that_leaves_ends_the_attempt():
    async def scenario():
        cluster, writer = a_cluster()
        writing = asyncio.ensure_future(writer.upsert(upsert(), timeout_s=60))
        await asyncio.sleep(1.0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert cluster.cancelled == ["a"]

    run(scenario())
