"""The Collections service: translates, delegates, translates back."""

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.edge.guard import Context, timeout_s
from shoal_cluster.edge.ports import CollectionControl
from shoal_cluster.edge.schema_codec import (
    decode_change,
    decode_request_name,
    decode_schema,
    encode_recall,
    encode_schema,
)
from shoal_protos.v1 import collections_pb2 as pb
from shoal_protos.v1.collections_pb2_grpc import CollectionsServicer

# The methods' names are those of the protocol.
# ruff: noqa: N802


class CollectionsService(CollectionsServicer):
    def __init__(self, control: CollectionControl) -> None:
        self._control = control

    async def CreateCollection(
        self, request: pb.CreateCollectionRequest, context: Context
    ) -> pb.CreateCollectionResponse:
        if not request.HasField("schema"):
            raise InvalidRequest("no schema is given", field="schema")
        schema = await self._control.create_collection(
            decode_schema(request.schema),
            decode_request_name(request.request_id),
            timeout_s=timeout_s(context),
        )
        return pb.CreateCollectionResponse(schema=encode_schema(schema))

    async def DescribeCollection(
        self, request: pb.DescribeCollectionRequest, context: Context
    ) -> pb.DescribeCollectionResponse:
        status = await self._control.describe_collection(request.name, timeout_s=timeout_s(context))
        return pb.DescribeCollectionResponse(
            schema=encode_schema(status.schema),
            rows_live=status.rows_live,
            recall=[encode_recall(estimate) for estimate in status.recall],
        )

    async def ListCollections(
        self, request: pb.ListCollectionsRequest, context: Context
    ) -> pb.ListCollectionsResponse:
        schemas = await self._control.list_collections(timeout_s=timeout_s(context))
        return pb.ListCollectionsResponse(
            schemas=[encode_schema(s) for s in sorted(schemas, key=lambda schema: schema.name)]
        )

    async def AlterCollection(
        self, request: pb.AlterCollectionRequest, context: Context
    ) -> pb.AlterCollectionResponse:
        schema = await self._control.alter_collection(
            decode_change(request),
            decode_request_name(request.request_id),
            timeout_s=timeout_s(context),
        )
        return pb.AlterCollectionResponse(schema=encode_schema(schema))

    async def DropCollection(
        self, request: pb.DropCollectionRequest, context: Context
    ) -> pb.DropCollectionResponse:
        await self._control.drop_collection(
            request.name, decode_request_name(request.request_id), timeout_s=timeout_s(context)
        )
        return pb.DropCollectionResponse()
