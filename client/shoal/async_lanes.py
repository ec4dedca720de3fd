"""Fast lanes for asyncio: one connection, many calls at once. lanes.py says what lanes are."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final, cast

from shoal.lanes import (
    OPEN_S,
    RECEIVE_BYTES,
    REQUEST_BYTES_MAX,
    LaneUnusable,
    Offer,
    Pause,
    offer_of,
    reply_of,
)
from shoal.rpc import error_of_lost_call
from shoal_protos.frames import (
    FRAME_BYTES_MAX,
    REQUEST_ID_MAX,
    Buffer,
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
from shoal_protos.v1 import lanes_pb2

CALLS_MAX: Final = 1024
"""In flight on the lane; what is above goes by gRPC, which has a bound of its own."""

UNSENT_BYTES_MAX: Final = 64 * 1024 * 1024
"""Written and not sent yet; what is above goes by gRPC, where it waits."""

AskAsync = Callable[[float], Awaitable[lanes_pb2.ConnectResponse]]


class AsyncLanes:
    """The lane to one coordinator, for the tasks of one event loop."""

    def __init__(self, grpc_address: str, ask: AskAsync) -> None:
        self._address = grpc_address
        self._ask = ask
        self._pause = Pause()
        self._lane: AsyncLane | None = None
        self._opening: asyncio.Task[AsyncLane | None] | None = None
        self._closed = False

    async def call(
        self, path: str, request: bytes, timeout_s: float, *, is_write: bool
    ) -> memoryview | None:
        """As `BlockingLanes.call`."""
        lane = self._lane
        if lane is None or not lane.usable:
            lane = await self._open(timeout_s)
        if lane is None or len(request) > REQUEST_BYTES_MAX or lane.is_full:
            return None
        try:
            reply = await lane.call(path, request, timeout_s)
        except LaneUnusable:
            return None
        except TimeoutError as error:
            reason = f"no answer from {self._address} over a lane in time"
            raise error_of_lost_call(reason, is_write=is_write) from error
        except ConnectionError as error:
            reason = f"the lane to {self._address} broke: {error}"
            raise error_of_lost_call(reason, is_write=is_write) from error
        return reply_of(reply, is_write=is_write)

    async def close(self) -> None:
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
        if self._lane is not None:
            self._lane.close("the client is closed")

    async def _open(self, timeout_s: float) -> "AsyncLane | None":
        if self._closed or not self._pause.over(time.monotonic()):
            return None
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._run_open(min(OPEN_S, timeout_s / 4)))
        # Shielded: others wait for it too.
        return await asyncio.shield(self._opening)

    async def _run_open(self, timeout_s: float) -> "AsyncLane | None":
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._ask(timeout_s)
                offer = offer_of(response, self._address, time.monotonic())
                self._lane = await _connected(offer)
        except Exception:  # noqa: BLE001  whatever gRPC or the network raise: go by gRPC
            self._pause.failed(time.monotonic())
            return None
        finally:
            self._opening = None
        self._pause.succeeded()
        return self._lane


async def _connected(offer: Offer) -> "AsyncLane":
    loop = asyncio.get_running_loop()
    lane = AsyncLane(offer)
    if offer.socket_path and os.path.exists(offer.socket_path):
        try:
            await loop.create_unix_connection(lambda: lane, offer.socket_path)
        except OSError:  # not ours to use, or left behind: the port may still do
            lane = AsyncLane(offer)
        else:
            await lane.ready
            return lane
    if not offer.port or not offer.host:
        raise LaneUnusable("no lane is offered")
    await loop.create_connection(lambda: lane, offer.host, offer.port)
    await lane.ready
    return lane


class AsyncLane(asyncio.BufferedProtocol):
    """One authenticated connection.

    Requests of one turn of the loop are written together: one system call, and they arrive
    together, so that the coordinator can answer them together.
    """

    def __init__(self, offer: Offer) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._handshake: CallerHandshake | None = CallerHandshake(
            offer.secret, name=offer.ticket, nonce=os.urandom(NONCE_BYTES)
        )
        self._decoder = FrameDecoder(frame_bytes_max=HANDSHAKE_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._lost = ""
        self._last_id = 0
        self._pending: dict[int, asyncio.Future[Frame]] = {}
        self._unwritten: list[Buffer] = []
        self._received = memoryview(bytearray(RECEIVE_BYTES))

    @property
    def usable(self) -> bool:
        return not self._lost

    @property
    def is_full(self) -> bool:
        unsent = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return len(self._pending) >= CALLS_MAX or unsent > UNSENT_BYTES_MAX

    async def call(self, path: str, request: bytes, timeout_s: float) -> Frame:
        """Returns the REPLY or ERROR frame.

        Raises: LaneUnusable when nothing was written; TimeoutError or ConnectionError when it may
        have been. Cancelling this cancels the request.
        """
        if self._lost or timeout_s <= 0:
            raise LaneUnusable(self._lost or "the deadline passed")
        self._last_id = request_id = self._last_id % REQUEST_ID_MAX + 1
        future: asyncio.Future[Frame] = self._loop.create_future()
        self._pending[request_id] = future
        header = (path, int(timeout_s * 1000) + 1, None)
        self._write(encode_frame(FrameType.REQUEST, request_id, header, request))
        timer = self._loop.call_later(timeout_s, _time_out, future)
        try:
            return await future
        except (TimeoutError, asyncio.CancelledError):
            if not self._lost:
                self._write(encode_frame(FrameType.CANCEL, request_id))
            raise
        finally:
            timer.cancel()
            self._pending.pop(request_id, None)

    def close(self, reason: str) -> None:
        self._fail(reason)
        if self._transport is not None:
            self._transport.close()

    def _write(self, buffers: list[Buffer]) -> None:
        if not self._unwritten:
            self._loop.call_soon(self._flush)
        self._unwritten += buffers

    def _flush(self) -> None:
        buffers, self._unwritten = self._unwritten, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(buffers)

    def _fail(self, reason: str) -> None:
        if self._lost:
            return
        self._lost = reason
        for future in self._pending.values():
            if not future.done():
                future.set_exception(ConnectionResetError(reason))
        if not self.ready.done():
            self.ready.set_exception(LaneUnusable(reason))

    # -- asyncio.BufferedProtocol: a Protocol would get 256 KiB of new memory at every read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        assert self._handshake is not None
        self._write(encode_frame(FrameType.HELLO, 0, self._handshake.hello()))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for frame in self._decoder.feed(bytes(self._received[:nbytes])):
                if self._handshake is not None:
                    self._authenticate(self._handshake, frame)
                elif frame.type is FrameType.NOTIFY:
                    # The listener drains: what is in flight is still answered.
                    self._lost = self._lost or "the coordinator is shutting down"
                else:
                    future = self._pending.get(frame.request_id)
                    if future is not None and not future.done():
                        future.set_result(frame)
        except (FrameError, HandshakeRefused) as error:
            self.close(f"the coordinator broke the protocol: {error}")

    def _authenticate(self, handshake: CallerHandshake, frame: Frame) -> None:
        answer = handshake.receive(frame)
        if answer is not None:
            self._write(encode_frame(FrameType.HELLO, 0, answer))
        if handshake.done:
            self._handshake = None
            self._decoder.frame_bytes_max = FRAME_BYTES_MAX
            if not self.ready.done():
                self.ready.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        draining, self._lost = self._lost, ""
        self._fail(str(exc) if exc else draining or "the coordinator closed it")


def _time_out(future: "asyncio.Future[Frame]") -> None:
    if not future.done():
        future.set_exception(TimeoutError())
