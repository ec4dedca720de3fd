"""The ShardServer actor: hosts replicas, answers coordinators over links, obeys the controller.

Starts empty: what it should hold the controller tells it. Never claims an epoch by itself.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import psutil
import ray
import structlog

from shoal_cluster.actors.builder import RayBuilds
from shoal_cluster.actors.configuration import ClusterConfiguration
from shoal_cluster.actors.feed import PUSH, WAKE, FollowerFeed
from shoal_cluster.actors.process import make_pool, spare_collector, start_listener
from shoal_cluster.bucket.local import end_process
from shoal_cluster.bucket.open import open_store
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import (
    CollectionId,
    ServerId,
    ShardNumber,
    Slot,
    SystemIdGenerator,
)
from shoal_cluster.domain.observation import MachineReport, ServerReport
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.messages import Reply, Request
from shoal_cluster.shard.calls import (
    CountCall,
    GetCall,
    ScrollCall,
    SearchCall,
    WriteGroup,
    fates_to_wire,
)
from shoal_cluster.shard.compute import ThreadCompute
from shoal_cluster.shard.exploring import (
    answer_facets,
    answer_find_groups,
    answer_group_hits,
    answer_range,
    answer_scroll_ordered,
)
from shoal_cluster.shard.exploring_calls import (
    FacetsCall,
    FindGroupsCall,
    GroupHitsCall,
    RangeCall,
    ScrollOrderedCall,
)
from shoal_cluster.shard.host import ShardHost, ShardName
from shoal_cluster.shard.loading_calls import LoadCall
from shoal_cluster.shard.ports import ShardPorts
from shoal_cluster.shard.segment_files import SegmentFiles
from shoal_cluster.telemetry.logs import configure_logging

_log = structlog.get_logger()

REPORT = "report"


@ray.remote
class ShardServer:
    """See actors/README.md for the life of an actor."""

    def __init__(self, configuration: ClusterConfiguration, server: ServerId) -> None:
        configure_logging(cluster=configuration.cluster, actor=server)
        self._configuration = configuration
        self._server = server
        self._clock = SystemClock()
        self._ids = SystemIdGenerator()
        self._incarnation = self._ids.hex(8)
        self._started_ms = self._clock.wall_ms()
        self._address = LinkAddress("")
        self._feeds: dict[ShardName, FollowerFeed] = {}
        self._process = psutil.Process()
        self._starting = asyncio.ensure_future(self._start())

    async def _start(self) -> None:
        configuration = self._configuration
        run_directory = Path(configuration.run_directory)
        scratch = run_directory / "servers" / self._server
        scratch.mkdir(parents=True, exist_ok=True)
        store = open_store(configuration.bucket, on_broken=end_process)
        background = ThreadCompute(1)
        self._pool = make_pool(configuration, self._server)
        ports = ShardPorts(
            store=store,
            clock=self._clock,
            ids=self._ids,
            compute=ThreadCompute(configuration.search_threads),
            search_workers=configuration.search_threads,
            background=background,
            files=SegmentFiles(store, scratch / "cache", background),
            builds=RayBuilds(configuration, self._server),
            cluster_uuid=configuration.cluster_uuid,
        )
        self._host = ShardHost(ports, self._feed)
        self._host.start_scrubbing()
        self._listener, self._address = await start_listener(
            configuration,
            f"{self._server}-{self._incarnation[:8]}",
            {
                SearchCall.METHOD: self._search,
                GetCall.METHOD: self._get,
                ScrollCall.METHOD: self._scroll,
                CountCall.METHOD: self._count,
                RangeCall.METHOD: self._range,
                FindGroupsCall.METHOD: self._find_groups,
                GroupHitsCall.METHOD: self._group_hits,
                FacetsCall.METHOD: self._facets,
                ScrollOrderedCall.METHOD: self._scroll_ordered,
                WriteGroup.METHOD: self._write,
                LoadCall.METHOD: self._load,
                PUSH: self._push,
                WAKE: self._wake,
                REPORT: self._report,
            },
        )
        spare_collector()
        _log.info("shard_server_started", address=self._address, incarnation=self._incarnation)

    async def describe(self) -> tuple[str, str]:
        """Returns incarnation and link address, once it listens."""
        await self._starting
        return self._incarnation, self._address

    async def open_replica(self, schema: dict[str, Any], shard: int) -> None:
        await self._starting
        self._host.open(CollectionSchema.from_wire(schema), ShardNumber(shard))

    async def close_replica(self, collection: CollectionId, shard: ShardNumber) -> None:
        await self._starting
        await self._host.close((collection, shard))
        self._feeds.pop((collection, shard), None)

    async def promote(self, collection: CollectionId, shard: ShardNumber) -> int:
        await self._starting
        return await self._host.promote((collection, shard))

    async def set_followers(
        self, collection: CollectionId, shard: ShardNumber, addresses: tuple[LinkAddress, ...]
    ) -> None:
        await self._starting
        self._feed((collection, shard)).addresses = tuple(addresses)

    async def shutdown(self) -> None:
        """Stops serving in order: replicas are closed, links drained."""
        await self._starting
        await self._host.close_all()
        await self._listener.close(drain_s=1.0)
        await self._pool.close_all()

    def _feed(self, name: ShardName) -> FollowerFeed:
        feed = self._feeds.get(name)
        if feed is None:
            feed = self._feeds[name] = FollowerFeed(self._pool, *name)
        return feed

    async def _search(self, request: Request) -> Reply:
        call = SearchCall.from_wire(_fields(request))
        reply, vectors = await self._host.search(call, request.body)
        return Reply(reply.to_wire(), vectors)

    async def _get(self, request: Request) -> Reply:
        reply, vectors = await self._host.get(GetCall.from_wire(_fields(request)))
        return Reply(reply.to_wire(), vectors)

    async def _scroll(self, request: Request) -> Reply:
        reply, vectors = await self._host.scroll(ScrollCall.from_wire(_fields(request)))
        return Reply(reply.to_wire(), vectors)

    async def _count(self, request: Request) -> Reply:
        reply = await self._host.count(CountCall.from_wire(_fields(request)))
        return Reply(reply.to_wire())

    async def _range(self, request: Request) -> Reply:
        call = RangeCall.from_wire(_fields(request))
        reply, vectors = await answer_range(self._host, call, request.body)
        return Reply(reply.to_wire(), vectors)

    async def _find_groups(self, request: Request) -> Reply:
        call = FindGroupsCall.from_wire(_fields(request))
        return Reply((await answer_find_groups(self._host, call, request.body)).to_wire())

    async def _group_hits(self, request: Request) -> Reply:
        call = GroupHitsCall.from_wire(_fields(request))
        reply, vectors = await answer_group_hits(self._host, call, request.body)
        return Reply(reply.to_wire(), vectors)

    async def _facets(self, request: Request) -> Reply:
        reply = await answer_facets(self._host, FacetsCall.from_wire(_fields(request)))
        return Reply(reply.to_wire())

    async def _scroll_ordered(self, request: Request) -> Reply:
        call = ScrollOrderedCall.from_wire(_fields(request))
        reply, vectors = await answer_scroll_ordered(self._host, call)
        return Reply(reply.to_wire(), vectors)

    async def _write(self, request: Request) -> Reply:
        group = WriteGroup.from_wire(_fields(request), request.body)
        return Reply(fates_to_wire(await self._host.write(group.calls)))

    async def _load(self, request: Request) -> Reply:
        reply = await self._host.load(LoadCall.from_wire(_fields(request)))
        return Reply(reply.to_wire())

    def _push(self, request: Request) -> Reply:
        collection, shard, slot = _fields(request)
        self._host.offer((collection, shard), Slot(slot), bytes(request.body))
        return Reply()

    def _wake(self, request: Request) -> Reply:
        collection, shard = _fields(request)
        self._host.wake((collection, shard))
        return Reply()

    def _machine(self) -> MachineReport:
        memory = psutil.virtual_memory()
        return MachineReport(
            address=ray.util.get_node_ip_address(),
            cpus=os.cpu_count() or 0,
            memory_bytes=memory.total,
            memory_used_bytes=memory.total - memory.available,
        )

    def _report(self, request: Request) -> Reply:
        report = ServerReport(
            server=self._server,
            incarnation=self._incarnation,
            address=self._address,
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            memory_bytes=self._process.memory_info().rss,
            started_ms=self._started_ms,
            replicas=tuple(self._host.reports()),
            followers={
                f"{collection}/{shard}": tuple(feed.addresses)
                for (collection, shard), feed in self._feeds.items()
            },
            machine=self._machine(),
        )
        return Reply(report.to_wire())


def _fields(request: Request) -> list[Any]:
    """Returns a request's header as the list that shard/calls.py makes of every call.

    Raises: InvalidRequest when it is something else.
    """
    if not isinstance(request.header, list):
        raise InvalidRequest(f"the header of '{request.method}' must be a list of fields")
    return request.header
