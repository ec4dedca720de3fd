"""The listening end of one link: authenticates the peer, then starts handlers and sends answers."""

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import structlog

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import (
    Indeterminate,
    Internal,
    InvalidRequest,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
    to_wire,
)
from shoal_cluster.domain.ids import IdGenerator
from shoal_cluster.domain.limits import KIB, LINK_IN_FLIGHT_MAX, MIB
from shoal_cluster.links.connection import DRAINING, WRITE_BUFFER_BYTES_HIGH
from shoal_cluster.links.deadlines import DeadlineTimer
from shoal_cluster.links.handshake import ListenerHandshake, SecretOf
from shoal_cluster.links.messages import (
    Answer,
    Handler,
    LaterAnswer,
    ReceivedReply,
    Reply,
    Request,
)
from shoal_protos.frames import (
    FRAME_BYTES_MAX,
    Frame,
    FrameDecoder,
    FrameError,
    FrameType,
    encode_frame,
)
from shoal_protos.handshake import HANDSHAKE_BYTES_MAX, NONCE_BYTES, HandshakeRefused

_log = structlog.get_logger(__name__)

UNSENT_BYTES_MAX: Final = 256 * MIB
"""Four of the largest frames for one peer. Past it, large replies are refused as Overloaded."""

_SMALL_REPLY_BYTES: Final = 64 * KIB
"""Always sent: 4,096 in flight of this size are 256 MiB, the bound once more, and a write's
acknowledgement must not be lost to somebody's large reads."""

_RETRY_MS: Final = 50
_INCIDENT_BYTES: Final = 8

_REQUEST, _REPLY = FrameType.REQUEST, FrameType.REPLY
_REQUEST_FIELDS: Final = 3
_ANSWERS: Final = (Reply, ReceivedReply)

