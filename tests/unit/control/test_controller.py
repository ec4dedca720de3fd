"""The control loop against servers that stop answering, in virtual time."""

import asyncio
from dataclasses import replace

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.control.catalog import Owner
from shoal_cluster.control.controller import ControlLoop
from shoal_cluster.control.reconcile import (
    CloseReplica,
    OpenReplica,
    Promote,
    SetFollowers,
    shard_name,
)
from shoal_cluster.domain.errors import InvalidRequest, Unavailable
from shoal_cluster.domain.ids import Epoch, ManifestVersion, Seq, ServerId, Slot
from shoal_cluster.domain.observation import ReplicaReport, ReplicaState, ServerReport
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema_change import SchemaChange
from tests.unit.shard.nodes import CLUSTER_UUID, SCHEMA, LoopClock, SeededIds, run

REPORT_TIMEOUT_S = 1.0
TAKEOVER_S = 0.1
SERVERS = tuple(map(ServerId, ("a", "b", "c")))


class FakeServers:
    """Servers that do at once what they are told; a stopped one lets reports time out."""

    def __init__(self):
        self.stopped = set()
        self.epoch = 0
        self.promoted = []
        self.reports = {
            server: ServerReport(
                server=server,
                incarnation=server,
                address=f"unix:/{server}",
                node="node",
                pid=1,
                memory_bytes=0,
                started_ms=0,
                replicas=(),
                followers={},
            )
            for server in SERVERS
        }

    def placed(self):
        return dict.fromkeys(SERVERS, "node")

    async def report(self, server):
        if server in self.stopped:
            await asyncio.sleep(REPORT_TIMEOUT_S)
            raise Unavailable(f"server {server} is silent")
        return self.reports[server]

    async def carry_out(self, command):
        report = self.reports[command.server]
        match command:
            case OpenReplica():
                changed = replace(report, replicas=(a_replica(command),))
            case CloseReplica():
                changed = replace(report, replicas=())
            case Promote():
                await asyncio.sleep(TAKEOVER_S)
                self.promoted.append(command.server)
                self.epoch += 1
                lead = {"leads": True, "epoch": Epoch(self.epoch)}
                changed = replace(report, replicas=(replace(report.replicas[0], **lead),))
            case SetFollowers():
                name = shard_name(command.collection, command.shard)
                changed = replace(report, followers={name: command.addresses})
        self.reports[command.server] = changed


class FakeAudience:
    """Remembers when each primary of the one shard was first published."""

    def __init__(self):
        self.primary_at_s = {}

    def publish(self, topology):
        for place in topology.collections.values():
            now_s = asyncio.get_running_loop().time()
            self.primary_at_s.setdefault(place.shards[0].primary, now_s)


def a_replica(command):
    return ReplicaReport(
        collection=command.schema.id,
        shard=command.shard,
        state=ReplicaState.READY,
        reason="",
        leads=False,
        epoch=Epoch(0),
        seq=Seq(0),
        slot=Slot(0),
        schema_version=command.schema.version,
        manifest_version=ManifestVersion(0),
        floor_slot=Slot(0),
        live_rows=0,
        unsealed_rows=0,
        segments=0,
        sum=0,
        memory_bytes=0,
        mapped_bytes=0,
        appends=0,
        operations=0,
        sealing=False,
    )


def a_loop(servers, audience, store=None, seed=1):
    return ControlLoop(
        store=store or MemoryStore(),
        clock=LoopClock(),
        ids=SeededIds(seed),
        servers=servers,
        audience=audience,
        cluster_uuid=CLUSTER_UUID,
        owner=Owner(incarnation="i", address="here", since_ms=0, host="h"),
    )


async def a_cluster():
    """Returns servers, audience and a running loop whose one shard has a primary."""
    servers, audience = FakeServers(), FakeAudience()
    loop = a_loop(servers, audience)
    await loop.claim()
    running = asyncio.ensure_future(loop.run())
    await loop.create_collection(replace(SCHEMA, replicas=2), RequestName("client", 1))
    return servers, audience, running


async def stop(running):
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_a_stopped_primary_is_replaced_within_three_seconds():
    async def scenario():
        servers, audience, running = await a_cluster()
        (former,) = servers.promoted
        await asyncio.sleep(5)
        servers.stopped.add(former)
        stopped_s = asyncio.get_running_loop().time()
        await asyncio.sleep(10)
        successor = servers.promoted[-1]
        assert successor != former and len(servers.promoted) == 2
        # Two rounds of a second and a pause until it is suspected, then only the takeover.
        assert audience.primary_at_s[successor] - stopped_s < 2 * REPORT_TIMEOUT_S + 1.0
        await stop(running)

    run(scenario())


def test_a_server_that_was_only_slow_keeps_its_shards():
    async def scenario():
        servers, _, running = await a_cluster()
        (leader,) = servers.promoted
        servers.stopped.add(leader)
        await asyncio.sleep(1.2)
        servers.stopped.clear()
        await asyncio.sleep(10)
        assert servers.promoted == [leader]
        await stop(running)

    run(scenario())


def test_a_stopped_server_that_goes_on_is_seen_again():
    async def scenario():
        servers, _, running = await a_cluster()
        (former,) = servers.promoted
        servers.stopped.add(former)
        await asyncio.sleep(10)
        servers.stopped.clear()
        await asyncio.sleep(3)
        # It still believes that it leads; the higher epoch counts.
        assert servers.reports[former].replicas[0].leads
        assert len(servers.promoted) == 2
        followers = servers.reports[servers.promoted[-1]].followers
        assert [*followers.values()] == [(f"unix:/{former}",)]
        await stop(running)

    run(scenario())


def test_more_replicas_than_servers_are_refused_by_name():
    async def scenario():
        servers = FakeServers()
        loop = a_loop(servers, FakeAudience())
        await loop.claim()
        running = asyncio.ensure_future(loop.run())
        with pytest.raises(InvalidRequest, match="4 replicas") as refused:
            await loop.create_collection(replace(SCHEMA, replicas=4), RequestName("client", 1))
        assert (refused.value.field, refused.value.limit) == ("replicas", "3 servers")
        assert loop.catalog.collections == {}
        created = await loop.create_collection(
            replace(SCHEMA, replicas=3), RequestName("client", 2)
        )
        with pytest.raises(InvalidRequest) as refused:
            change = SchemaChange(name=created.name, replicas=5)
            await loop.alter_collection(change, RequestName("client", 3))
        assert (refused.value.field, refused.value.limit) == ("replicas", "3 servers")
        assert loop.catalog.by_name(created.name).schema == created
        await stop(running)

    run(scenario())


def test_a_collection_that_lost_a_server_for_good_can_still_be_altered():
    async def scenario():
        store = MemoryStore()
        before = a_loop(FakeServers(), FakeAudience(), store)
        await before.claim()
        running = asyncio.ensure_future(before.run())
        created = await before.create_collection(
            replace(SCHEMA, replicas=3), RequestName("client", 1)
        )
        await stop(running)
        servers = FakeServers()
        servers.placed = lambda: dict.fromkeys(SERVERS[:2], "node")
        after = a_loop(servers, FakeAudience(), store)
        await after.claim()
        running = asyncio.ensure_future(after.run())
        change = SchemaChange(name=created.name, chunking_rule="sentences")
        altered = await after.alter_collection(change, RequestName("client", 2))
        assert (altered.replicas, altered.chunking_rule) == (3, "sentences")
        (record,) = after.catalog.collections.values()
        assert [len(servers) for servers in record.assignment] == [2]
        await stop(running)

    run(scenario())
