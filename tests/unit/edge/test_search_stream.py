"""Searches on one long-lived gRPC stream: answers by tag, errors of one search only, a window."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from shoal_cluster.edge.search import STREAM_WINDOW
from shoal_protos.v1 import search_pb2 as pb
from shoal_protos.v1.search_pb2_grpc import SearchStub
from tests.unit.edge.loopback import loopback, run
from tests.unit.edge.test_server import Scripted
from tests.unit.query.fake_cluster import a_schema


def request(tag: int, dimension: int = 4, **changes: Any) -> pb.SearchStreamRequest:
    vectors = np.ones(dimension, np.float32).tobytes()
    fields = {"collection": "docs", "vectors": vectors, "dimension": dimension, "k": 1, **changes}
    return pb.SearchStreamRequest(tag=tag, search=pb.SearchRequest(**fields))


def test_each_search_of_a_stream_is_answered_and_an_error_ends_only_its_own() -> None:
    async def scenario() -> None:
        async with loopback() as at:
            at.cluster.add_collection(a_schema(shards=2), [["a"], ["b"]])
            stream = SearchStub(at.channel).SearchStream()
            answers = {}
            asked = [
                request(7),
                request(8, dimension=5),
                request(9, collection="nowhere"),
                request(10),
            ]
            for each in asked:
                await stream.write(each)
            await stream.done_writing()
            async for answer in stream:
                assert answer.window == STREAM_WINDOW
                answers[answer.tag] = answer
            assert set(answers) == {7, 8, 9, 10}
            assert answers[7].WhichOneof("answer") == answers[10].WhichOneof("answer") == "found"
            assert len(answers[7].found.results) == 1
            assert (answers[8].error.kind, answers[8].error.field) == (
                "invalid_request",
                "vectors[0]",
            )
            assert answers[9].error.kind == "not_found"

    run(scenario())


def test_a_stream_works_on_a_window_of_searches_and_cancels_them_when_it_ends() -> None:
    class Counting(Scripted):
        working = most = 0

        async def begin(self, *arguments: Any, **options: Any) -> Any:
            self.working += 1
            self.most = max(self.most, self.working)
            if self.working == STREAM_WINDOW:
                full.set()
            try:
                await super().begin(*arguments, **options)
            finally:
                self.working -= 1
                if not self.working:
                    empty.set()

    full, empty = asyncio.Event(), asyncio.Event()

    async def scenario() -> None:
        counting = Counting()
        async with loopback(searching=counting) as at:

            async def requests() -> AsyncIterator[pb.SearchStreamRequest]:
                for tag in range(2 * STREAM_WINDOW):
                    yield request(tag)
                await asyncio.Event().wait()

            stream = SearchStub(at.channel).SearchStream(requests())
            reading = asyncio.ensure_future(stream.read())
            await asyncio.wait_for(full.wait(), 10)
            assert counting.most == STREAM_WINDOW
            stream.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await asyncio.wait_for(empty.wait(), 10)
            assert counting.most == STREAM_WINDOW

    run(scenario())


def test_a_bug_ends_the_stream_with_an_incident() -> None:
    async def scenario() -> None:
        async with loopback(searching=Scripted(ZeroDivisionError("secret"))) as at:
            stream = SearchStub(at.channel).SearchStream()
            await stream.write(request(1))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in (caught.value.details() or "")

    run(scenario())
