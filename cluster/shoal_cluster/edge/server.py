"""Starts and stops the gRPC server of a coordinator."""

import asyncio
from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Conflict
from shoal_cluster.domain.ids import IdGenerator
from shoal_cluster.domain.limits import REQUEST_BYTES_MAX
from shoal_cluster.edge.admin import AdminService
from shoal_cluster.edge.admission import REQUESTS_IN_FLIGHT_MAX, Admission
from shoal_cluster.edge.collections import CollectionsService
from shoal_cluster.edge.fast_lane import FastLanes, LanesService, start_lanes
from shoal_cluster.edge.guard import Guard
from shoal_cluster.edge.loads import LoadsService
from shoal_cluster.edge.points import PointsService
from shoal_cluster.edge.ports import (
    CollectionControl,
    Exploring,
    Loading,
    RowReading,
    Searching,
    StatusSource,
    Writing,
)
from shoal_cluster.edge.search import SearchService
from shoal_cluster.edge.tickets import Tickets
from shoal_protos.v1.admin_pb2_grpc import add_AdminServicer_to_server
from shoal_protos.v1.collections_pb2_grpc import add_CollectionsServicer_to_server
from shoal_protos.v1.lanes_pb2_grpc import add_LanesServicer_to_server
from shoal_protos.v1.loads_pb2_grpc import add_LoadsServicer_to_server
from shoal_protos.v1.points_pb2_grpc import add_PointsServicer_to_server
from shoal_protos.v1.search_pb2_grpc import add_SearchServicer_to_server

SERVICES = (
    "shoal.v1.Collections",
    "shoal.v1.Points",
    "shoal.v1.Search",
    "shoal.v1.Admin",
    "shoal.v1.Loads",
    "shoal.v1.Lanes",
)

MESSAGE_BYTES_MAX = 2 * REQUEST_BYTES_MAX
"""gRPC drops what is larger before we see it, with a bare RESOURCE_EXHAUSTED. Between this and
REQUEST_BYTES_MAX the caller gets a typed error that names the limit."""

RPCS_IN_FLIGHT_MAX = 2 * REQUESTS_IN_FLIGHT_MAX
"""Backstop in gRPC itself: above Admission's bound, so that refusals are usually typed."""

DRAIN_S = 5.0

OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", -1),  # replies are bounded where they are made
    # A connection whose peer vanished is noticed within 40 s; clients may ping as often as 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the servicers delegate to."""

    control: CollectionControl
    searching: Searching
    reading: RowReading
    exploring: Exploring
    writing: Writing
    loading: Loading
    status: StatusSource


class EdgeServer:
    """A running server. address: where it listens, with the real port."""

    def __init__(
        self,
        server: grpc.aio.Server,
        checks: health.aio.HealthServicer,
        lanes: FastLanes,
        host: str,
        port: int,
    ) -> None:
        self._server = server
        self._checks = checks
        self.lanes = lanes
        self.port = port
        self.address = f"{host}:{port}"

    async def set_serving(self, serving: bool) -> None:
        """Tells health checks whether requests should come here; requests are taken anyway."""
        state = health_pb2.HealthCheckResponse.ServingStatus
        for service in ("", *SERVICES):
            await self._checks.set(service, state.SERVING if serving else state.NOT_SERVING)

    async def close(self, drain_s: float = DRAIN_S) -> None:
        """Reports NOT_SERVING, takes no more requests, and lets those in flight finish."""
        await self._checks.enter_graceful_shutdown()
        await asyncio.gather(self.lanes.close(drain_s), self._server.stop(drain_s))


async def start_server(
    address: str,
    services: Services,
    *,
    ids: IdGenerator,
    admission: Admission | None = None,
    lane_socket: str = "",
    share_port: bool = False,
) -> EdgeServer:
    """Starts the gRPC server with all services, health checks and reflection, and fast lanes.

    address: `host:port`; port 0 chooses a free one. lane_socket: path of a Unix socket for lanes,
    "" for none. share_port: with other servers that say so too; the kernel deals connections out
    among them. Health reports SERVING when this returns.

    Raises: Conflict naming the address when it cannot be listened on.
    """
    host, _, _ = address.rpartition(":")
    admission = admission or Admission()
    options = (*OPTIONS, ("grpc.so_reuseport", int(share_port)))
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=RPCS_IN_FLIGHT_MAX)
    search = SearchService(services.searching, services.exploring, admission)
    guard = Guard(server, admission, ids, {"shoal.v1.Search/Search": search.decoder.decode})
    points = PointsService(services.writing, services.reading, services.exploring, admission)
    # The generated functions take a server; the guard offers the two methods they call.
    add_CollectionsServicer_to_server(CollectionsService(services.control), guard)  # type: ignore[arg-type]
    add_PointsServicer_to_server(points, guard)  # type: ignore[arg-type]
    add_SearchServicer_to_server(search, guard)  # type: ignore[arg-type]
    add_LoadsServicer_to_server(LoadsService(services.loading), guard)  # type: ignore[arg-type]
    add_AdminServicer_to_server(AdminService(services.status), guard)  # type: ignore[arg-type]
    clock = SystemClock()
    tickets = Tickets(clock, ids)
    lanes_service = LanesService(tickets)
    # Only what is registered before can be called over lanes: a lane opens no lanes.
    lane_methods = dict(guard.serialised)
    add_LanesServicer_to_server(lanes_service, guard)  # type: ignore[arg-type]
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        port = 0
        cause: Exception | None = error
    else:
        cause = None
    if port == 0:
        raise Conflict(
            f"cannot listen on {address}: the port is in use by another process, or the address "
            "is not one of this machine; choose another, or stop what uses it",
            field="address",
        ) from cause
    lanes = await start_lanes(
        lane_methods, tickets, host=host, socket_path=lane_socket, clock=clock, ids=ids
    )
    lanes_service.places = lanes.places
    await server.start()
    edge = EdgeServer(server, checks, lanes, host, port)
    await edge.set_serving(True)
    return edge
