"""The Search service: translates, delegates, translates back. First and last step of a search."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Final

from shoal_cluster.domain.clock import Clock, SystemClock
from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.edge.admission import Admission
from shoal_cluster.edge.exploring import (
    decode_diverse,
    decode_groups,
    decode_range,
    decode_recommend,
    encode_diverse,
    encode_groups,
    encode_range,
    encode_recommended,
)
from shoal_cluster.edge.guard import TIMEOUT_DEFAULT_S, Context, timeout_s
from shoal_cluster.edge.ports import Exploring, Searching
from shoal_cluster.edge.search_decoder import AskedSearch, SearchDecoder
from shoal_cluster.edge.search_encoder import SearchEncoder
from shoal_cluster.edge.status import detail_of
from shoal_cluster.edge.stream_window import answer_in_window
from shoal_protos.v1 import search_pb2 as pb
from shoal_protos.v1.search_pb2_grpc import SearchServicer

STREAM_WINDOW: Final = 64
"""Searches of one stream worked on at a time: enough for the batches of two shards."""


class SearchService(SearchServicer):
    def __init__(
        self,
        searching: Searching,
        exploring: Exploring,
        admission: Admission,
        clock: Clock | None = None,
    ) -> None:
        self._searching = searching
        self._admission = admission
        self._exploring = exploring
        clock = clock or SystemClock()
        self.decoder = SearchDecoder(clock)
        self._encoder = SearchEncoder(clock)

    def Search(  # type: ignore[override]  # noqa: N802
        self, request: AskedSearch, context: Context
    ) -> Awaitable[bytes]:
        """Takes what `decoder` makes of a message, and answers with a serialised one."""
        return self._begin(request, timeout_s(context))

    async def SearchStream(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SearchStreamRequest], context: Context
    ) -> AsyncIterator[pb.SearchStreamResponse]:
        begin = functools.partial(self._begin_of_stream, context=context)
        answers = answer_in_window(request_iterator, begin, window=STREAM_WINDOW)
        async with contextlib.aclosing(answers):
            async for request, future in answers:
                response = pb.SearchStreamResponse(tag=request.tag, window=STREAM_WINDOW)
                try:
                    response.found.MergeFromString(future.result())
                except ShoalError as error:
                    response.error.CopyFrom(detail_of(error))
                yield response

    def _begin_of_stream(
        self, request: pb.SearchStreamRequest, context: Context
    ) -> "asyncio.Future[bytes]":
        size_bytes = len(request.search.vectors)
        try:
            self._admission.enter(size_bytes)
        except ShoalError as error:
            return _failed(error)
        try:
            # Serialised again, which is cheap, because the decoder remembers by bytes.
            asked = self.decoder.decode(request.search.SerializeToString())
            # The deadline of the RPC is that of the whole stream, not of a search.
            allowed_s = min(timeout_s(context), TIMEOUT_DEFAULT_S)
            future: asyncio.Future[bytes] = asyncio.ensure_future(self._begin(asked, allowed_s))
        except Exception as error:  # noqa: BLE001  it belongs to who takes the answer
            future = _failed(error)
        future.add_done_callback(lambda _: self._admission.leave(size_bytes))
        return future

    def _begin(self, asked: AskedSearch, allowed_s: float) -> Awaitable[bytes]:
        request = asked.template.request
        finish = self._encoder.finish_of(
            with_payload=request.with_payload, explain=request.explain, began_s=asked.began_s
        )
        return self._searching.begin(
            asked.template, asked.vectors, timeout_s=allowed_s, finish=finish
        )

    async def Recommend(  # noqa: N802
        self, request: pb.RecommendRequest, context: Context
    ) -> pb.RecommendResponse:
        result = await self._exploring.recommend(
            decode_recommend(request), timeout_s=timeout_s(context)
        )
        return encode_recommended(result, with_payload=request.with_payload)

    async def SearchDiverse(  # noqa: N802
        self, request: pb.SearchDiverseRequest, context: Context
    ) -> pb.SearchDiverseResponse:
        result = await self._exploring.search_diverse(
            decode_diverse(request), timeout_s=timeout_s(context)
        )
        return encode_diverse(result, with_payload=request.with_payload)

    async def SearchGroups(  # noqa: N802
        self, request: pb.SearchGroupsRequest, context: Context
    ) -> pb.SearchGroupsResponse:
        result = await self._exploring.search_groups(
            decode_groups(request), timeout_s=timeout_s(context)
        )
        return encode_groups(result, with_payload=request.with_payload)

    async def SearchRange(  # noqa: N802
        self, request: pb.SearchRangeRequest, context: Context
    ) -> AsyncGenerator[pb.SearchRangeResponse, None]:
        found = self._exploring.search_range(decode_range(request), timeout_s=timeout_s(context))
        async with contextlib.aclosing(found) as parts:
            async for part in parts:
                yield encode_range(part, with_payload=request.with_payload)


def _failed(error: Exception) -> "asyncio.Future[bytes]":
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
