"""The calling end of a link: one connection, many calls at once.

A call is written at once and answered in any order. A broken connection fails every call in the
same loop turn, which makes a link the fastest failure signal there is. What a lost call means is
the caller's to say, by `on_lost`: a read was not applied, a write may have been.
"""

import asyncio
import contextlib
import math
from typing import Final, cast

import structlog

from shoal_cluster.domain.clock import Clock, SystemClock
from shoal_cluster.domain.errors import (
    Indeterminate,
    InvalidRequest,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import IdGenerator, SystemIdGenerator
from shoal_cluster.domain.limits import LINK_IN_FLIGHT_MAX, MIB
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.deadlines import DeadlineTimer
from shoal_cluster.links.handshake import check_secret
from shoal_cluster.links.messages import ReceivedReply, received_error
from shoal_cluster.links.network import Network, SocketNetwork
from shoal_protos.frames import (
    FRAME_BYTES_MAX,
    REQUEST_ID_MAX,
    Body,
    Frame,
    FrameDecoder,
    FrameError,
    FrameType,
    encode_frame,
)
from shoal_protos.handshake import (
    HANDSHAKE_BYTES_MAX,
    NONCE_BYTES,
    CallerHandshake,
    HandshakeRefused,
)

_log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S: Final = 2.0
"""Connecting takes under 1 ms on a node; 2 s is the time after which a server is suspect."""

WRITE_BUFFER_BYTES_HIGH: Final = 1 * MIB
"""Past this calls wait to be written: some 300 requests of 3 KiB, one loop turn of a busy link."""

DRAINING: Final = "draining"
"""The listener's notice that it takes no more requests and will close."""

_PINGS_IN_FLIGHT_MAX: Final = 16
_OVERLOADED_RETRY_MS: Final = 50

# `ReceivedReply(header, body)` without the Python call that a NamedTuple's constructor is.
_new_tuple = tuple.__new__

_REPLY, _ERROR, _PONG = FrameType.REPLY, FrameType.ERROR, FrameType.PONG

# (future, deadline by the link's clock, what a lost call means, method)
_PendingCall = tuple[asyncio.Future[ReceivedReply], float, Outcome, str]


class Link(asyncio.Protocol):
    """A connected and authenticated link; made by `connect`, used on the loop that made it.

    closed: becomes done, with the reason as its result, when the link is lost or closed.
    draining: the listener asked for no more calls; those in flight still get their replies.
    ready: becomes done when the handshake ends; its result is what it failed with, or None.
    """

    def __init__(
        self, address: LinkAddress, handshake: CallerHandshake, *, clock: Clock, in_flight_max: int
    ) -> None:
        loop = asyncio.get_running_loop()
        self.address = address
        self.draining = False
        self.closed: asyncio.Future[str] = loop.create_future()
        self.ready: asyncio.Future[ShoalError | None] = loop.create_future()
        self._loop = loop
        self._clock = clock
        self._in_flight_max = in_flight_max
        self._handshake: CallerHandshake | None = handshake
        self._decoder = FrameDecoder(frame_bytes_max=HANDSHAKE_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._close_reason = ""
        self._paused = False
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._last_id = 0
        self._pending: dict[int, _PendingCall] = {}
        self._deadlines = DeadlineTimer(clock, self._expire)

    @property
    def in_flight(self) -> int:
        """Calls and pings that wait for an answer or for being written."""
        return len(self._pending) + len(self._waiting)

    async def call(
        self,
        method: str,
        header: object,
        body: Body = b"",
        *,
        timeout_s: float,
        on_lost: Outcome,
    ) -> ReceivedReply:
        """Calls a method of the listener and returns its reply.

        header: anything msgpack can pack. body: buffers that stay unchanged until this returns.
        on_lost: what it means if the request was written and no answer came in time or the link
        broke: NOT_APPLIED (reads) raises Unavailable, MAYBE_APPLIED (writes) Indeterminate.
        Concurrent calls may be served in any order. Cancelling this cancels the handler.
        Raises: what the handler raised, with its outcome (but Unavailable for an Indeterminate,
        when on_lost says that there is no effect); Unavailable (NOT_APPLIED) if the request was
        not written; Overloaded (NOT_APPLIED) if too many calls are in flight;
        InvalidRequest (NOT_APPLIED) if the frame would be too large.
        """
        pending = self._pending
        if len(pending) + len(self._waiting) >= self._in_flight_max:
            raise Overloaded(
                f"{self.in_flight} calls are in flight on the link to {self.address}",
                limit=f"{self._in_flight_max} calls",
                retry_after_ms=_OVERLOADED_RETRY_MS,
            )
        deadline_s = self._clock.monotonic_s() + timeout_s
        request_id = self._next_id()
        try:
            # Rounded up, so that the listener never gives up before the caller.
            buffers = encode_frame(
                FrameType.REQUEST, request_id, (method, int(timeout_s * 1000) + 1, header), body
            )
        except FrameError as error:
            raise InvalidRequest(
                f"request of '{method}' does not fit a frame: {error}",
                field="body",
                limit=f"{FRAME_BYTES_MAX} bytes",
            ) from error
        if self._paused:
            await self._until_writable(deadline_s, method)
        if self._close_reason or self.draining or timeout_s <= 0:
            raise Unavailable(self._why_not_written(method))
        future: asyncio.Future[ReceivedReply] = self._loop.create_future()
        pending[request_id] = (future, deadline_s, on_lost, method)
        self._deadlines.watch(deadline_s)
        assert self._transport is not None
        if len(buffers) == 1:
            self._transport.write(buffers[0])
        else:
            self._transport.writelines(buffers)
        try:
            return await future
        except asyncio.CancelledError:
            if pending.pop(request_id, None) is not None:
                self._write(FrameType.CANCEL, request_id)
            raise

    async def ping(self, timeout_s: float) -> float:
        """Returns the seconds until the listener's event loop answered.

        Answered in the listener's receive path, so it shows that its loop turns; it overtakes
        calls that wait to be written. Raises: Unavailable (NOT_APPLIED), Overloaded.
        """
        if self._close_reason:
            raise Unavailable(self._why_not_written("ping"))
        if len(self._pending) >= self._in_flight_max + _PINGS_IN_FLIGHT_MAX:
            raise Overloaded(
                f"too many pings are in flight on the link to {self.address}",
                limit=f"{_PINGS_IN_FLIGHT_MAX} pings",
                retry_after_ms=_OVERLOADED_RETRY_MS,
            )
        start_s = self._clock.monotonic_s()
        request_id = self._next_id()
        future: asyncio.Future[ReceivedReply] = self._loop.create_future()
        deadline_s = start_s + timeout_s
        self._pending[request_id] = (future, deadline_s, Outcome.NOT_APPLIED, "ping")
        self._deadlines.watch(deadline_s)
        self._write(FrameType.PING, request_id)
        try:
            await future
        finally:
            self._pending.pop(request_id, None)
        return self._clock.monotonic_s() - start_s

    async def close(self) -> None:
        """Closes the link after what is written; calls in flight are lost. Idempotent."""
        self._lose("it was closed by this side")
        if self._transport is not None:
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await asyncio.shield(self.closed)
            self._transport.abort()
        await asyncio.shield(self.closed)

    def abort(self, reason: str) -> None:
        """Drops the link at once, for a caller that no longer trusts it (missed heartbeats)."""
        self._lose(reason)
        if self._transport is not None:
            self._transport.abort()

    # -- waiting and losing

    async def _until_writable(self, deadline_s: float, method: str) -> None:
        """Waits, first come first served, until the transport takes more or the link is lost.

        Raises: Unavailable (NOT_APPLIED) at the deadline.
        """
        while self._paused and not self._close_reason:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiting[waiter] = None
            try:
                async with asyncio.timeout(deadline_s - self._clock.monotonic_s()):
                    await waiter
            except TimeoutError as error:
                raise Unavailable(
                    f"'{method}' was not written to {self.address} before its deadline, "
                    "because the listener reads too slowly"
                ) from error
            finally:
                self._waiting.pop(waiter, None)
                # One is woken at a time, and wakes the next after it has written (or given up):
                # waking all would cost a scan of all for each large body.
                if self._waiting and not self._paused:
                    self._loop.call_soon(self._wake_next)

    def _why_not_written(self, method: str) -> str:
        if self._close_reason:
            why = self._close_reason
            return f"'{method}' was not sent: the link to {self.address} is lost: {why}"
        if self.draining:
            return f"'{method}' was not sent: the listener at {self.address} is shutting down"
        return f"'{method}' was not sent to {self.address}: its deadline had passed"

    def _expire(self, now_s: float) -> float:
        """Fails the calls due at now_s, tells the listener, and returns the next deadline."""
        due = [(request_id, call) for request_id, call in self._pending.items() if call[1] <= now_s]
        for request_id, (future, _, on_lost, method) in due:
            del self._pending[request_id]
            if not future.done():
                message = f"no reply to '{method}' from {self.address} before its deadline"
                future.set_exception(_lost(message, on_lost))
            self._write(FrameType.CANCEL, request_id)
        return min((call[1] for call in self._pending.values()), default=math.inf)

    def _lose(self, reason: str) -> None:
        """Marks the link as unusable and fails every call, once; the first reason counts."""
        if self._close_reason:
            return
        self._close_reason = reason
        self._deadlines.stop()
        pending, self._pending = self._pending, {}
        for future, _, on_lost, method in pending.values():
            if not future.done():
                message = f"the link to {self.address} was lost during '{method}': {reason}"
                future.set_exception(_lost(message, on_lost))
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
        if not self.ready.done():
            self.ready.set_result(Unavailable(f"cannot link to {self.address}: {reason}"))
        if self._transport is None and not self.closed.done():
            self.closed.set_result(reason)

    def _wake_next(self) -> None:
        for waiter in self._waiting:
            if not self._paused and not waiter.done():
                waiter.set_result(None)
            return

    # -- sending

    def _write(self, frame_type: FrameType, request_id: int, header: object = None) -> None:
        transport = self._transport
        if transport is not None and not self._close_reason and not transport.is_closing():
            transport.writelines(encode_frame(frame_type, request_id, header))

    def _next_id(self) -> int:
        """Returns an id that no call in flight has; ids start over after 2^32 calls."""
        request_id = self._last_id % REQUEST_ID_MAX + 1
        while request_id in self._pending:
            request_id = request_id % REQUEST_ID_MAX + 1
        self._last_id = request_id
        return request_id

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        stream = cast(asyncio.Transport, transport)
        assert self._handshake is not None
        self._transport = stream
        stream.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_HIGH)
        if self._close_reason:
            stream.abort()
            return
        self._write(FrameType.HELLO, 0, self._handshake.hello())

    def data_received(self, data: bytes) -> None:
        try:
            frames = self._decoder.feed(data)
            for frame in frames:
                if frame.type is _REPLY:
                    call = self._pending.pop(frame.request_id, None)
                    # None: a reply that crossed our CANCEL.
                    if call is not None and not call[0].done():
                        call[0].set_result(_new_tuple(ReceivedReply, frame[2:]))
                else:
                    self._receive(frame)
        except FrameError as error:
            _log.warning("link_garbled", address=self.address, reason=str(error))
            self.abort(f"the listener broke the protocol: {error}")

    def _receive(self, frame: Frame) -> None:
        """Handles every frame but replies."""
        if self._handshake is not None:
            self._receive_handshake(self._handshake, frame)
        elif frame.type is _ERROR:
            call = self._pending.pop(frame.request_id, None)
            if call is not None and not call[0].done():
                error = received_error(frame.header)
                if isinstance(error, Indeterminate) and call[2] is Outcome.NOT_APPLIED:
                    # The listener cannot know that the call whose handler it ended is a read.
                    error = Unavailable(error.message)
                call[0].set_exception(error)
        elif frame.type is _PONG:
            call = self._pending.pop(frame.request_id, None)
            if call is not None and not call[0].done():
                call[0].set_result(ReceivedReply(None, frame.body))
        elif frame.type is FrameType.NOTIFY:
            # Unknown notices are ignored: they exist so that a listener can add some.
            if frame.header == DRAINING:
                self.draining = True
        else:
            raise FrameError(f"a listener does not send {frame.type.name}")

    def _receive_handshake(self, handshake: CallerHandshake, frame: Frame) -> None:
        try:
            header = handshake.receive(frame)
        except HandshakeRefused as refused:
            error = received_error(refused.error)
            if not self.ready.done():
                self.ready.set_result(error)
            self.abort(f"the handshake failed: {error.message}")
            return
        if header is not None:
            self._write(FrameType.HELLO, 0, header)
        if handshake.done:
            self._handshake = None
            self._decoder.frame_bytes_max = FRAME_BYTES_MAX
            if not self.ready.done():
                self.ready.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("the listener closed it" if exc is None else f"it broke: {exc}")
        if not self.closed.done():
            self.closed.set_result(self._close_reason)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake_next()


def _lost(message: str, on_lost: Outcome) -> ShoalError:
    return Unavailable(message) if on_lost is Outcome.NOT_APPLIED else Indeterminate(message)


async def connect(
    address: LinkAddress,
    secret: bytes,
    *,
    clock: Clock | None = None,
    ids: IdGenerator | None = None,
    network: Network | None = None,
    name: str = "",
    timeout_s: float = CONNECT_TIMEOUT_S,
    in_flight_max: int = LINK_IN_FLIGHT_MAX,
) -> Link:
    """Connects to a listener, authenticates both sides and returns the link.

    name: says who calls, in the listener's logs; at most 64 characters of it are sent.
    Raises: Unavailable (nobody there, or not in time), Unauthenticated (secrets differ),
    Conflict (protocol versions differ); all NOT_APPLIED.
    """
    check_secret(secret)
    ids = ids or SystemIdGenerator()
    handshake = CallerHandshake(secret, name=name, nonce=bytes.fromhex(ids.hex(NONCE_BYTES)))
    link = Link(address, handshake, clock=clock or SystemClock(), in_flight_max=in_flight_max)
    try:
        async with asyncio.timeout(timeout_s):
            await (network or SocketNetwork()).open(address, lambda: link)
            error = await link.ready
    except TimeoutError as timeout:
        link.abort("connecting took too long")
        raise Unavailable(f"no link to {address} within {timeout_s} s") from timeout
    except asyncio.CancelledError:
        link.abort("connecting was cancelled")
        raise
    if error is not None:
        raise error
    return link
