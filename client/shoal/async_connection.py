"""The asyncio transport: sends calls, retries them, drives upload streams."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc.aio

from shoal.bulk import ENDED_EARLY, STALLED, STREAM_CLOSE_S, BulkUpload, Upload
from shoal.calls import Call, Reply
from shoal.errors import InvalidRequest, ShoalError
from shoal.retry import Attempts, GiveUp, Retries, RetryPolicy
from shoal.rpc import (
    CHANNEL_OPTIONS,
    CLOSED,
    Addresses,
    Lane,
    checked_timeout_s,
    error_of,
    error_of_lost_call,
    open_lane,
)
from shoal_protos.v1 import points_pb2


class AsyncConnection:
    """Channels to the coordinators, one in use at a time, and the loop that retries over them.

    For one event loop.
    """

    def __init__(
        self, address: str | Iterable[str], *, timeout_s: float, retries: RetryPolicy
    ) -> None:
        self._addresses = Addresses(address)
        self._timeout_s = checked_timeout_s(timeout_s)
        self._retries = Retries(retries)
        self._lanes: dict[str, Lane] = {}
        self._closed = False

    async def close(self) -> None:
        """Closes the connections; calls in flight fail. Closing twice is no error."""
        self._closed = True
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            await lane.channel.close()

    def _lane(self) -> Lane:
        address = self._addresses.current
        if self._closed:
            raise InvalidRequest(CLOSED)
        lane = self._lanes.get(address)
        if lane is None:
            # Not earlier than the first call: a channel belongs to the loop that is running.
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            lane = self._lanes[address] = open_lane(address, channel)
        return lane

    async def run(self, call: Call[Reply], timeout_s: float | None) -> Reply:
        """Returns the call's decoded reply; timeout_s None means the client's.

        Raises: ShoalError when the call failed for good.
        """
        attempts = self._attempts(call.is_write, timeout_s)
        while True:
            lane = self._lane()
            try:
                response = await lane.unary[call.method](
                    call.request, timeout=attempts.timeout_s(time.monotonic())
                )
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure, is_write=call.is_write, address=lane.address)
                verdict = attempts.failed(error, time.monotonic())
                if isinstance(verdict, GiveUp):
                    raise verdict.error from failure
                if self._closed:
                    raise error from failure
                if verdict.elsewhere:
                    self._addresses.leave(lane.address)
                await asyncio.sleep(verdict.wait_s)
            except asyncio.CancelledError as cancelled:
                # Closing the channel cancels its calls; the caller's own task goes on.
                if not self._closed or _is_cancelling():
                    raise
                raise error_of_lost_call(CLOSED, is_write=call.is_write) from cancelled
            else:
                return call.decode(response)

    def _attempts(self, is_write: bool, timeout_s: float | None) -> Attempts:
        deadline_s = time.monotonic() + self._allowed_s(timeout_s)
        return self._retries.attempts(is_write=is_write, deadline_s=deadline_s)

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
            lane = self._lane()
            lost = await self._upload_on_stream(upload, lane)
            if lost is not None:
                self._addresses.leave(lane.address)
                upload.stream_lost(lost, time.monotonic())
                # A refused connection comes back at once; the chunks know when they are due.
                await asyncio.sleep(upload.wait_s(time.monotonic()))
        return upload.rows_done

    async def _upload_on_stream(self, upload: BulkUpload, lane: Lane) -> ShoalError | None:
        """Drives the upload over one stream; returns why the stream was lost, None when done."""
        chunks: asyncio.Queue[points_pb2.UpsertStreamRequest | None] = asyncio.Queue()
        replies: asyncio.Queue[points_pb2.UpsertStreamResponse | grpc.aio.AioRpcError | None] = (
            asyncio.Queue()
        )
        first = upload.next_chunk(time.monotonic())
        if first is None:
            return None
        chunks.put_nowait(first)
        stream = lane.upsert_stream(_until_none(chunks))
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
                    return error_of(reply, is_write=True, address=lane.address)
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