# `Request(...)` without the Python call that a NamedTuple's constructor is.
_new_tuple = tuple.__new__


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What all accepted links of a listener share."""

    handlers: Mapping[str, Handler]
    secret_of: SecretOf
    clock: Clock
    ids: IdGenerator
    handshake_s: float
    in_flight_max: int = LINK_IN_FLIGHT_MAX
    reply_of: Callable[[bytes], Reply] | None = None


class AcceptedLink(asyncio.Protocol):
    """One peer. Handlers run while the peer reads; a peer that does not read is not read from.

    While the transport's buffer is full, requests that were already received are held (at most
    one chunk and one frame of them), and nothing more is received, so what a slow reader can make
    this process keep is bounded by UNSENT_BYTES_MAX and its own requests in flight.
    """

    def __init__(self, service: Service, *, on_closed: Callable[["AcceptedLink"], None]) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.draining = False
        self._service = service
        self._handlers = service.handlers
        self._clock = service.clock
        self._in_flight_max = service.in_flight_max
        self._reply_of = service.reply_of
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        nonce = bytes.fromhex(service.ids.hex(NONCE_BYTES))
        self._handshake: ListenerHandshake | None = ListenerHandshake(
            service.secret_of, nonce=nonce
        )
        self._handshake_bytes = 0
        self._handshake_timer: asyncio.TimerHandle | None = None
        self._decoder = FrameDecoder(frame_bytes_max=HANDSHAKE_BYTES_MAX)
        self._transport: asyncio.Transport
        self._open = False
        self._paused = False
        self._peer = ""
        self._held: dict[int, tuple[float, list[Any], memoryview]] = {}
        self._running: dict[int, tuple[asyncio.Future[Answer | bytes], float]] = {}
        self._deadlines = DeadlineTimer(service.clock, self._expire)

    def running(self) -> Iterator[asyncio.Future[Answer | bytes]]:
        """Yields the handlers that have started and not ended."""
        for future, _ in self._running.values():
            yield future

    def drain(self) -> None:
        """Tells the peer to send no more; requests from now on are refused as Unavailable."""
        self.draining = True
        if self._handshake is None:
            self._send(FrameType.NOTIFY, 0, DRAINING)
        else:
            self.abort()

    def close(self) -> None:
        """Closes the connection once everything written is sent."""
        if self._open:
            self._transport.close()

    def abort(self) -> None:
        if self._open:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        stream = cast(asyncio.Transport, transport)
        self._transport = stream
        self._open = True
        stream.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_HIGH)
        self._handshake_timer = self._loop.call_later(
            self._service.handshake_s, self._refuse, "it did not authenticate itself in time"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._open = False
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
        self._held.clear()
        # Nobody is left to hear the answers.
        self._cancel_running()
        self._deadlines.stop()
        self.closed.set_result(None)
        self._on_closed(self)

    def data_received(self, data: bytes) -> None:
        try:
            if self._handshake is not None:
                self._authenticate(self._handshake, data)
                return
            for frame in self._decoder.feed(data):
                if frame.type is _REQUEST:
                    self._receive_request(frame)
                else:
                    self._receive_control(frame)
        except FrameError as error:
            self._refuse(str(error))

    def pause_writing(self) -> None:
        self._paused = True
        if self._open:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        while self._held and not self._paused:
            request_id = next(iter(self._held))
            deadline_s, header, body = self._held.pop(request_id)
            if deadline_s <= self._clock.monotonic_s():
                message = "the request was dropped: its deadline passed before it was started"
                self._send_error(request_id, Unavailable(message))
            else:
                self._serve(request_id, deadline_s, header, body)
        if not self._paused and self._open and not self._transport.is_closing():
            self._transport.resume_reading()

    # -- receiving

    def _authenticate(self, handshake: ListenerHandshake, data: bytes) -> None:
        self._handshake_bytes += len(data)
        if self._handshake_bytes > HANDSHAKE_BYTES_MAX:
            raise FrameError(f"it sent over {HANDSHAKE_BYTES_MAX} bytes before authenticating")
        for frame in self._decoder.feed(data):
            # A caller waits for WELCOME before it sends more.
            if handshake.done:
                raise FrameError("it sent more before it was welcomed")
            try:
                frame_type, header = handshake.receive(frame)
            except HandshakeRefused as refused:
                self._send(FrameType.ERROR, 0, refused.error)
                self._refuse(refused.error["message"])
                return
            self._send(frame_type, 0, header)
        if handshake.done:
            assert self._handshake_timer is not None
            self._handshake_timer.cancel()
            self._handshake_timer = None
            self._handshake = None
            self._decoder.frame_bytes_max = FRAME_BYTES_MAX
            self._peer = f"{handshake.peer_name or 'unnamed'} at {self._remote()}"

    def _refuse(self, reason: str) -> None:
        """Closes the link of a peer that is a stranger or breaks the protocol."""
        _log.warning("link_refused", peer=self._peer or self._remote(), reason=reason)
        if self._open:
            # A stranger gets what is written at most, and not the time to read it slowly.
            self._transport.close()
            self._loop.call_later(self._service.handshake_s, self.abort)
        self._cancel_running()

    def _remote(self) -> str:
        peername = self._transport.get_extra_info("peername")
        if isinstance(peername, tuple):
            return f"{peername[0]}:{peername[1]}"
        return str(peername) if peername else "a local socket"

    def _receive_request(self, frame: Frame) -> None:
        header = frame.header
        # Spelled out: a match statement takes five times as long, on every request.
        if (
            type(header) is not list
            or len(header) != _REQUEST_FIELDS
            or type(header[0]) is not str
            or type(header[1]) is not int
            or header[1] < 0
        ):
            raise FrameError("a request's header is not [method, timeout_ms, header]")
        deadline_s = self._clock.monotonic_s() + header[1] / 1000
        if frame.request_id in self._running or frame.request_id in self._held:
            raise FrameError(f"request id {frame.request_id} is in use")
        if self._paused or self._held:
            self._held[frame.request_id] = (deadline_s, header, frame.body)
        else:
            self._serve(frame.request_id, deadline_s, header, frame.body)

    def _receive_control(self, frame: Frame) -> None:
        """Handles everything but requests, at once, whether the peer reads or not."""
        if frame.type is FrameType.PING:
            self._send(FrameType.PONG, frame.request_id)
        elif frame.type is FrameType.CANCEL:
            self._held.pop(frame.request_id, None)
            running = self._running.get(frame.request_id)
            if running is not None:
                running[0].cancel()
        else:
            raise FrameError(f"a caller does not send {frame.type.name}")

    # -- serving

    def _serve(
        self, request_id: int, deadline_s: float, header: list[Any], body: memoryview
    ) -> None:
        """Starts the handler of a request and answers at once if it did."""
        method: str = header[0]
        handler = self._handlers.get(method)
        if handler is None or self.draining or len(self._running) >= self._in_flight_max:
            self._send_error(request_id, self._why_not_served(method, handler))
            return
        try:
            request = _new_tuple(Request, (method, header[2], body, deadline_s, self._peer))
            answer = handler(request)
            if not isinstance(answer, tuple):
                self._run(request_id, deadline_s, method, answer)
                return
        except ShoalError as error:
            self._send_error(request_id, error)
        # The shell's outermost loop: whatever a handler raises, the link and its actor go on.
        except Exception as error:  # noqa: BLE001
            self._send_internal(request_id, method, error)
        else:
            self._send_answer(request_id, method, answer)

    def _why_not_served(self, method: str, handler: Handler | None) -> ShoalError:
        if handler is None:
            served = ", ".join(sorted(self._service.handlers))
            return InvalidRequest(f"no method '{method}' here, only {served}", field="method")
        if self.draining:
            return Unavailable(f"'{method}' was not started: the listener is shutting down")
        return Overloaded(
            f"{len(self._running)} calls of this link are being served",
            limit=f"{self._service.in_flight_max} calls",
            retry_after_ms=_RETRY_MS,
        )

    def _run(self, request_id: int, deadline_s: float, method: str, awaitable: LaterAnswer) -> None:
        future = asyncio.ensure_future(awaitable)
        self._running[request_id] = (future, deadline_s)
        self._deadlines.watch(deadline_s)
        future.add_done_callback(partial(self._finish, request_id, method))

    def _finish(self, request_id: int, method: str, future: asyncio.Future[Answer | bytes]) -> None:
        self._running.pop(request_id, None)
        if future.cancelled():
            # By CANCEL, and then nobody listens; by the deadline; or by the actor itself.
            message = f"'{method}' was cancelled while it was served"
            self._send_error(request_id, Indeterminate(message))
            return
        error = future.exception()
        if error is None:
            self._send_answer(request_id, method, future.result())
        elif isinstance(error, ShoalError):
            self._send_error(request_id, error)
        else:
            self._send_internal(request_id, method, error)

    def _expire(self, now_s: float) -> float:
        """Cancels the handlers due at now_s and returns the next deadline."""
        for future, deadline_s in self._running.values():
            if deadline_s <= now_s:
                future.cancel()
        # A handler that takes its time to be cancelled is not due again.
        later = (deadline for _, deadline in self._running.values() if deadline > now_s)
        return min(later, default=math.inf)

    def _cancel_running(self) -> None:
        for future, _ in list(self._running.values()):
            future.cancel()

    # -- sending

    def _send(self, frame_type: FrameType, request_id: int, header: object = None) -> None:
        if self._open and not self._transport.is_closing():
            self._transport.writelines(encode_frame(frame_type, request_id, header))

    def _send_answer(self, request_id: int, method: str, answer: object) -> None:
        transport = self._transport
        if not self._open or transport.is_closing():
            return
        if type(answer) is bytes and self._reply_of is not None:
            answer = self._reply_of(answer)
        if not isinstance(answer, _ANSWERS):
            wrong = TypeError(f"handler of '{method}' returned {type(answer).__name__}, no Reply")
            self._send_internal(request_id, method, wrong)
            return
        try:
            buffers = encode_frame(_REPLY, request_id, answer.header, answer.body)
        except FrameError as error:
            # The handler ran: what it did is done, only its answer cannot travel.
            self._send_error(
                request_id,
                InvalidRequest(
                    f"the reply of '{method}' does not fit a frame: {error}; ask for less",
                    limit=f"{FRAME_BYTES_MAX} bytes",
                    outcome=Outcome.MAYBE_APPLIED,
                ),
            )
            return
        except (TypeError, ValueError, OverflowError) as error:
            self._send_internal(request_id, method, error)
            return
        if self._paused:
            size = sum(map(len, buffers))
            unsent = transport.get_write_buffer_size()
            if size > _SMALL_REPLY_BYTES and unsent + size > UNSENT_BYTES_MAX:
                self._send_error(
                    request_id,
                    Overloaded(
                        f"{unsent} bytes of replies wait for this peer to read them",
                        limit=f"{UNSENT_BYTES_MAX} bytes",
                        retry_after_ms=_RETRY_MS,
                        outcome=Outcome.MAYBE_APPLIED,
                    ),
                )
                return
        if len(buffers) == 1:
            transport.write(buffers[0])
        else:
            transport.writelines(buffers)

    def _send_error(self, request_id: int, error: ShoalError) -> None:
        self._send(FrameType.ERROR, request_id, to_wire(error))

    def _send_internal(self, request_id: int, method: str, error: BaseException) -> None:
        """Logs a bug with its traceback, once, and gives the caller the number to find it by."""
        incident = self._service.ids.hex(_INCIDENT_BYTES)
        _log.error(
            "handler_failed", method=method, peer=self._peer, incident=incident, exc_info=error
        )
        self._send_error(
            request_id,
            Internal(
                f"'{method}' failed with an internal error; incident {incident} in the log of "
                "the server",
                outcome=Outcome.MAYBE_APPLIED,
            ),
        )
