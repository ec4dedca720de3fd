"""The Loads service: translates, delegates to ingest/loads.py, translates back."""

from shoal_cluster.edge.guard import Context, timeout_s
from shoal_cluster.edge.ports import Loading
from shoal_cluster.edge.rows_codec import decode_attributes, decode_provenance, decode_vectors
from shoal_cluster.edge.schema_codec import decode_model, fill_token
from shoal_cluster.ingest.loads import ChunkRequest
from shoal_protos.v1 import loads_pb2 as pb
from shoal_protos.v1.loads_pb2_grpc import LoadsServicer

# The methods' names are those of the protocol.
# ruff: noqa: N802

PROGRESS_S_MAX = 10.0
"""How long a commit is waited for before the client hears how far it is."""


class LoadsService(LoadsServicer):
    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    async def StageChunk(
        self, request: pb.StageChunkRequest, context: Context
    ) -> pb.StageChunkResponse:
        rows = request.rows
        ids = list(rows.ids)
        await self._loading.stage(
            ChunkRequest(
                collection=request.collection,
                load=request.load_id,
                chunk=request.chunk,
                digest=request.digest,
                ids=ids,
                vectors=decode_vectors(rows.vectors, rows.dimension, field="rows.vectors"),
                attributes=decode_attributes(rows.attributes, len(ids)) if rows.attributes else (),
                payloads=rows.payloads,
                provenance=decode_provenance(rows.provenance) if rows.provenance else (),
                model=decode_model(request.model) if request.HasField("model") else None,
            )
        )
        return pb.StageChunkResponse()

    async def DescribeLoad(
        self, request: pb.DescribeLoadRequest, context: Context
    ) -> pb.DescribeLoadResponse:
        status = await self._loading.status(request.collection, request.load_id)
        return pb.DescribeLoadResponse(
            chunks=[
                pb.StagedChunk(name=name, digest=digest) for name, digest in status.chunks.items()
            ],
            committing=status.decided is True,
            aborted=status.decided is False,
        )

    async def CommitLoad(
        self, request: pb.CommitLoadRequest, context: Context
    ) -> pb.CommitLoadResponse:
        progress = await self._loading.commit(
            request.collection,
            request.load_id,
            list(request.chunks),
            timeout_s=min(timeout_s(context) / 2, PROGRESS_S_MAX),
        )
        response = pb.CommitLoadResponse(
            committed=progress.committed,
            rows=progress.rows,
            segments_done=progress.segments_done,
            segments_total=progress.segments_total,
        )
        fill_token(response.session, progress.schema, progress.token)
        return response

    async def AbortLoad(
        self, request: pb.AbortLoadRequest, context: Context
    ) -> pb.AbortLoadResponse:
        await self._loading.abort(request.collection, request.load_id)
        return pb.AbortLoadResponse()
