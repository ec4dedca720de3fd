"""The Coordinator actor: hosts the gRPC server, scatters to shard servers over links. Stateless."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import psutil
import ray
import structlog
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError

from shoal_cluster.actors.calls import bounded
from shoal_cluster.actors.configuration import (
    CONTROLLER,
    NAMESPACE,
    ClusterConfiguration,
)
from shoal_cluster.actors.process import lane_socket_path, make_pool, spare_collector
from shoal_cluster.actors.routes import LinkCaller, TopologyBoard
from shoal_cluster.bucket.local import end_process
from shoal_cluster.bucket.open import open_store
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Indeterminate, NotFound, Outcome, ShoalError, Unavailable
from shoal_cluster.domain.ids import SystemIdGenerator
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.schema_change import SchemaChange
from shoal_cluster.domain.status import ClusterStatus, CollectionStatus
from shoal_cluster.domain.topology import Topology
from shoal_cluster.ingest.execute import Writer
from shoal_cluster.ingest.loads import Loader
from shoal_cluster.query.execute import Searcher
from shoal_cluster.telemetry.logs import configure_logging

_log = structlog.get_logger()


class ControllerClient:
    """The CollectionControl and StatusSource ports (edge/ports.py) over Ray calls."""

    def __init__(self, configuration: ClusterConfiguration, board: TopologyBoard) -> None:
        self._configuration = configuration
        self._board = board
        self._handle: ActorHandle[Any] | None = None

    async def create_collection(
        self, schema: CollectionSchema, name: RequestName, *, timeout_s: float
    ) -> CollectionSchema:
        created: CollectionSchema = await self._call(
            "create_collection", schema, name, timeout_s=timeout_s, on_lost=Outcome.MAYBE_APPLIED
        )
        await self._until_known(created, timeout_s)
        return created

    async def alter_collection(
        self, change: SchemaChange, name: RequestName, *, timeout_s: float
    ) -> CollectionSchema:
        altered: CollectionSchema = await self._call(
            "alter_collection", change, name, timeout_s=timeout_s, on_lost=Outcome.MAYBE_APPLIED
        )
        await self._until_known(altered, timeout_s)
        return altered

    async def drop_collection(
        self, collection: str, name: RequestName, *, timeout_s: float
    ) -> None:
        before = self._board.current().collections.get(collection)
        await self._call(
            "drop_collection", collection, name, timeout_s=timeout_s, on_lost=Outcome.MAYBE_APPLIED
        )
        if before is not None:
            await self._until(
                lambda topology: _id_of(topology, collection) != before.schema.id, timeout_s
            )

    async def describe_collection(self, collection: str, *, timeout_s: float) -> CollectionStatus:
        status: ClusterStatus = await self._call("status", timeout_s=timeout_s)
        for entry in status.collections:
            if entry.schema.name == collection:
                return entry
        known = ", ".join(entry.schema.name for entry in status.collections) or "none"
        raise NotFound(
            f"there is no collection {collection[:80]!r}; there are: {known}", field="name"
        )

    async def list_collections(self, *, timeout_s: float) -> Sequence[CollectionSchema]:
        status: ClusterStatus = await self._call("status", timeout_s=timeout_s)
        return [entry.schema for entry in status.collections]

    async def status(self, *, timeout_s: float) -> ClusterStatus:
        status: ClusterStatus = await self._call("status", timeout_s=timeout_s)
        return status

    async def _call(
        self,
        method: str,
        *arguments: Any,
        timeout_s: float,
        on_lost: Outcome = Outcome.NOT_APPLIED,
    ) -> Any:
        try:
            if self._handle is None:
                # get_actor blocks on Ray's directory: off the loop, and only once.
                self._handle = await asyncio.to_thread(
                    ray.get_actor, self._configuration.actor_name(CONTROLLER), NAMESPACE
                )
            call = getattr(self._handle, method).remote(*arguments)
        except ValueError as error:
            raise Unavailable(
                "the controller is not running; is the cluster going down?"
            ) from error
        try:
            return await bounded(call, timeout_s, "the controller", on_lost=on_lost)
        except NotFound as error:
            if isinstance(error.__cause__, ActorDiedError):
                self._handle = None
                raise Unavailable(error.message) from error
            raise

    async def _until_known(self, schema: CollectionSchema, timeout_s: float) -> None:
        def known(topology: Topology) -> bool:
            place = topology.collections.get(schema.name)
            return place is not None and (
                place.schema.id != schema.id or place.schema.version >= schema.version
            )

        await self._until(known, timeout_s)

    async def _until(self, holds: Any, timeout_s: float) -> None:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        topology = self._board.current()
        while not holds(topology):
            left_s = deadline_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise Indeterminate(
                    "the catalog was changed, but this coordinator has not heard of it yet; "
                    "send the same request again"
                )
            topology = await self._board.newer_than(topology.version, left_s)


def _id_of(topology: Topology, name: str) -> str | None:
    place = topology.collections.get(name)
    return None if place is None else place.schema.id


class CoordinatorReport(NamedTuple):
    """address: of its gRPC server. started_ms: since 1970-01-01 UTC."""

    incarnation: str = ""
    address: str = ""
    pid: int = 0
    memory_bytes: int = 0
    started_ms: int = 0


class RunningEdge(Protocol):
    """The gRPC server of this process; edge/server.py EdgeServer."""

    address: str

    async def set_serving(self, serving: bool) -> None: ...

    async def close(self, drain_s: float = 5.0) -> None: ...


class StartEdge(Protocol):
    """Starts the gRPC server at `host:port`, and fast lanes at a free port and a Unix socket.

    bootstrap.py passes it: only edge/ knows gRPC. share_port: with other coordinators.
    lane_socket: "" for no Unix socket.
    """

    async def __call__(
        self,
        address: str,
        share_port: bool,
        lane_socket: str,
        searcher: Searcher,
        writer: Writer,
        loader: Loader,
        control: ControllerClient,
    ) -> RunningEdge:
        """Raises: Conflict when the port is in use."""
        ...


@ray.remote
class Coordinator:
    """See actors/README.md for the life of an actor."""

    def __init__(
        self, configuration: ClusterConfiguration, name: str, start_edge: StartEdge
    ) -> None:
        configure_logging(cluster=configuration.cluster, actor=name)
        self._configuration = configuration
        self._start_edge = start_edge
        self._clock = SystemClock()
        self._incarnation = SystemIdGenerator().hex(8)
        self._started_ms = self._clock.wall_ms()
        self._board = TopologyBoard(configuration.cluster_uuid)
        self._pool = make_pool(configuration, name)
        self._server: asyncio.Task[RunningEdge] | None = None
        self._loader: Loader | None = None

    async def describe(self) -> CoordinatorReport:
        """Returns who this process is, once its server listens.

        Raises: Conflict when the port is in use.
        """
        if self._server is None:
            self._server = asyncio.ensure_future(self._start())
        try:
            server = await asyncio.shield(self._server)
        except ShoalError:
            self._server = None  # the next call tries again
            raise
        return CoordinatorReport(
            incarnation=self._incarnation,
            address=server.address,
            pid=os.getpid(),
            memory_bytes=psutil.Process().memory_info().rss,
            started_ms=self._started_ms,
        )

    async def post_topology(self, topology: dict[str, Any]) -> None:
        self._board.post(Topology.from_wire(topology))
        if self._server is not None and self._server.done():
            await self._server.result().set_serving(True)

    async def shutdown(self) -> None:
        if self._server is not None:
            await (await self._server).close(drain_s=1.0)
        if self._loader is not None:
            await self._loader.close()
        await self._pool.close_all()

    async def _start(self) -> RunningEdge:
        caller = LinkCaller(self._pool, self._board)
        searcher = Searcher(caller=caller, topology=self._board, clock=self._clock)
        writer = Writer(caller=caller, topology=self._board, clock=self._clock)
        self._loader = Loader(
            store=lambda: open_store(self._configuration.bucket, on_broken=end_process),
            caller=caller,
            topology=self._board,
            clock=self._clock,
            ids=SystemIdGenerator(),
        )
        control = ControllerClient(self._configuration, self._board)
        server = await self._start_edge(
            f"{self._configuration.grpc_host}:{self._configuration.grpc_port}",
            self._configuration.coordinators > 1,
            lane_socket_path(self._configuration, self._incarnation),
            searcher,
            writer,
            self._loader,
            control,
        )
        # Until the first topology arrives every request would only wait.
        await server.set_serving(self._board.current().version > 0)
        spare_collector()
        _log.info("coordinator_started", address=server.address)
        return server
