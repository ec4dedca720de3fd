"""The synchronous transport: sends calls, retries them, drives upload streams."""

import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from shoal.bulk import ENDED_EARLY, STALLED, STREAM_CLOSE_S, BulkUpload, Upload
from shoal.calls import Call, Reply
from shoal.errors import InvalidRequest, ShoalError
from shoal.lanes import BlockingLanes
from shoal.loading import IN_FLIGHT, Load, LoadResult
from shoal.retry import Attempts, GiveUp, Retries, RetryPolicy
from shoal.rpc import (
    CHANNEL_OPTIONS,
    CLOSED,
    Addresses,
    Stubs,
    TransportName,
    checked_timeout_s,
    checked_transport,
    error_of,
    error_of_lost_call,
    make_stubs,
    parsed,
    serialised,
)
from shoal.streams import RangeStream
from shoal_protos.v1 import lanes_pb2, points_pb2
from shoal_protos.v1.search_pb2 import SearchRangeResponse


class Connection:
    """Ways to the coordinators, one in use at a time, and the loop that retries over them.

    Safe to use from several threads.
    """

    def __init__(
        self,
        address: str | Iterable[str],
        *,
        timeout_s: float,
        retries: RetryPolicy,
        transport: TransportName = "auto",
    ) -> None:
        self._addresses = Addresses(address)
        self._timeout_s = checked_timeout_s(timeout_s)
        self._retries = Retries(retries)
        self._lock = threading.Lock()
        self._transport = checked_transport(transport)
        self._routes: dict[str, _Route] = {}
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; calls in flight fail. Closing twice is no error."""
        with self._lock:
            self._closed = True
            routes, self._routes = self._routes, {}
        for route in routes.values():
            if route.lanes is not None:
                route.lanes.close()
            route.stubs.channel.close()

    def _route(self) -> "_Route":
        address = self._addresses.current
        with self._lock:
            if self._closed:
                raise InvalidRequest(CLOSED)
            route = self._routes.get(address)
            if route is None:
                stubs = make_stubs(grpc.insecure_channel(address, options=CHANNEL_OPTIONS))
                lanes = None
                if self._transport == "auto":
                    lanes = BlockingLanes(address, functools.partial(_ask, stubs))
                route = self._routes[address] = _Route(address, stubs, lanes)
            return route

    def run(self, call: Call[Reply], timeout_s: float | None) -> Reply:
        """Returns the call's decoded reply; timeout_s None means the client's.

        Raises: ShoalError when the call failed for good.
        """
        attempts = self._attempts(call, timeout_s)
        while True:
            route = self._route()
            try:
                response = route.ask(call, attempts.timeout_s(time.monotonic()))
            except ShoalError as error:
                verdict = attempts.failed(error, time.monotonic())
                if isinstance(verdict, GiveUp):
                    raise call.ended(verdict.error) from error.__cause__
                if attempts.maybe_applied:
                    call.note_maybe_applied()
                if self._closed:
                    raise call.ended(error) from error.__cause__
                if verdict.elsewhere:
                    self._addresses.leave(route.address)
                time.sleep(verdict.wait_s)
            else:
                return call.decode(response)

    def load(self, load: Load, timeout_s: float | None) -> LoadResult:
        """Stages what is not staged yet, two chunks at a time, and commits.

        Raises: ShoalError saying how to go on.
        """
        try:
            self.run(load.describe(), timeout_s)
            if not load.is_decided:
                self.stage(load, timeout_s)
            while not self.run(load.commit(), timeout_s):
                pass
        except ShoalError as error:
            raise load.told(error) from error.__cause__
        return load.result

    def stage(self, load: Load, timeout_s: float | None) -> None:
        """Sends the chunks of a load that are not staged yet."""
        turns = threading.Semaphore(IN_FLIGHT)
        failed = threading.Event()

        def send(call: Call[None]) -> None:
            try:
                self.run(call, timeout_s)
            except BaseException:
                failed.set()
                raise
            finally:
                turns.release()

        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="shoal-load") as threads:
            sent: deque[Future[None]] = deque()
            for call in load.stages():
                turns.acquire()
                if failed.is_set():
                    break
                sent.append(threads.submit(send, call))
                while sent[0].done() and len(sent) > 1:
                    sent.popleft().result()
            for future in sent:
                future.result()

    def stream(self, work: RangeStream, timeout_s: float | None) -> Iterator[SearchRangeResponse]:
        """Yields the messages of a range search; a stream that is lost goes on behind the last.

        timeout_s bounds the wait for each message, not what the caller does with it.
        Raises: ShoalError when the search failed for good.
        """
        attempts = self._attempts(None, timeout_s)
        while True:
            route = self._route()
            messages = route.stubs.search_range(
                work.request, timeout=attempts.timeout_s(time.monotonic())
            )
            try:
                for message in messages:
                    ended = work.received(message)
                    yield message
                    if ended:
                        return
                    attempts = self._attempts(None, timeout_s)
                error = error_of_lost_call(ENDED_EARLY, is_write=False)
                cause = None
            except grpc.RpcError as failure:
                error = error_of(failure, is_write=False, address=route.address)
                cause = failure
            finally:
                messages.cancel()
            verdict = attempts.failed(error, time.monotonic())
            if isinstance(verdict, GiveUp):
                raise verdict.error from cause
            if self._closed:
                raise error from cause
            if verdict.elsewhere:
                self._addresses.leave(route.address)
            time.sleep(verdict.wait_s)

    def _attempts(self, call: Call[Any] | None, timeout_s: float | None) -> Attempts:
        """call: None for a stream, which reads."""
        return self._retries.attempts(
            is_write=call is not None and call.is_write,
            deadline_s=time.monotonic() + self._allowed_s(timeout_s),
            maybe_applied=call is not None and call.maybe_applied,
        )

    def _allowed_s(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else checked_timeout_s(timeout_s)

    def upload(self, work: Upload, *, in_flight: int, timeout_s: float | None) -> int:
        """Returns how many rows were acknowledged: all of them.

        Raises: ShoalError saying how far the upload came.
        """
        upload = BulkUpload(
            work,
            in_flight=in_flight,
            timeout_s=self._allowed_s(timeout_s),
            retries=self._retries,
        )
        while not upload.is_done:
            route = self._route()
            lost = self._upload_on_stream(upload, route)
            if lost is not None:
                self._addresses.leave(route.address)
                upload.stream_lost(lost, time.monotonic())
                # A refused connection comes back at once; the chunks know when they are due.
                time.sleep(upload.wait_s(time.monotonic()))
        return upload.rows_done

    def _upload_on_stream(self, upload: BulkUpload, route: "_Route") -> ShoalError | None:
        """Drives the upload over one stream; returns why the stream was lost, None when done."""
        chunks: queue.SimpleQueue[points_pb2.UpsertStreamRequest | None] = queue.SimpleQueue()
        replies: queue.SimpleQueue[points_pb2.UpsertStreamResponse | grpc.RpcError | None] = (
            queue.SimpleQueue()
        )
        first = upload.next_chunk(time.monotonic())
        if first is None:
            return None
        chunks.put(first)
        stream = route.stubs.upsert_stream(iter(chunks.get, None))
        reader = threading.Thread(
            target=_read_stream, args=(stream, replies), name="shoal-upload", daemon=True
        )
        reader.start()
        try:
            while not upload.is_done:
                while (chunk := upload.next_chunk(time.monotonic())) is not None:
                    chunks.put(chunk)
                if upload.is_done:
                    break
                try:
                    reply = replies.get(timeout=upload.wait_s(time.monotonic()))
                except queue.Empty:
                    if upload.is_stalled(time.monotonic()):
                        return error_of_lost_call(STALLED, is_write=True)
                    continue
                if reply is None:
                    return error_of_lost_call(ENDED_EARLY, is_write=True)
                if isinstance(reply, grpc.RpcError):
                    return error_of(reply, is_write=True, address=route.address)
                upload.replied(reply, time.monotonic())
            chunks.put(None)
            reader.join(STREAM_CLOSE_S)
            return None
        finally:
            chunks.put(None)
            stream.cancel()
            reader.join(STREAM_CLOSE_S)


@dataclass(frozen=True, slots=True)
class _Route:
    """The ways to one coordinator. lanes: None when only gRPC may be used."""

    address: str
    stubs: Stubs
    lanes: BlockingLanes | None

    def ask(self, call: Call[Any], timeout_s: float) -> Message:
        """Sends a call over a lane if there is one, else over gRPC.

        Raises: ShoalError; its cause is what gRPC or the socket raised, if either did.
        """
        if self.lanes is not None:
            began_s = time.monotonic()
            reply = self.lanes.call(
                call.method.value,
                serialised(call.request),
                timeout_s,
                is_write=call.is_write,
            )
            if reply is not None:
                return parsed(call.method, reply)
            timeout_s -= time.monotonic() - began_s
        try:
            response: Message = self.stubs.unary[call.method](call.request, timeout=timeout_s)
        except grpc.RpcError as failure:
            raise error_of(failure, is_write=call.is_write, address=self.address) from failure
        return response


def _ask(stubs: Stubs, timeout_s: float) -> lanes_pb2.ConnectResponse:
    response: lanes_pb2.ConnectResponse = stubs.connect(
        lanes_pb2.ConnectRequest(), timeout=timeout_s
    )
    return response


def _read_stream(stream: Any, replies: "queue.SimpleQueue[Any]") -> None:
    """Moves what arrives into `replies`; the end of the stream arrives as None or as its error."""
    try:
        for reply in stream:
            replies.put(reply)
        replies.put(None)
    except grpc.RpcError as failure:
        replies.put(failure)
