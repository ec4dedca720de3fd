"""The streamed upsert: acknowledgement per chunk, flow control, failures that do not end it."""

import asyncio

import grpc
import grpc.aio
import numpy as np
import pytest

from shoal_cluster.domain.errors import Conflict
from shoal_cluster.domain.ids import ServerId
from shoal_cluster.domain.schema import Metric
from shoal_cluster.edge.admission import Admission
from shoal_cluster.edge.points import STREAM_WINDOW
from shoal_protos.v1 import points_pb2 as pb
from shoal_protos.v1 import types_pb2
from shoal_protos.v1.points_pb2_grpc import PointsStub
from tests.unit.edge.loopback import Loopback, loopback, run
from tests.unit.query.fake_cluster import a_schema


def chunk(no: int, dimension: int = 4) -> pb.UpsertStreamRequest:
    return pb.UpsertStreamRequest(
        chunk_no=no,
        upsert=pb.UpsertRequest(
            collection="docs",
            request_id=types_pb2.RequestId(client_id="client", request_no=no),
            rows=types_pb2.Rows(
                ids=[f"p{no}"],
                vectors=np.ones(dimension, np.float32).tobytes(),
                dimension=dimension,
            ),
        ),
    )


def prepare(at: Loopback) -> None:
    at.cluster.add_collection(a_schema(metric=Metric.DOT), [["a"]])


async def until(condition: object) -> None:
    """Waits for an event of the loop; the test's own deadline ends it."""
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0.002)


def test_every_chunk_is_acknowledged_on_its_own_and_a_bad_one_ends_nothing() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            prepare(at)
            at.cluster.scripts[ServerId("a")] += [None, Conflict("no", field="points[0].if_seq")]
            stream = PointsStub(at.channel).UpsertStream()
            first = await stream.read()
            assert (first.chunk_no, first.window, first.WhichOneof("fate")) == (
                0,
                STREAM_WINDOW,
                None,
            )
            fates = {}
            for no, dimension in [(1, 4), (2, 4), (3, 5), (4, 4)]:
                await stream.write(chunk(no, dimension))
                response = await stream.read()
                fates[response.chunk_no] = response
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            assert list(fates[1].upserted.seqs) == [1]
            assert fates[2].error.kind == "conflict" and fates[2].error.field == "conditions[0]"
            assert fates[3].error.kind == "invalid_request"
            assert fates[3].error.field == "points[0].vector"
            assert list(fates[4].upserted.seqs) == [2]
            assert await stream.code() is grpc.StatusCode.OK

    run(scenario())


def test_no_more_chunks_are_worked_on_than_the_window() -> None:
    async def scenario() -> None:
        admission = Admission()
        async with loopback(admission) as at:
            prepare(at)
            release = asyncio.Event()

            class Slow:
                async def sleep(self, duration_s: float) -> None:
                    await release.wait()

                def monotonic_s(self) -> float:
                    return 0.0

            at.cluster.clock = Slow()
            at.cluster.scripts[ServerId("a")] += [1.0] * 100
            stream = PointsStub(at.channel).UpsertStream()
            await stream.read()
            for no in range(1, 3 * STREAM_WINDOW):
                await stream.write(chunk(no))
            await until(lambda: admission.requests >= STREAM_WINDOW)
            for _ in range(20):
                await asyncio.sleep(0.002)
            assert admission.requests == STREAM_WINDOW
            release.set()
            await stream.done_writing()
            acknowledged = set()
            while (response := await stream.read()) is not grpc.aio.EOF:
                assert response.WhichOneof("fate") == "upserted"
                acknowledged.add(response.chunk_no)
            assert acknowledged == set(range(1, 3 * STREAM_WINDOW))

    run(scenario())


def test_a_client_that_leaves_ends_its_chunks() -> None:
    async def scenario() -> None:
        admission = Admission()
        async with loopback(admission) as at:
            prepare(at)
            at.cluster.hanging.add(ServerId("a"))
            stream = PointsStub(at.channel).UpsertStream()
            await stream.read()
            await stream.write(chunk(1))
            await until(lambda: at.cluster.calls)
            assert admission.requests == 1
            stream.cancel()
            await until(lambda: not admission.requests)

    run(scenario())


def test_an_oversized_chunk_ends_the_stream_with_a_typed_error() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            prepare(at)
            stream = PointsStub(at.channel).UpsertStream()
            await stream.read()
            big = chunk(1)
            big.upsert.rows.vectors = bytes(33 * 1024 * 1024)
            await stream.write(big)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await stream.read() is not grpc.aio.EOF:
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(scenario())
