"""The Controller actor: runs the control loop, and keeps the other actors in existence.

Everything it knows it reads again after a restart: the catalog from the bucket, the actors by name
from Ray, the replicas from the servers.
"""

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import Any, Final
from wsgiref.simple_server import WSGIServer

import psutil
import ray
import structlog
from ray.actor import ActorHandle

from shoal_cluster.actors.calls import bounded
from shoal_cluster.actors.configuration import (
    CONTROLLER,
    NAMESPACE,
    ClusterConfiguration,
    coordinator_names,
    environment,
)
from shoal_cluster.actors.coordinator import Coordinator, CoordinatorReport, StartEdge
from shoal_cluster.actors.process import make_pool
from shoal_cluster.actors.shard_server import REPORT, ShardServer
from shoal_cluster.actors.status import cluster_status
from shoal_cluster.bucket.local import end_process
from shoal_cluster.bucket.open import open_store
from shoal_cluster.control.catalog import Owner
from shoal_cluster.control.controller import ControlLoop
from shoal_cluster.control.ownership import host_identity
from shoal_cluster.control.reconcile import (
    CloseReplica,
    Command,
    OpenReplica,
    Promote,
    SetFollowers,
)
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import (
    Conflict,
    NotFound,
    Outcome,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import ServerId, SystemIdGenerator
from shoal_cluster.domain.observation import ServerReport
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.schema_change import SchemaChange
from shoal_cluster.domain.status import ClusterStatus
from shoal_cluster.domain.topology import Topology
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.pool import LinkPool
from shoal_cluster.telemetry.logs import configure_logging
from shoal_cluster.telemetry.metrics import serve_metrics

_log = structlog.get_logger()

SCRAPE_S: Final = 5.0
"""A status takes a millisecond; a loop that is blocked for so long is what a scrape should show."""


REPORT_TIMEOUT_S = 1.0
CONTROL_TIMEOUT_S = 30.0
"""A Ray call to a dead actor whose node is gone hangs: every one has its own deadline."""
DESCRIBE_TIMEOUT_S = 5.0
DESCRIBE_ROUND_S = 1.0

_RESTART = {"max_restarts": -1, "max_task_retries": 0, "lifetime": "detached"}


class RayServers:
    """The Servers port (control/controller.py): Ray calls for control, links for reports."""

    def __init__(self, configuration: ClusterConfiguration, pool: LinkPool) -> None:
        self._configuration = configuration
        self._pool = pool
        self._handles: dict[ServerId, ActorHandle[Any]] = {}
        self._addresses: dict[ServerId, LinkAddress] = {}
        self._describing: dict[ServerId, asyncio.Task[None]] = {}
        self._nodes: dict[ServerId, str] = dict.fromkeys(configuration.servers, "")

    def placed(self) -> Mapping[ServerId, str]:
        return self._nodes

    async def report(self, server: ServerId) -> ServerReport:
        address = self._addresses.get(server)
        if address is None:
            self._describe(server)
            raise NotFound(f"server {server} has not said where it listens")
        try:
            reply = await self._pool.call(
                address, REPORT, None, timeout_s=REPORT_TIMEOUT_S, on_lost=Outcome.NOT_APPLIED
            )
        except Unavailable as error:
            self._describe(server)
            if address not in self._pool.connected():
                raise NotFound(f"server {server}: {error.message}") from error
            raise
        report = ServerReport.from_wire(reply.header)  # type: ignore[arg-type]
        self._nodes[server] = report.node
        return report

    async def carry_out(self, command: Command) -> None:
        handle = self._handle(command.server)
        match command:
            case OpenReplica():
                call = handle.open_replica.remote(command.schema.to_wire(), command.shard)
            case CloseReplica():
                call = handle.close_replica.remote(command.collection, command.shard)
            case Promote():
                call = handle.promote.remote(command.collection, command.shard)
            case SetFollowers():
                call = handle.set_followers.remote(
                    command.collection, command.shard, command.addresses
                )
        await bounded(call, CONTROL_TIMEOUT_S, f"server {command.server}")

    async def shutdown(self) -> None:
        """Asks every server to stop in order; those that do not answer are killed by the caller."""
        calls = [
            bounded(self._handle(server).shutdown.remote(), 10.0, f"server {server}")
            for server in self._configuration.servers
        ]
        await asyncio.gather(*calls, return_exceptions=True)

    def _handle(self, server: ServerId) -> "ActorHandle[Any]":
        handle = self._handles.get(server)
        if handle is None:
            configuration = self._configuration
            handle = ShardServer.options(  # type: ignore[attr-defined]
                name=configuration.actor_name(server),
                namespace=NAMESPACE,
                get_if_exists=True,
                # None reserved: searches and builds share the cores, and builds must find a slot.
                num_cpus=0,
                max_concurrency=1000,
                scheduling_strategy="SPREAD",
                runtime_env=environment(),
                **_RESTART,
            ).remote(configuration, server)
            self._handles[server] = handle
        return handle

    def _describe(self, server: ServerId) -> None:
        """Asks Ray, in the background, where the server's present process listens."""
        running = self._describing.get(server)
        if running is None or running.done():
            self._describing[server] = asyncio.ensure_future(self._run_describe(server))

    async def _run_describe(self, server: ServerId) -> None:
        try:
            _, address = await bounded(
                self._handle(server).describe.remote(), DESCRIBE_TIMEOUT_S, f"server {server}"
            )
        except NotFound:
            # Dead for good as far as Ray is concerned: make another under the same name.
            self._handles.pop(server, None)
        except ShoalError as error:
            _log.info("server_not_described", server=server, reason=error.message)
        else:
            self._addresses[server] = address


class CoordinatorAudience:
    """The Audience port: coordinators get every topology, and again when they come back."""

    def __init__(self, configuration: ClusterConfiguration, start_edge: StartEdge) -> None:
        self.coordinators = [
            CoordinatorKeeper(configuration, name, start_edge)
            for name in coordinator_names(configuration.coordinators)
        ]

    def publish(self, topology: Topology) -> None:
        for coordinator in self.coordinators:
            coordinator.publish(topology)

    async def run(self) -> None:
        """Keeps the coordinators alive and informed until cancelled."""
        await asyncio.gather(*(coordinator.run() for coordinator in self.coordinators))


class CoordinatorKeeper:
    """Keeps one coordinator alive and informed."""

    def __init__(
        self, configuration: ClusterConfiguration, name: str, start_edge: StartEdge
    ) -> None:
        self.name = name
        self._configuration = configuration
        self._start_edge = start_edge
        self._topology: Topology | None = None
        self._sent: tuple[str, int] | None = None
        self._handle: ActorHandle[Any] | None = None
        self._changed = asyncio.Event()
        self.report = CoordinatorReport()
        self.failure: ShoalError | None = None
        self.ready = asyncio.Event()

    def publish(self, topology: Topology) -> None:
        self._topology = topology
        self._changed.set()

    async def run(self) -> None:
        """Goes on until cancelled."""
        while True:
            # Before the round: a topology that comes while another is being sent must not wait.
            self._changed.clear()
            try:
                await self._round()
            except NotFound:
                self._handle = None
            except Unavailable as error:
                _log.info("coordinator_not_ready", name=self.name, reason=error.message)
            except ShoalError as error:
                self.failure = error
                _log.warning("coordinator_unreachable", name=self.name, reason=error.message)
            with contextlib.suppress(TimeoutError):
                # Not wait_for: Python 3.11's loses a cancellation that meets the event.
                async with asyncio.timeout(DESCRIBE_ROUND_S):
                    await self._changed.wait()

    async def _round(self) -> None:
        handle = self._coordinator()
        self.report = await bounded(handle.describe.remote(), DESCRIBE_TIMEOUT_S, self.name)
        incarnation = self.report.incarnation
        topology = self._topology
        if topology is not None and self._sent != (incarnation, topology.version):
            await bounded(
                handle.post_topology.remote(topology.to_wire()), DESCRIBE_TIMEOUT_S, self.name
            )
            self._sent = (incarnation, topology.version)
        self.failure = None
        self.ready.set()

    def _coordinator(self) -> "ActorHandle[Any]":
        if self._handle is None:
            configuration = self._configuration
            self._handle = Coordinator.options(  # type: ignore[attr-defined]
                name=configuration.actor_name(self.name),
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=1000,
                runtime_env=environment(),
                **_RESTART,
            ).remote(configuration, self.name, self._start_edge)
        return self._handle


@ray.remote
class Controller:
    """See actors/README.md for the life of an actor."""

    def __init__(self, configuration: ClusterConfiguration, start_edge: StartEdge) -> None:
        configure_logging(cluster=configuration.cluster, actor=CONTROLLER)
        self._configuration = configuration
        self._clock = SystemClock()
        self._started_ms = self._clock.wall_ms()
        self._pool = make_pool(configuration, CONTROLLER)
        self._servers = RayServers(configuration, self._pool)
        self._audience = CoordinatorAudience(configuration, start_edge)
        self._loop = ControlLoop(
            store=open_store(configuration.bucket, on_broken=end_process),
            clock=self._clock,
            ids=SystemIdGenerator(),
            servers=self._servers,
            audience=self._audience,
            cluster_uuid=configuration.cluster_uuid,
            owner=Owner(
                incarnation=configuration.incarnation,
                address=f"{configuration.grpc_host}:{configuration.grpc_port}",
                since_ms=self._started_ms,
                host=host_identity(),
            ),
        )
        self._pool.when_lost(lambda address, reason: self._loop.wake())
        self._metrics = self._serve_metrics()
        self._tasks = [
            asyncio.ensure_future(self._control()),
            asyncio.ensure_future(self._audience.run()),
        ]

    def _serve_metrics(self) -> WSGIServer | None:
        port = self._configuration.metrics_port
        if port is None:
            return None
        loop = asyncio.get_running_loop()

        def read() -> ClusterStatus:
            """Is called on the threads of the metrics' server."""
            return asyncio.run_coroutine_threadsafe(self.status(), loop).result(SCRAPE_S)

        try:
            return serve_metrics(self._configuration.grpc_host, port, read)
        except Conflict as error:
            # After a restart on another machine the port may be somebody's; data goes first.
            _log.error("metrics_not_served", reason=error.message)
            return None

    async def _control(self) -> None:
        """Controls until the bucket is another cluster's; anything unexpected ends the process.

        Ray starts it again then. A controller that only looks alive would be worse.
        """
        try:
            await self._loop.claim()
            await self._loop.run()
            await self._servers.shutdown()
        except asyncio.CancelledError:
            raise
        except BaseException:  # noqa: BLE001  the outermost loop of this process
            _log.exception("control_loop_died")
            os._exit(1)

    async def ready(self) -> str:
        """Returns the gRPC address once every coordinator serves and every server reported.

        Raises: what keeps a coordinator from starting, such as a port in use.
        """
        coordinators = self._audience.coordinators
        while not all(coordinator.ready.is_set() for coordinator in coordinators):
            for coordinator in coordinators:
                if coordinator.failure is not None:
                    raise coordinator.failure
            await asyncio.sleep(0.05)
        while len(self._loop.reports) < len(self._configuration.servers):
            await asyncio.sleep(0.05)
        return coordinators[0].report.address

    async def create_collection(
        self, schema: CollectionSchema, request: RequestName
    ) -> CollectionSchema:
        return await self._loop.create_collection(schema, request)

    async def alter_collection(
        self, change: SchemaChange, request: RequestName
    ) -> CollectionSchema:
        return await self._loop.alter_collection(change, request)

    async def drop_collection(self, name: str, request: RequestName) -> None:
        await self._loop.drop_collection(name, request)

    async def status(self) -> ClusterStatus:
        return cluster_status(
            self._configuration,
            self._loop,
            controller_pid=os.getpid(),
            controller_memory_bytes=psutil.Process().memory_info().rss,
            controller_started_ms=self._started_ms,
            coordinators={each.name: each.report for each in self._audience.coordinators},
            now_ms=self._clock.wall_ms(),
        )

    async def shutdown(self) -> None:
        """Stops the control loop, then the servers in order, and gives the bucket up.

        The caller kills the actors.
        """
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.shutdown)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._servers.shutdown()
        try:
            await self._loop.release()
        except ShoalError as error:
            # It only makes the next `up` on another machine ask for --take-over.
            _log.warning("bucket_not_released", reason=error.message)
        await self._pool.close_all()
