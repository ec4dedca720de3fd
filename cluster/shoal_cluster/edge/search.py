"""The Search service: translates, delegates, translates back. First and last step of a search."""

import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from shoal_cluster.domain.clock import Clock, SystemClock
from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.edge.admission import Admission
from shoal_cluster.edge.explain_codec import fill_explain, fill_stages
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
from shoal_cluster.edge.filter_codec import decode_filter
from shoal_cluster.edge.guard import TIMEOUT_DEFAULT_S, Context, timeout_s
from shoal_cluster.edge.ports import Exploring, Searching
from shoal_cluster.edge.rows_codec import decode_vectors, fill_rows, scores_of
from shoal_cluster.edge.schema_codec import decode_freshness, decode_model, fill_token, whole_ms
from shoal_cluster.edge.status import detail_of
from shoal_cluster.edge.stream_window import answer_in_window
from shoal_cluster.query.execute import MICROSECONDS, SearchResult
from shoal_cluster.query.plan import SearchRequest
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
        self._clock = clock or SystemClock()

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:  # noqa: N802
        return await self._search(request, timeout_s(context))

    async def SearchStream(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SearchStreamRequest], context: Context
    ) -> AsyncIterator[pb.SearchStreamResponse]:
        answer = functools.partial(self._search_of_stream, context=context)
        async for response in answer_in_window(request_iterator, answer, window=STREAM_WINDOW):
            yield response

    async def _search_of_stream(
        self, request: pb.SearchStreamRequest, context: Context
    ) -> pb.SearchStreamResponse:
        response = pb.SearchStreamResponse(tag=request.tag, window=STREAM_WINDOW)
        try:
            with self._admission.admit(len(request.search.vectors)):
                # The deadline of the RPC is that of the whole stream, not of a search.
                allowed_s = min(timeout_s(context), TIMEOUT_DEFAULT_S)
                response.found.CopyFrom(await self._search(request.search, allowed_s))
        except ShoalError as error:
            response.error.CopyFrom(detail_of(error))
        return response

    async def _search(self, request: pb.SearchRequest, allowed_s: float) -> pb.SearchResponse:
        started_s = self._clock.monotonic_s()
        decoded = decode_search(request)
        decoded_s = self._clock.monotonic_s()
        result = await self._searching.search(decoded, timeout_s=allowed_s)
        found_s = self._clock.monotonic_s()
        response = encode_result(result, with_payload=request.with_payload)
        if result.explain is not None:
            encoded_s = self._clock.monotonic_s()
            stages_us = {
                "decode": (decoded_s - started_s) * MICROSECONDS,
                **result.explain.stages_us,
                "encode": (encoded_s - found_s) * MICROSECONDS,
            }
            fill_stages(response.explain.stages, stages_us)
        return response

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


def decode_search(message: pb.SearchRequest) -> SearchRequest:
    """Returns the request; only its form is checked here, the rest by query/plan.py."""
    queries = None
    if message.vectors:
        queries = decode_vectors(message.vectors, message.dimension, field="vectors")
    return SearchRequest(
        collection=message.collection,
        k=message.k,
        queries=queries,
        ids=tuple(point_id.encode() for point_id in message.ids),
        filter=decode_filter(message.filter) if message.HasField("filter") else None,
        exact=message.exact,
        recall_target=message.recall_target if message.HasField("recall_target") else None,
        freshness=decode_freshness(message.consistency, message.session),
        with_payload=message.with_payload,
        with_vector=message.with_vector,
        explain=message.explain,
        model=decode_model(message.model) if message.HasField("model") else None,
    )


def encode_result(result: SearchResult, *, with_payload: bool) -> pb.SearchResponse:
    """Returns the answer as a message, without the stages of explain: this is one of them."""
    response = pb.SearchResponse(staleness_ms=whole_ms(result.staleness_ms))
    fill_token(response.as_of, result.schema, result.as_of)
    hits = result.hits
    scores = scores_of(hits.keys, result.schema.metric)
    start = 0
    for count in hits.counts:
        end = start + count
        of_query = response.results.add()
        of_query.scores.extend(scores[start:end])
        fill_rows(
            of_query.rows,
            result.schema,
            ids=hits.ids[start:end],
            seqs=hits.seqs[start:end],
            tails=None if hits.tails is None else hits.tails[start:end],
            vectors=None if hits.vectors is None else hits.vectors[start:end],
            with_payload=with_payload,
        )
        start = end
    if result.explain is not None:
        fill_explain(response.explain, result.explain)
    return response
