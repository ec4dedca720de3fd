"""One shard server as a simulated process: the real host, listener, links and follower feeds.

The wiring is that of actors/shard_server.py without Ray. A life ends with its process; the next
one, under the same name and at another address, starts empty but for the files in its cache.
"""

import functools
import random
from collections.abc import Mapping
from typing import Any

from shoal_cluster.actors.feed import PUSH, WAKE, FollowerFeed
from shoal_cluster.bucket.faults import FaultPlan, FaultStore
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.domain.ids import ServerId, ShardNumber, Slot
from shoal_cluster.domain.observation import ServerReport
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.links.address import LinkAddress, parse_address
from shoal_cluster.links.connection import connect
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.messages import Handler, Reply, Request
from shoal_cluster.links.pool import LinkPool
from shoal_cluster.shard.building import LocalBuilds
from shoal_cluster.shard.calls import (
    CountCall,
    GetCall,
    ScrollCall,
    SearchCall,
    WriteGroup,
    fates_to_wire,
)
from shoal_cluster.shard.compute import InlineCompute
from shoal_cluster.shard.host import ShardHost, ShardName
from shoal_cluster.shard.ports import ShardPorts
from shoal_cluster.shard.segment_files import SegmentFiles
from tests.simulation.bucket import SimulatedStore, StoreCalls, WatchedObjects
from tests.simulation.loop import Process
from tests.simulation.network import SimulatedNetwork
from tests.simulation.world import SeededIds, SimulatedClock, World

SECRET = b"simulated secret of the links"
CLUSTER_UUID = bytes(range(16))
REPORT = "report"


class Machine:
    """What every simulated process gets: a clock, ids, a handle to the bucket, links."""

    def __init__(
        self,
        world: World,
        network: SimulatedNetwork,
        objects: WatchedObjects,
        calls: StoreCalls,
        plan: FaultPlan,
        name: str,
    ) -> None:
        self.world = world
        self.name = name
        self.process = Process(world.loop, name)
        self.rng = world.rng(f"machine {name}")
        self.clock = SimulatedClock(
            world.loop, offset_s=self.rng.random() * 1e5, rate=0.95 + 0.1 * self.rng.random()
        )
        self.ids = SeededIds(world.rng(f"ids {name}"))
        self.network = network.port(self.process)
        faults = FaultStore(
            MemoryStore(objects),
            plan=plan,
            rng=world.rng(f"faults {name}"),
            clock=SimulatedClock(world.loop, offset_s=0.0, rate=1.0),
        )
        world.bucket_faults.append(faults.counts)
        self.store = SimulatedStore(world, self.process, faults, calls, world.rng(f"store {name}"))

    def pool(self) -> LinkPool:
        connector = functools.partial(
            connect,
            secret=SECRET,
            name=self.name,
            clock=self.clock,
            ids=self.ids,
            network=self.network,
        )
        return LinkPool(connector, clock=self.clock)


class SimulatedServer:
    """One life of a shard server; `start` it as its process's own."""

    def __init__(self, machine: Machine, server: ServerId) -> None:
        world = machine.world
        self.machine = machine
        self.process = machine.process
        self.server = server
        self.incarnation = machine.name
        self.address = LinkAddress("")
        machine.network.is_server = True
        self._pool = machine.pool()
        self._feeds: dict[ShardName, FollowerFeed] = {}
        scratch = world.scratch / server
        scratch.mkdir(parents=True, exist_ok=True)
        compute = InlineCompute()
        ports = ShardPorts(
            store=machine.store,
            clock=machine.clock,
            ids=machine.ids,
            compute=compute,
            search_workers=2,
            background=compute,
            files=SegmentFiles(machine.store, scratch / "cache", compute),
            builds=LocalBuilds(machine.store, scratch, machine.clock, compute),
            cluster_uuid=CLUSTER_UUID,
        )
        self.host = ShardHost(ports, self._feed)

    async def start(self) -> None:
        machine = self.machine
        serving: Mapping[str, Handler] = {
            SearchCall.METHOD: self._search,
            GetCall.METHOD: self._get,
            ScrollCall.METHOD: self._scroll,
            CountCall.METHOD: self._count,
            WriteGroup.METHOD: self._write,
            PUSH: self._push,
            WAKE: self._wake,
            REPORT: self._report,
        }
        listener = Listener(
            serving,
            shared_secret(SECRET),
            clock=machine.clock,
            ids=machine.ids,
            network=machine.network,
        )
        self.address = await listener.listen(parse_address(f"memory:{machine.name}"))

    async def open_replica(self, schema: Mapping[str, Any], shard: ShardNumber) -> None:
        self.host.open(CollectionSchema.from_wire(schema), shard)

    async def close_replica(self, name: ShardName) -> None:
        await self.host.close(name)
        self._feeds.pop(name, None)

    async def promote(self, name: ShardName) -> int:
        return await self.host.promote(name)

    async def set_followers(self, name: ShardName, addresses: tuple[str, ...]) -> None:
        self._feed(name).addresses = tuple(LinkAddress(address) for address in addresses)

    def report(self) -> ServerReport:
        return ServerReport(
            server=self.server,
            incarnation=self.incarnation,
            address=self.address,
            node=self.server,
            pid=0,
            memory_bytes=0,
            started_ms=0,
            replicas=tuple(self.host.reports()),
            followers={
                f"{collection}/{shard}": tuple(feed.addresses)
                for (collection, shard), feed in self._feeds.items()
            },
        )

    def _feed(self, name: ShardName) -> FollowerFeed:
        feed = self._feeds.get(name)
        if feed is None:
            feed = self._feeds[name] = FollowerFeed(self._pool, *name)
        return feed

    async def _search(self, request: Request) -> Reply:
        call = SearchCall.from_wire(request.header)  # type: ignore[arg-type]
        reply, vectors = await self.host.search(call, request.body)
        return Reply(reply.to_wire(), vectors)

    async def _get(self, request: Request) -> Reply:
        reply, vectors = await self.host.get(GetCall.from_wire(request.header))  # type: ignore[arg-type]
        return Reply(reply.to_wire(), vectors)

    async def _scroll(self, request: Request) -> Reply:
        reply, vectors = await self.host.scroll(ScrollCall.from_wire(request.header))  # type: ignore[arg-type]
        return Reply(reply.to_wire(), vectors)

    async def _count(self, request: Request) -> Reply:
        reply = await self.host.count(CountCall.from_wire(request.header))  # type: ignore[arg-type]
        return Reply(reply.to_wire())

    async def _write(self, request: Request) -> Reply:
        group = WriteGroup.from_wire(request.header, request.body)  # type: ignore[arg-type]
        return Reply(fates_to_wire(await self.host.write(group.calls)))

    def _push(self, request: Request) -> Reply:
        header: Any = request.header
        collection, shard, slot = header
        self.host.offer((collection, shard), Slot(slot), bytes(request.body))
        return Reply()

    def _wake(self, request: Request) -> Reply:
        header: Any = request.header
        collection, shard = header
        self.host.wake((collection, shard))
        return Reply()

    def _report(self, request: Request) -> Reply:
        return Reply(self.report().to_wire())


def draw_between(rng: random.Random, low_s: float, high_s: float) -> float:
    """Returns a duration; short ones are likelier."""
    return low_s + (high_s - low_s) * rng.random() ** 2
