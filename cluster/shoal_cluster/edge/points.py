"""The Points service: translates, delegates, translates back. First and last step of a write."""

import contextlib
import functools
from collections.abc import AsyncIterator, Sequence

from shoal_cluster.domain.errors import InvalidRequest, ShoalError
from shoal_cluster.edge.admission import Admission
from shoal_cluster.edge.exploring import (
    SCROLL_LIMIT_DEFAULT,
    decode_facets,
    decode_scroll_ordered,
    encode_facets,
    encode_ordered_rows,
)
from shoal_cluster.edge.filter_codec import decode_filter
from shoal_cluster.edge.guard import TIMEOUT_DEFAULT_S, Context, timeout_s
from shoal_cluster.edge.ports import Exploring, RowReading, Writing
from shoal_cluster.edge.rows_codec import (
    decode_attributes,
    decode_provenance,
    decode_vectors,
    fill_rows,
)
from shoal_cluster.edge.schema_codec import (
    decode_freshness,
    decode_model,
    decode_request_name,
    fill_token,
    whole_ms,
)
from shoal_cluster.edge.status import detail_of
from shoal_cluster.edge.stream_window import answer_in_window
from shoal_cluster.ingest.execute import WriteResult
from shoal_cluster.ingest.validate import (
    DeleteRequest,
    DeleteWhereRequest,
    PatchRequest,
    UpsertRequest,
)
from shoal_cluster.query.rows import RowsResult
from shoal_protos.v1 import points_pb2 as pb
from shoal_protos.v1 import types_pb2
from shoal_protos.v1.points_pb2_grpc import PointsServicer

# The methods' names are those of the protocol.
# ruff: noqa: N802

STREAM_WINDOW = 8
"""Chunks of one stream worked on at a time: enough to fill the group commit of every shard, and
well below the 32 requests of one client that a shard remembers for retries."""


class PointsService(PointsServicer):
    def __init__(
        self, writing: Writing, reading: RowReading, exploring: Exploring, admission: Admission
    ) -> None:
        self._writing = writing
        self._reading = reading
        self._exploring = exploring
        self._admission = admission

    async def Upsert(self, request: pb.UpsertRequest, context: Context) -> pb.UpsertResponse:
        result = await self._writing.upsert(decode_upsert(request), timeout_s=timeout_s(context))
        return _encode_upserted(result)

    async def UpsertStream(
        self, request_iterator: AsyncIterator[pb.UpsertStreamRequest], context: Context
    ) -> AsyncIterator[pb.UpsertStreamResponse]:
        """Works on up to STREAM_WINDOW chunks at a time and acknowledges each when it is done."""
        yield pb.UpsertStreamResponse(window=STREAM_WINDOW)
        begin = functools.partial(self._upsert_chunk, context=context)
        answers = answer_in_window(request_iterator, begin, window=STREAM_WINDOW)
        async with contextlib.aclosing(answers):
            async for _, future in answers:
                yield future.result()

    async def _upsert_chunk(
        self, chunk: pb.UpsertStreamRequest, context: Context
    ) -> pb.UpsertStreamResponse:
        response = pb.UpsertStreamResponse(chunk_no=chunk.chunk_no, window=STREAM_WINDOW)
        try:
            with self._admission.admit(len(chunk.upsert.rows.vectors)):
                # The deadline of the RPC is that of the whole stream, not of a chunk.
                result = await self._writing.upsert(
                    decode_upsert(chunk.upsert),
                    timeout_s=min(timeout_s(context), TIMEOUT_DEFAULT_S),
                )
            response.upserted.CopyFrom(_encode_upserted(result))
        except ShoalError as error:
            response.error.CopyFrom(detail_of(error))
        return response

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        result = await self._reading.get(
            request.collection,
            [point_id.encode() for point_id in request.ids],
            with_vector=request.with_vector,
            freshness=decode_freshness(request.consistency, request.session),
            timeout_s=timeout_s(context),
        )
        response = pb.GetResponse(staleness_ms=whole_ms(result.staleness_ms))
        _fill(response.rows, response.as_of, result, with_payload=True)
        return response

    async def PatchAttributes(
        self, request: pb.PatchAttributesRequest, context: Context
    ) -> pb.PatchAttributesResponse:
        ids = list(request.ids)
        result = await self._writing.patch(
            PatchRequest(
                collection=request.collection,
                name=decode_request_name(request.request_id),
                again=request.request_id.again,
                ids=ids,
                attributes=decode_attributes(request.set, len(ids)),
                remove=list(request.remove),
            ),
            timeout_s=timeout_s(context),
        )
        response = pb.PatchAttributesResponse(missing_ids=result.missing)
        fill_token(response.session, result.schema, result.token)
        return response

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        result = await self._writing.delete(
            DeleteRequest(
                collection=request.collection,
                name=decode_request_name(request.request_id),
                again=request.request_id.again,
                ids=list(request.ids),
            ),
            timeout_s=timeout_s(context),
        )
        response = pb.DeleteResponse(deleted=result.affected)
        fill_token(response.session, result.schema, result.token)
        return response

    async def DeleteByFilter(
        self, request: pb.DeleteByFilterRequest, context: Context
    ) -> pb.DeleteByFilterResponse:
        if not request.HasField("filter"):
            raise InvalidRequest(
                "no filter is given; drop the collection to remove everything", field="filter"
            )
        result = await self._writing.delete_where(
            DeleteWhereRequest(
                collection=request.collection,
                name=decode_request_name(request.request_id),
                again=request.request_id.again,
                filter=decode_filter(request.filter),
            ),
            timeout_s=timeout_s(context),
        )
        response = pb.DeleteByFilterResponse(deleted=result.affected)
        fill_token(response.session, result.schema, result.token)
        return response

    async def Scroll(self, request: pb.ScrollRequest, context: Context) -> pb.ScrollResponse:
        result = await self._reading.scroll(
            request.collection,
            filter=decode_filter(request.filter) if request.HasField("filter") else None,
            limit=request.limit or SCROLL_LIMIT_DEFAULT,
            cursor=request.cursor,
            with_vector=request.with_vector,
            with_payload=request.with_payload,
            freshness=decode_freshness(request.consistency, request.session),
            timeout_s=timeout_s(context),
        )
        response = pb.ScrollResponse(
            next_cursor=result.next_cursor, staleness_ms=whole_ms(result.staleness_ms)
        )
        _fill(response.rows, response.as_of, result, with_payload=request.with_payload)
        return response

    async def Count(self, request: pb.CountRequest, context: Context) -> pb.CountResponse:
        result = await self._reading.count(
            request.collection,
            filter=decode_filter(request.filter) if request.HasField("filter") else None,
            freshness=decode_freshness(request.consistency, request.session),
            timeout_s=timeout_s(context),
        )
        response = pb.CountResponse(count=result.rows, staleness_ms=whole_ms(result.staleness_ms))
        fill_token(response.as_of, result.schema, result.as_of)
        return response

    async def Facets(self, request: pb.FacetsRequest, context: Context) -> pb.FacetsResponse:
        result = await self._exploring.facets(decode_facets(request), timeout_s=timeout_s(context))
        return encode_facets(result)

    async def ScrollOrdered(
        self, request: pb.ScrollOrderedRequest, context: Context
    ) -> pb.ScrollOrderedResponse:
        result = await self._exploring.scroll_ordered(
            decode_scroll_ordered(request), timeout_s=timeout_s(context)
        )
        return encode_ordered_rows(result, with_payload=request.with_payload)


