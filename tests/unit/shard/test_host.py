"""ShardHost: what a shard server does with calls, with real messages."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal_cluster.domain.errors import InvalidRequest, NotPrimary, Unavailable
from shoal_cluster.domain.ids import NO_SLOT, ShardNumber
from shoal_cluster.domain.observation import ReplicaReport, ReplicaState
from shoal_cluster.domain.schema import AttributeType
from shoal_cluster.domain.session import Position
from shoal_cluster.filtering.wire import to_wire
from shoal_cluster.shard.calls import (
    CountCall,
    GetCall,
    RowsReply,
    ScrollCall,
    SearchCall,
    SearchReply,
    WriteCall,
)
from shoal_cluster.shard.host import ShardHost
from tests.unit.shard.nodes import (
    DIMENSION,
    SCHEMA,
    SHARD,
    Shard,
    colored,
    ids,
    run,
    tail,
    upsert,
    vector,
    write,
)

NAME = (SCHEMA.id, SHARD)


async def opened(shard: Shard) -> ShardHost:
    host = ShardHost(shard.node().ports, lambda _: shard.network)
    host.open(SCHEMA, SHARD)
    while host.reports()[0].state is ReplicaState.LOADING:
        await asyncio.sleep(0.01)
    return host


async def led(tmp_path: Path) -> ShardHost:
    host = await opened(await Shard(tmp_path).create())
    await host.promote(NAME)
    return host


def test_calls_travel_as_messages_and_are_answered(tmp_path):
    async def scenario():
        host = await led(tmp_path)
        call = upsert(1, {"a": 1, "b": 2, "c": 3})
        reply = await write(
            host, WriteCall.from_wire(call.to_wire(), memoryview(call.body), NO_SLOT)
        )
        assert reply.position == Position(1, 3)

        frame = b"?" + vector(1.2).tobytes()  # a body that is aligned for nothing
        asked = SearchCall(
            collection=SCHEMA.id,
            shard=SHARD,
            k=2,
            with_payload=True,
            with_vector=True,
            explain=True,
        )
        found, body = await host.search(
            SearchCall.from_wire(asked.to_wire()), memoryview(frame)[1:]
        )
        found = SearchReply.from_wire(found.to_wire(), body)
        assert (found.ids, found.counts) == (ids(["a", "b"]), [2])
        assert np.frombuffer(found.keys, np.float32) == pytest.approx([0.16, 2.56], rel=1e-5)
        assert found.tails == [tail(size=1), tail(size=2)]
        assert np.frombuffer(body, np.float32, 2 * DIMENSION).tolist() == [1.0] * 4 + [2.0] * 4
        assert found.as_of.position == Position(1, 3)
        assert set(found.explain["stages_us"]) == {"wait", "queue", "search", "fetch"}

        got, body = await host.get(GetCall(collection=SCHEMA.id, shard=SHARD, ids=ids(["c", "x"])))
        assert RowsReply.from_wire(got.to_wire(), body).ids == [b"c"]
        page, _ = await host.scroll(
            ScrollCall(collection=SCHEMA.id, shard=SHARD, after=b"a", limit=1)
        )
        assert (page.ids, page.seqs) == ([b"b"], [2])
        counted = await host.count(
            CountCall(collection=SCHEMA.id, shard=SHARD, filter=to_wire(colored("red")))
        )
        assert counted.rows == 3
        await host.close_all()

    run(scenario())


@pytest.mark.parametrize("size_bytes", [0, 1, 4 * DIMENSION - 1, 4 * DIMENSION + 4])
def test_queries_that_are_not_whole_vectors_are_refused(tmp_path, size_bytes):
    async def scenario():
        host = await led(tmp_path)
        with pytest.raises(InvalidRequest) as refused:
            await host.search(SearchCall(collection=SCHEMA.id, shard=SHARD, k=1), bytes(size_bytes))
        assert refused.value.field == "vectors"
        await host.close_all()

    run(scenario())


def test_a_server_without_the_shard_says_so(tmp_path):
    async def scenario():
        host = await opened(await Shard(tmp_path).create())
        other = ShardNumber(7)
        with pytest.raises(Unavailable, match="no replica of shard 7"):
            await host.count(CountCall(collection=SCHEMA.id, shard=other))
        with pytest.raises(NotPrimary):
            await write(host, upsert(1, {"a": 1}))
        await host.close_all()

    run(scenario())


def test_opening_and_promoting_again_changes_nothing(tmp_path):
    async def scenario():
        host = await led(tmp_path)
        host.open(SCHEMA, SHARD)
        assert await host.promote(NAME) == await host.promote(NAME) == 1
        await host.close(NAME)
        await host.close(NAME)
        assert host.reports() == []

    run(scenario())


def test_a_replica_that_cannot_load_reports_why_and_is_opened_again(tmp_path):
    async def scenario():
        shard = Shard(tmp_path)
        host = await opened(shard)
        report = host.reports()[0]
        assert report.state is ReplicaState.FAILED and "never created" in report.reason
        await shard.create()
        host.open(SCHEMA, SHARD)
        while host.reports()[0].state is not ReplicaState.READY:
            await asyncio.sleep(0.01)
        await host.close_all()

    run(scenario())


def test_reports_of_primary_and_follower_agree(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await opened(shard), await opened(shard)
        await leader.promote(NAME)
        await write(leader, upsert(1, {"a": 1}))
        follower.wake(NAME)
        await asyncio.sleep(0.1)
        led_report, report = leader.reports()[0], follower.reports()[0]
        assert led_report.leads and not report.leads
        assert ReplicaReport.from_wire(led_report.to_wire()) == led_report
        for name in ("epoch", "seq", "slot", "live_rows", "sum"):
            assert getattr(led_report, name) == getattr(report, name)
        await leader.close_all()
        await follower.close_all()

    run(scenario())


def test_a_newer_schema_reaches_an_open_replica(tmp_path):
    async def scenario():
        host = await led(tmp_path)
        shape = {**SCHEMA.attributes, "shape": AttributeType.KEYWORD}
        host.open(replace(SCHEMA, attributes=shape, version=2), SHARD)
        host.open(SCHEMA, SHARD)  # an old one arrives late
        assert host.reports()[0].schema_version == 2
        await host.close_all()

    run(scenario())


def test_a_search_in_a_thread_claims_only_what_it_saw(tmp_path, monkeypatch):
    async def scenario():
        host = await led(tmp_path)
        await write(host, upsert(1, {"a": 1}))
        monkeypatch.setattr("shoal_cluster.shard.search_queue.INLINE_ROWS_MAX", 0)

        class Slow:
            def run(self, work):
                return asyncio.ensure_future(self.work_late(work))

            async def work_late(self, work):
                await write(host, upsert(2, {"b": 1}))  # lands while the search is under way
                return work()

        monkeypatch.setattr(host._queue, "_compute", Slow())
        reply, _ = await host.search(
            SearchCall(collection=SCHEMA.id, shard=SHARD, k=9), vector(1).tobytes()
        )
        assert reply.ids == [b"a"]
        assert reply.as_of.position == Position(1, 1)
        await host.close_all()

    run(scenario())
