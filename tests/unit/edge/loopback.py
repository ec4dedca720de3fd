"""A real gRPC server on loopback in front of a fake cluster, and a channel to it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import AlreadyExists, NotFound
from shoal_cluster.domain.ids import CollectionId, SystemIdGenerator
from shoal_cluster.domain.recall import FilterClass, RecallEstimate
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.schema_change import SchemaChange, apply_change
from shoal_cluster.domain.status import ClusterStatus, CollectionStatus
from shoal_cluster.edge.admission import Admission
from shoal_cluster.edge.server import EdgeServer, Services, start_server
from shoal_cluster.ingest.execute import Writer
from shoal_cluster.ingest.loads import Loader
from shoal_cluster.query.execute import Searcher
from shoal_cluster.query.explore import Explorer
from shoal_protos.v1 import types_pb2
from tests.unit.query.fake_cluster import FakeCluster

HOST = "127.0.0.1:0"
ESTIMATE = RecallEstimate(filter_class=FilterClass.WIDE, samples=200, recall=0.95, trials=1000.0)


class CountingIds:
    """Unique ids that are the same in every run."""

    def __init__(self) -> None:
        self._count = 0

    def put_id(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(16, "big")

    def hex(self, size_bytes: int) -> str:
        return self.put_id().hex().zfill(2 * size_bytes)[-2 * size_bytes :]


class FakeControl:
    """Keeps collections in the topology of a fake cluster; also reports status."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.names: list[RequestName] = []
        self.report = ClusterStatus(
            version="0.1.0", cluster_uuid="u", uptime_ms=5, bucket="memory://"
        )

    async def create_collection(
        self, schema: CollectionSchema, name: RequestName, *, timeout_s: float
    ) -> CollectionSchema:
        assert timeout_s > 0
        if schema.name in self.cluster.topology.collections:
            raise AlreadyExists(f"collection {schema.name!r} exists", field="name")
        self.names.append(name)
        stored = replace(schema, id=CollectionId(f"{len(self.names):032x}"))
        self.cluster.add_collection(stored, [["a", "b"]] * schema.shards)
        return stored

    async def alter_collection(
        self, change: SchemaChange, name: RequestName, *, timeout_s: float
    ) -> CollectionSchema:
        altered = apply_change(self._schema(change.name), change)
        place = self.cluster.topology.collections[change.name]
        self.cluster.publish(
            {**self.cluster.topology.collections, change.name: replace(place, schema=altered)}
        )
        return altered

    async def drop_collection(
        self, collection: str, name: RequestName, *, timeout_s: float
    ) -> None:
        self._schema(collection)
        left = dict(self.cluster.topology.collections)
        del left[collection]
        self.cluster.publish(left)

    async def describe_collection(self, collection: str, *, timeout_s: float) -> CollectionStatus:
        return CollectionStatus(schema=self._schema(collection), rows_live=42, recall=(ESTIMATE,))

    async def list_collections(self, *, timeout_s: float) -> Sequence[CollectionSchema]:
        return [place.schema for place in self.cluster.topology.collections.values()]

    async def status(self, *, timeout_s: float) -> ClusterStatus:
        return self.report

    def _schema(self, collection: str) -> CollectionSchema:
        place = self.cluster.topology.collections.get(collection)
        if place is None:
            raise NotFound(f"collection {collection!r} does not exist", field="name")
        return place.schema


@dataclass
class Loopback:
    cluster: FakeCluster
    control: FakeControl
    server: EdgeServer
    channel: grpc.aio.Channel


@asynccontextmanager
async def loopback(admission: Admission | None = None, **services: Any) -> AsyncIterator[Loopback]:
    cluster = FakeCluster(SystemClock())
    control = FakeControl(cluster)
    searcher = Searcher(caller=cluster, topology=cluster, clock=cluster.clock)
    writer = Writer(caller=cluster, topology=cluster, clock=cluster.clock)
    loader = Loader(
        store=MemoryStore,
        caller=cluster,
        topology=cluster,
        clock=cluster.clock,
        ids=SystemIdGenerator(),
    )
    everything: dict[str, Any] = {
        "control": control,
        "searching": searcher,
        "reading": searcher.rows,
        "exploring": Explorer(searcher.scatter),
        "writing": writer,
        "loading": loader,
        "status": control,
        **services,
    }
    server = await start_server(
        HOST, Services(**everything), ids=CountingIds(), admission=admission
    )
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    channel = grpc.aio.insecure_channel(server.address, options=options)
    try:
        yield Loopback(cluster, control, server, channel)
    finally:
        await channel.close()
        await server.close(drain_s=0)


def detail_of(error: grpc.aio.AioRpcError) -> types_pb2.ErrorDetail:
    """Returns what the trailing metadata says."""
    metadata = dict(error.trailing_metadata() or ())
    raw = metadata["shoal-error-bin"]
    assert isinstance(raw, bytes)
    return types_pb2.ErrorDetail.FromString(raw)


def run(scenario: Any) -> None:
    """Runs a scenario with a bound on its time."""
    asyncio.run(asyncio.wait_for(scenario, 20))