def decode_upsert(message: pb.UpsertRequest) -> UpsertRequest:
    """Returns the request; only its form is checked here, the rest by ingest/validate.py."""
    rows = message.rows
    ids = list(rows.ids)
    if_absent, if_seqs = _decode_conditions(message.conditions, len(ids))
    return UpsertRequest(
        collection=message.collection,
        name=decode_request_name(message.request_id),
        again=message.request_id.again,
        ids=ids,
        vectors=decode_vectors(rows.vectors, rows.dimension, field="rows.vectors"),
        attributes=decode_attributes(rows.attributes, len(ids)) if rows.attributes else (),
        payloads=rows.payloads,
        provenance=decode_provenance(rows.provenance) if rows.provenance else (),
        if_absent=if_absent,
        if_seqs=if_seqs,
        model=decode_model(message.model) if message.HasField("model") else None,
    )


def _decode_conditions(
    conditions: Sequence[pb.UpsertCondition], count: int
) -> tuple[bool, list[int] | None]:
    """Returns (if_absent, if_seqs) for the whole batch.

    A shard judges a batch by one rule, so either every point has a condition or none has.
    """
    kinds = [condition.WhichOneof("condition") for condition in conditions]
    if not any(kinds):
        return False, None
    if len(kinds) != count:
        raise InvalidRequest(f"{len(kinds)} conditions for {count} points", field="conditions")
    for i, (kind, condition) in enumerate(zip(kinds, conditions, strict=True)):
        if kind is None:
            raise InvalidRequest(
                "the point has no condition, others of the batch have; send it in a batch of its "
                "own",
                field=f"conditions[{i}]",
            )
        if kind == "if_absent" and not condition.if_absent:
            raise InvalidRequest(
                "if_absent is false; leave the condition out", field=f"conditions[{i}].if_absent"
            )
    if all(kind == "if_absent" for kind in kinds):
        return True, None
    # 0 stands for: does not exist. Sequence numbers start at 1.
    return False, [condition.if_seq for condition in conditions]


def _encode_upserted(result: WriteResult) -> pb.UpsertResponse:
    response = pb.UpsertResponse(seqs=result.seqs)
    fill_token(response.session, result.schema, result.token)
    return response


def _fill(
    rows: types_pb2.Rows,
    as_of: types_pb2.SessionToken,
    result: RowsResult,
    *,
    with_payload: bool,
) -> None:
    fill_token(as_of, result.schema, result.as_of)
    fill_rows(
        rows,
        result.schema,
        ids=result.ids,
        seqs=result.seqs,
        tails=result.tails,
        vectors=result.vectors,
        with_payload=with_payload,
    )
