"""Serves the unary methods of the API over links as well: docs/design/fast-lane.md.

What runs behind a method is what `Guard` made for gRPC: same checks, same servicer (FL-1).
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.domain.ids import IdGenerator
from shoal_cluster.edge.guard import Context
from shoal_cluster.edge.tickets import LIFETIME_MS, Tickets
from shoal_cluster.links.address import parse_address, tcp_address, tcp_endpoint, unix_path
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.messages import Handler, Reply, Request
from shoal_protos.frames import FRAME_BYTES_MAX
from shoal_protos.lanes import TOO_LARGE
from shoal_protos.v1 import lanes_pb2 as pb
from shoal_protos.v1.lanes_pb2_grpc import LanesServicer

_log = structlog.get_logger(__name__)

REPLY_BYTES_MAX: Final = FRAME_BYTES_MAX - 1024
"""Room for the frame's own fields."""

Serve = Callable[[bytes | memoryview, Context], Awaitable[bytes]]
"""Answers a serialised request with a serialised response, or raises a ShoalError."""


class LaneContext:
    """What servicers ask of a gRPC context: how long they have."""

    __slots__ = ("_clock", "_deadline_s")

    def __init__(self, clock: Clock, deadline_s: float) -> None:
        self._clock = clock
        self._deadline_s = deadline_s

    def time_remaining(self) -> float:
        return self._deadline_s - self._clock.monotonic_s()


def lane_handlers(methods: Mapping[str, Serve], clock: Clock) -> dict[str, Handler]:
    """Returns link handlers for methods by their gRPC paths; they answer with bytes."""
    return {path: _handler(serve, clock) for path, serve in methods.items()}


def _handler(serve: Serve, clock: Clock) -> Handler:
    def handle(request: Request) -> Awaitable[bytes]:
        return serve(request.body, LaneContext(clock, request.deadline_monotonic_s))

    return handle


def lane_reply(response: bytes) -> Reply:
    """Returns how a serialised response travels over a lane."""
    if len(response) > REPLY_BYTES_MAX:
        return Reply(TOO_LARGE)
    return Reply(None, response)


@dataclass(frozen=True, slots=True)
class LanePlaces:
    """Where lanes are opened. port 0, socket_path "": not this way."""

    port: int
    socket_path: str


class FastLanes:
    """The listener of a coordinator's lanes."""

    def __init__(self, listener: Listener, places: LanePlaces) -> None:
        self._listener = listener
        self.places = places

    @property
    def open_lanes(self) -> int:
        return self._listener.links_open

    async def close(self, drain_s: float) -> None:
        await self._listener.close(drain_s)


async def start_lanes(
    methods: Mapping[str, Serve],
    tickets: Tickets,
    *,
    host: str,
    socket_path: str,
    clock: Clock,
    ids: IdGenerator,
) -> FastLanes:
    """Listens at a free TCP port of `host` and, if a path is given, at a Unix socket.

    A place that cannot be listened at is logged and left out: lanes are never needed (FL-2).
    """
    listener = Listener(
        lane_handlers(methods, clock),
        tickets.secret_of,
        clock=clock,
        ids=ids,
        reply_of=lane_reply,
    )
    port, path = 0, ""
    try:
        endpoint = tcp_endpoint(await listener.listen(tcp_address(host, 0)))
        port = endpoint[1] if endpoint is not None else 0
    except ShoalError as error:
        _log.warning("fast_lane_not_served", host=host, reason=error.message)
    if socket_path:
        try:
            address = await listener.listen(parse_address(f"unix:{socket_path}"))
            path = unix_path(address) or ""
        except ShoalError as error:
            _log.warning("fast_lane_not_served", socket=socket_path, reason=error.message)
    return FastLanes(listener, LanePlaces(port, path))


class LanesService(LanesServicer):
    """Hands out tickets. places: set once the listener runs."""

    def __init__(self, tickets: Tickets) -> None:
        self._tickets = tickets
        self.places = LanePlaces(0, "")

    async def Connect(self, request: pb.ConnectRequest, context: Any) -> pb.ConnectResponse:  # noqa: N802
        ticket = self._tickets.issue()
        return pb.ConnectResponse(
            port=self.places.port,
            socket_path=self.places.socket_path,
            ticket=ticket.name,
            secret=ticket.secret,
            lifetime_ms=LIFETIME_MS,
        )
