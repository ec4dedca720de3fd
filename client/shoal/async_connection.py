"""The asyncio transport: sends calls, retries them, drives upload streams."""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.message import Message

from shoal.async_lanes import AsyncLanes
from shoal.bulk import ENDED_EARLY, STALLED, STREAM_CLOSE_S, BulkUpload, Upload
from shoal.calls import Call, Reply
from shoal.errors import InvalidRequest, ShoalError
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


class AsyncConnection:
    """Ways to the coordinators, one in use at a time, and the loop that retries over them.

    For one event loop.
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
        self._transport = checked_transport(transport)
        self._routes: dict[str, _Route] = {}
        self._closed = False

    async def close(self) -> None:
        """Closes the connections; calls in flight fail. Closing twice is no error."""
        self._closed = True
        routes, self._routes = self._routes, {}
        for route in routes.values():
            if route.lanes is not None:
                await route.lanes.close()
            await route.stubs.channel.close()

    def _route(self) -> "_Route":
        address = self._addresses.current
        if self._closed:
            raise InvalidRequest(CLOSED)
        route = self._routes.get(address)
        if route is None:
            # Not earlier than the first call: a channel belongs to the loop that is running.
            stubs = make_stubs(grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS))
            lanes = None
            if self._transport == "auto":
                lanes = AsyncLanes(address, functools.partial(_ask, stubs))
            route = self._routes[address] = _Route(address, stubs, lanes)
        return route

    async def run(self, call: Call[Reply], timeout_s: float | None) -> Reply:
        """Returns the call's decoded reply; timeout_s None means the client's.

        Raises: ShoalError when the call failed for good.
        """
        attempts = self._attempts(call, timeout_s)
        while True:
            route = self._route()
            try:
                response = await route.ask(call, attempts.timeout_s(time.monotonic()))
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
                await asyncio.sleep(verdict.wait_s)
            except asyncio.CancelledError as cancelled:
                # Closing the channel cancels its calls; the caller's own task goes on.
                if not self._closed or _is_cancelling():
                    raise
                lost = error_of_lost_call(CLOSED, is_write=call.is_write)
                raise call.ended(lost) from cancelled
            else:
                return call.decode(response)

    async def load(self, load: Load, timeout_s: float | None) -> LoadResult:
        """Stages what is not staged yet, two chunks at a time, and commits.

        Raises: ShoalError saying how to go on.
        """
        try:
            await self.run(load.describe(), timeout_s)
            if not load.is_decided:
                await self._stage(load, timeout_s)
            while not await self.run(load.commit(), timeout_s):
                pass
        except ShoalError as error:
            raise load.told(error) from error.__cause__
        return load.result

    async def _stage(self, load: Load, timeout_s: float | None) -> None:
        sent: set[asyncio.Task[None]] = set()
        try:
            for call in load.stages():
                sent.add(asyncio.ensure_future(self.run(call, timeout_s)))
                if len(sent) >= IN_FLIGHT:
                    done, sent = await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
                    # All are looked at: two may have failed.
                    failed = [error for error in (task.exception() for task in done) if error]
                    if failed:
                        raise failed[0]
            if sent:
                await asyncio.gather(*sent)
        finally:
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)

    async def stream(
        self, work: RangeStream, timeout_s: float | None
    ) -> AsyncGenerator[SearchRangeResponse, None]:
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
            cause: BaseException | None = None
            try:
                async for message in messages:
                    ended = work.received(message)
                    yield message
                    if ended:
                        return
                    attempts = self._attempts(None, timeout_s)
                error = error_of_lost_call(ENDED_EARLY, is_write=False)
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure, is_write=False, address=route.address)
                cause = failure
            except asyncio.CancelledError as cancelled:
                # Closing the channel cancels its calls; the caller's own task goes on.
                if not self._closed or _is_cancelling():
                    raise
                raise error_of_lost_call(CLOSED, is_write=False) from cancelled
            finally:
                messages.cancel()
            verdict = attempts.failed(error, time.monotonic())
            if isinstance(verdict, GiveUp):
                raise verdict.error from cause
            if self._closed:
                raise error from cause
            if verdict.elsewhere:
                self._addresses.leave(route.address)
            await asyncio.sleep(verdict.wait_s)

    def _attempts(self, call: Call[Any] | None, timeout_s: float | None) -> Attempts:
        """call: None for a stream, which reads."""
        return self._retries.attempts(
            is_write=call is not None and call.is_write,
            deadline_s=time.monotonic() + self._allowed_s(timeout_s),
            maybe_applied=call is not None and call.maybe_applied,
        )

    def _allowed_s(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else checked_timeout_s(timeout_s)

    async def upload(self, work: Upload, *, in_flight: int, timeout_s: float | None) -> int:
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
            lost = await self._upload_on_stream(upload, route)
            if lost is not None:
                self._addresses.leave(route.address)
                upload.stream_lost(lost, time.monotonic())
                # A refused connection comes back at once; the chunks know when they are due.
                await asyncio.sleep(upload.wait_s(time.monotonic()))
        return upload.rows_done

    async def _upload_on_stream(self, upload: BulkUpload, route: "_Route") -> ShoalError | None:
        """Drives the upload over one stream; returns why the stream was lost, None when done."""
        chunks: asyncio.Queue[points_pb2.UpsertStreamRequest | None] = asyncio.Queue()
        replies: asyncio.Queue[points_pb2.UpsertStreamResponse | grpc.aio.AioRpcError | None] = (
            asyncio.Queue()
        )
        first = upload.next_chunk(time.monotonic())
        if first is None:
            return None
        chunks.put_nowait(first)
        stream = route.stubs.upsert_stream(_until_none(chunks))
        reader = asyncio.create_task(_read_stream(stream, replies), name="shoal-upload")
        try:
            while not upload.is_done:
                while (chunk := upload.next_chunk(time.monotonic())) is not None:
                    chunks.put_nowait(chunk)
                if upload.is_done:
                    break
                try:
                    # Not wait_for: Python 3.11's loses a cancellation that meets the reply.
                    async with asyncio.timeout(upload.wait_s(time.monotonic())):
                        reply = await replies.get()
                except TimeoutError:
                    if upload.is_stalled(time.monotonic()):
                        return error_of_lost_call(STALLED, is_write=True)
                    continue
                if reply is None:
                    return error_of_lost_call(ENDED_EARLY, is_write=True)
                if isinstance(reply, grpc.aio.AioRpcError):
                    return error_of(reply, is_write=True, address=route.address)
                upload.replied(reply, time.monotonic())
            chunks.put_nowait(None)
            await asyncio.wait([reader], timeout=STREAM_CLOSE_S)
            return None
        finally:
            chunks.put_nowait(None)
            stream.cancel()
            reader.cancel()


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _until_none(
    chunks: "asyncio.Queue[points_pb2.UpsertStreamRequest | None]",
) -> AsyncIterator[points_pb2.UpsertStreamRequest]:
    while (chunk := await chunks.get()) is not None:
        yield chunk


async def _read_stream(stream: Any, replies: "asyncio.Queue[Any]") -> None:
    """Moves what arrives into `replies`; the end of the stream arrives as None or as its error."""
    try:
        async for reply in stream:
            replies.put_nowait(reply)
        replies.put_nowait(None)
    except grpc.aio.AioRpcError as failure:
        replies.put_nowait(failure)


@dataclass(frozen=True, slots=True)
class _Route:
    """The ways to one coordinator. lanes: None when only gRPC may be used."""

    address: str
    stubs: Stubs
    lanes: AsyncLanes | None

    async def ask(self, call: Call[Any], timeout_s: float) -> Message:
        """Sends a call over a lane if there is one, else over gRPC.

        Raises: ShoalError; its cause is what gRPC or the socket raised, if either did.
        """
        if self.lanes is not None:
            began_s = time.monotonic()
            reply = await self.lanes.call(
                call.method.value,
                serialised(call.request),
                timeout_s,
                is_write=call.is_write,
            )
            if reply is not None:
                return parsed(call.method, reply)
            timeout_s -= time.monotonic() - began_s
        try:
            response: Message = await self.stubs.unary[call.method](call.request, timeout=timeout_s)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, is_write=call.is_write, address=self.address) from failure
        return response


async def _ask(stubs: Stubs, timeout_s: float) -> lanes_pb2.ConnectResponse:
    response: lanes_pb2.ConnectResponse = await stubs.connect(
        lanes_pb2.ConnectRequest(), timeout=timeout_s
    )
    return response
