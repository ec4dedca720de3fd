"""Fast lanes: the API's calls over links instead of gRPC (docs/design/fast-lane.md).

A lane is never needed: whatever keeps one from being opened, `call` returns None and the caller
goes by gRPC. Only a request that was written and not answered is an error here, because then the
caller must know that a write may have been applied.

This module has what both transports share, and the blocking one: each call has a connection for
itself while it lasts, so the thread that asked is the one that is woken, and no other.
"""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.errors import KINDS, Internal, ShoalError
from shoal.rpc import error_of_lost_call, known_of
from shoal_protos.frames import (
    FRAME_BYTES_MAX,
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
from shoal_protos.lanes import TOO_LARGE
from shoal_protos.v1 import lanes_pb2

OPEN_S: Final = 0.5
"""For asking where lanes are and opening one; then gRPC carries on without."""

RETRY_S_MIN: Final = 0.5
RETRY_S_MAX: Final = 30.0
"""Before lanes are tried again after a failure; doubles. A blocked port costs OPEN_S each time."""

LANES_MAX: Final = 32
"""Connections of one blocking client: more threads than that go by gRPC."""

IDLE_UNCHECKED_S: Final = 0.05
"""A lane that was used so lately is used again without a look whether its peer has closed it, which
takes two system calls and an exception. If it has, the call is one that got no answer."""

TIMEOUT_SLACK_S: Final = 0.02
"""By so much a call may wait longer than asked, so that calls with the same timeout need not tell
the kernel each time."""

REQUEST_BYTES_MAX: Final = FRAME_BYTES_MAX - 1024
RECEIVE_BYTES: Final = 64 * 1024
"""Of one read. Memory of more than 128 KiB is mapped and unmapped each time, which took 17 of the
23 us of processor time that an echo over a Unix socket costs."""

Ask = Callable[[float], lanes_pb2.ConnectResponse]
"""Asks a coordinator over gRPC for a ticket, within so many seconds; raises what gRPC does."""


class LaneUnusable(Exception):
    """No lane can be opened, or this one broke before the request was written."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Where and with what a lane is opened. until_s: monotonic, when the ticket expires."""

    socket_path: str
    host: str
    port: int
    ticket: str
    secret: bytes
    until_s: float


def offer_of(response: lanes_pb2.ConnectResponse, grpc_address: str, now_s: float) -> Offer:
    return Offer(
        socket_path=response.socket_path,
        host=host_of(grpc_address),
        port=response.port,
        ticket=response.ticket,
        secret=response.secret,
        until_s=now_s + response.lifetime_ms / 1000,
    )


def host_of(grpc_address: str) -> str:
    """Returns the host of a gRPC target like `host:port`, "" of a target of another kind."""
    host, _, port = grpc_address.rpartition(":")
    host = host.removeprefix("dns:").removeprefix("ipv4:").removeprefix("///")
    if not port.isdigit() or "/" in host:
        return ""
    return host.removeprefix("[").removesuffix("]")


class Pause:
    """When lanes may be tried next: doubling after each failure, at once after a success."""

    def __init__(self) -> None:
        self._wait_s = RETRY_S_MIN
        self._until_s = 0.0

    def over(self, now_s: float) -> bool:
        return now_s >= self._until_s

    def failed(self, now_s: float) -> None:
        self._until_s = now_s + self._wait_s
        self._wait_s = min(2 * self._wait_s, RETRY_S_MAX)

    def succeeded(self) -> None:
        self._wait_s = RETRY_S_MIN


def error_of_frame(header: object) -> ShoalError:
    """Rebuilds the error that an ERROR frame carries."""
    if not isinstance(header, dict):
        return Internal(
            f"the server sent an error that cannot be read: {header!r:.200}",
            outcome="maybe_applied",
        )
    applied = header.get("outcome")
    return KINDS.get(str(header.get("kind")), Internal)(
        str(header.get("message", "")),
        outcome="not_applied" if applied == "not_applied" else "maybe_applied",
        field=header.get("field"),
        limit=header.get("limit"),
        retry_after_ms=header.get("retry_after_ms"),
    )


def reply_of(frame: Frame, *, is_write: bool) -> memoryview | None:
    """Returns the serialised response; None when it must be asked for over gRPC.

    Raises: the ShoalError that the server answered with.
    """
    if frame.type is FrameType.ERROR:
        raise known_of(error_of_frame(frame.header), is_write=is_write)
    if frame.header == TOO_LARGE:
        return None
    return frame.body


class BlockingLanes:
    """The lanes to one coordinator. Safe to use from several threads."""

    def __init__(self, grpc_address: str, ask: Ask) -> None:
        self._address = grpc_address
        self._ask = ask
        self._lock = threading.Lock()
        self._idle: list[BlockingLane] = []
        self._open = 0
        self._pause = Pause()
        self._offer: Offer | None = None
        self._closed = False

    def call(
        self, path: str, request: bytes, timeout_s: float, *, is_write: bool
    ) -> memoryview | None:
        """Returns the serialised response, or None: ask over gRPC instead, nothing was applied.

        Raises: what the server answered; Unavailable for a read, and Indeterminate for a write,
        that was written to a lane and not answered in time.
        """
        if len(request) > REQUEST_BYTES_MAX:
            return None
        now_s = time.monotonic()
        deadline_s = now_s + timeout_s
        lane = self._take(timeout_s, now_s)
        if lane is None:
            return None
        sound = False
        try:
            reply = lane.call(path, request, deadline_s)
            sound = True
        except LaneUnusable:
            return None
        except TimeoutError as error:
            reason = f"no answer from {self._address} over a lane in time"
            raise error_of_lost_call(reason, is_write=is_write) from error
        except (OSError, FrameError) as error:
            reason = f"the lane to {self._address} broke: {error or type(error).__name__}"
            raise error_of_lost_call(reason, is_write=is_write) from error
        finally:
            self._give_back(lane, sound)
        return reply_of(reply, is_write=is_write)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lanes, self._idle = self._idle, []
        for lane in lanes:
            lane.close()

    def _take(self, timeout_s: float, now_s: float) -> "BlockingLane | None":
        with self._lock:
            if self._closed:
                return None
            while self._idle:
                lane = self._idle.pop()
                if now_s - lane.used_s <= IDLE_UNCHECKED_S or lane.is_open():
                    return lane
                lane.close()
                self._open -= 1
            if self._open >= LANES_MAX or not self._pause.over(now_s):
                return None
            self._open += 1
        try:
            # A quarter: what is left must do for gRPC.
            lane = self._connect(min(OPEN_S, timeout_s / 4))
        except LaneUnusable:
            with self._lock:
                self._open -= 1
                self._offer = None
                self._pause.failed(time.monotonic())
            return None
        with self._lock:
            self._pause.succeeded()
        return lane

    def _connect(self, timeout_s: float) -> "BlockingLane":
        deadline_s = time.monotonic() + timeout_s
        offer = self._offer
        if offer is None or offer.until_s <= time.monotonic():
            try:
                offer = offer_of(self._ask(timeout_s), self._address, time.monotonic())
            except Exception as error:  # whatever gRPC raises: the call itself will show it
                raise LaneUnusable(str(error)) from error
            self._offer = offer
        return BlockingLane(_connected(offer, deadline_s), offer, deadline_s)

    def _give_back(self, lane: "BlockingLane", sound: bool) -> None:
        with self._lock:
            if sound and not self._closed:
                self._idle.append(lane)
                return
            self._open -= 1
        lane.close()


def _connected(offer: Offer, deadline_s: float) -> socket.socket:
    if offer.socket_path and os.path.exists(offer.socket_path):
        unix = socket.socket(socket.AF_UNIX)
        try:
            unix.settimeout(_left_s(deadline_s))
            unix.connect(offer.socket_path)
        except OSError:  # not ours to use, or left behind: the port may still do
            unix.close()
        else:
            return unix
    if not offer.port or not offer.host:
        raise LaneUnusable("no lane is offered")
    try:
        tcp = socket.create_connection((offer.host, offer.port), _left_s(deadline_s))
    except OSError as error:
        raise LaneUnusable(str(error)) from error
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return tcp


_WAIT_S_MIN: Final = 0.001


def _left_s(deadline_s: float) -> float:
    """Returns the seconds left, never 0: that would mean not to block at all."""
    return max(deadline_s - time.monotonic(), _WAIT_S_MIN)


class BlockingLane:
    """One authenticated connection; one call at a time. used_s: monotonic, when it last answered.

    The socket blocks, and the kernel holds its timeout: with Python's own timeouts each read and
    write is preceded by a poll.
    """

    def __init__(self, connected: socket.socket, offer: Offer, deadline_s: float) -> None:
        self.used_s = time.monotonic()
        self._socket = connected
        self._socket.settimeout(None)
        self._waits_s = 0.0
        self._decoder = FrameDecoder(frame_bytes_max=HANDSHAKE_BYTES_MAX)
        self._last_id = 0
        try:
            self._authenticate(offer, deadline_s)
        except (OSError, FrameError, HandshakeRefused) as error:
            self.close()
            raise LaneUnusable(str(error)) from error
        self._decoder.frame_bytes_max = FRAME_BYTES_MAX

    def call(self, path: str, request: bytes, deadline_s: float) -> Frame:
        """Returns the REPLY or ERROR frame.

        Raises: LaneUnusable when nothing was written; TimeoutError, OSError or FrameError when the
        request was: the lane must be closed then.
        """
        self._last_id = request_id = self._last_id + 1
        timeout_s = deadline_s - time.monotonic()
        if timeout_s <= 0:
            raise LaneUnusable("the deadline passed")
        header = (path, int(timeout_s * 1000) + 1, None)
        buffers = encode_frame(FrameType.REQUEST, request_id, header, request)
        try:
            self._wait_at_most(timeout_s)
            self._send(buffers, deadline_s)
        except OSError as error:  # not all of it was written, so it cannot have been read
            raise LaneUnusable(str(error)) from error
        while True:
            for frame in self._receive(deadline_s):
                if frame.request_id == request_id and frame.type in _ANSWERS:
                    return frame
                # NOTIFY: the listener drains; the next call finds the lane closed, or is refused.

    def is_open(self) -> bool:
        """Says whether the peer has neither closed the connection nor said anything unasked."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._socket.close()

    def _authenticate(self, offer: Offer, deadline_s: float) -> None:
        handshake = CallerHandshake(offer.secret, name=offer.ticket, nonce=os.urandom(NONCE_BYTES))
        hello = encode_frame(FrameType.HELLO, 0, handshake.hello())
        self._wait_at_most(_left_s(deadline_s))
        self._send(hello, deadline_s)
        while not handshake.done:
            for frame in self._receive(deadline_s):
                answer = handshake.receive(frame)
                if answer is not None:
                    self._send(encode_frame(FrameType.HELLO, 0, answer), deadline_s)

    def _send(self, buffers: Sequence[Buffer], deadline_s: float) -> None:
        for buffer in buffers:
            sent = self._socket.send(buffer)
            while sent < len(buffer):  # a peer that reads slowly may not stretch the deadline
                self._wait_at_most(_left_s(deadline_s))
                sent += self._socket.send(memoryview(buffer)[sent:])

    def _receive(self, deadline_s: float) -> list[Frame]:
        now_s = time.monotonic()
        self._wait_at_most(max(deadline_s - now_s, _WAIT_S_MIN))
        try:
            received = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError as error:
            raise TimeoutError("nothing came in time") from error
        if not received:
            raise ConnectionResetError("the coordinator closed it")
        self.used_s = now_s
        return self._decoder.feed(received)

    def _wait_at_most(self, timeout_s: float) -> None:
        """Has each read and write of the socket end after so long, within TIMEOUT_SLACK_S."""
        if timeout_s <= self._waits_s <= timeout_s + TIMEOUT_SLACK_S:
            return
        self._waits_s = timeout_s + TIMEOUT_SLACK_S / 2
        seconds = int(self._waits_s)
        value = _TIMEVAL.pack(seconds, int((self._waits_s - seconds) * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


_ANSWERS: Final = (FrameType.REPLY, FrameType.ERROR)
_TIMEVAL: Final = struct.Struct("@ll")
"""C's struct timeval, as Linux and macOS on 64-bit machines have it."""
