"""The coordinator's part of a bulk load: one decision for all shards, and nobody before it."""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.domain.errors import Conflict, InvalidRequest, Outcome, Unavailable
from shoal_cluster.domain.ids import CollectionId, Epoch, Seq, ServerId, ShardNumber
from shoal_cluster.domain.keys import LoadKeys
from shoal_cluster.domain.limits import LOAD_CHUNK_ROWS_MAX
from shoal_cluster.domain.partition import shard_of_id
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.shard_caller import Body
from shoal_cluster.domain.topology import CollectionPlace, ShardPlace, Topology
from shoal_cluster.ingest.loads import ChunkRequest, Loader
from shoal_cluster.shard.load_objects import read_decision, read_rows
from shoal_cluster.shard.loading_calls import LoadCall, LoadReply, LoadStep
from tests.unit.shard.nodes import LoopClock, SeededIds, run

SCHEMA = CollectionSchema(
    id=CollectionId("d" * 32),
    name="docs",
    dimension=2,
    metric=Metric.COSINE,
    attributes={},
    shards=2,
    recall_target=0.95,
)
SERVERS = (ServerId("s0"), ServerId("s1"))


class Primaries:
    """Two shards that prepare and commit as they are told; what they were asked is kept.

    slow: shards that are not prepared yet. down: shards that do not answer.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[LoadStep, int]] = []
        self.slow: set[int] = set()
        self.down: set[int] = set()
        self.epoch = Epoch(4)
        self.committed: dict[int, Mapping[ShardNumber, Epoch]] = {}

    def loader(self, seed: int = 1) -> Loader:
        return Loader(
            store=lambda: MemoryStore(self.objects),
            caller=self,
            topology=self,
            clock=LoopClock(),
            ids=SeededIds(seed),
        )

    def current(self) -> Topology:
        shards = tuple(
            ShardPlace(
                shard=ShardNumber(number), primary=server, epoch=Epoch(1), replicas=(server,)
            )
            for number, server in enumerate(SERVERS)
        )
        place = CollectionPlace(schema=SCHEMA, shards=shards)
        return Topology(version=1, cluster_uuid=bytes(16), collections={SCHEMA.name: place})

    async def newer_than(self, version: int, timeout_s: float) -> Topology:
        await asyncio.sleep(timeout_s)
        return self.current()

    async def call(
        self,
        server: ServerId,
        method: str,
        header: Any,
        body: Body = b"",
        *,
        timeout_s: float,
        on_lost: Outcome,
    ) -> tuple[Any, memoryview]:
        call = LoadCall.from_wire(header)
        assert server == SERVERS[call.shard]
        if call.shard in self.down:
            raise Unavailable("nobody there")
        self.asked.append((call.step, call.shard))
        reply = LoadReply(segments_total=1)
        if call.step is LoadStep.PREPARE and call.shard not in self.slow:
            reply = LoadReply(segments_done=1, segments_total=1, prepared=self.epoch)
        if call.step is LoadStep.COMMIT:
            keys = LoadKeys(SCHEMA.id, call.shard, call.load)
            decision = await read_decision(MemoryStore(self.objects), keys)
            assert decision is not None and decision.commit, "nobody commits before the decision"
            self.committed[call.shard] = decision.epochs
            reply = LoadReply(committed=True, position=Position(Epoch(4), Seq(9)))
        return reply.to_wire(), memoryview(b"")


def chunk(name: str = "0-0", ids: tuple[str, ...] = tuple("abcdefgh")) -> ChunkRequest:
    vectors = np.array([[3.0, number + 1] for number in range(len(ids))], dtype=np.float32)
    return ChunkRequest(
        collection="docs", load="l1", chunk=name, digest=5, ids=ids, vectors=vectors
    )


def test_rows_are_staged_as_they_are_stored_each_in_the_shard_of_its_id():
    async def scenario() -> None:
        primaries = Primaries()
        await primaries.loader().stage(chunk())
        store = MemoryStore(primaries.objects)
        found = {}
        for number in (0, 1):
            rows = await read_rows(store, LoadKeys(SCHEMA.id, ShardNumber(number), "l1"), "0-0")
            assert np.allclose(np.linalg.norm(rows.vectors, axis=1), 1)
            found |= {point_id.decode(): number for point_id in rows.ids}
        assert found == {each: shard_of_id(each, 2) for each in "abcdefgh"}
        status = await primaries.loader().status("docs", "l1")
        assert (status.chunks, status.decided) == ({"0-0": 5}, None)

    run(scenario())


def test_no_shard_is_asked_to_commit_before_every_one_is_prepared():
    async def scenario() -> None:
        primaries = Primaries()
        loader = primaries.loader()
        await loader.stage(chunk())
        primaries.slow = {1}
        progress = await loader.commit("docs", "l1", ["0-0"], timeout_s=1)
        assert not progress.committed
        assert (progress.segments_done, progress.segments_total) == (1, 2)
        assert {step for step, _ in primaries.asked} == {LoadStep.PREPARE}
        primaries.slow = set()
        progress = await loader.commit("docs", "l1", ["0-0"], timeout_s=1)
        assert progress.committed and progress.rows == 8
        assert progress.token == {0: (4, 9), 1: (4, 9)}

    run(scenario())


def test_a_load_that_is_committed_in_one_shard_will_be_in_all_and_cannot_be_aborted():
    """The second shard is down after the decision; then another epoch leads there."""

    async def scenario() -> None:
        primaries = Primaries()
        loader = primaries.loader()
        await loader.stage(chunk())
        call = primaries.call

        async def down_after_prepare(server: ServerId, method: str, header: Any, **rest: Any):
            answer = await call(server, method, header, **rest)
            if all((LoadStep.PREPARE, number) in primaries.asked for number in (0, 1)):
                primaries.down = {1}
            return answer

        primaries.call = down_after_prepare  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="shard 1"):
            await loader.commit("docs", "l1", ["0-0"], timeout_s=1)
        assert list(primaries.committed) == [0]
        with pytest.raises(Conflict, match="decided"):
            await loader.abort("docs", "l1")
        primaries.call = call  # type: ignore[method-assign]
        primaries.down, primaries.epoch = set(), Epoch(7)
        assert (await primaries.loader(2).status("docs", "l1")).decided is True
        assert (await primaries.loader(2).commit("docs", "l1", [], timeout_s=1)).rows == 8
        assert primaries.committed[1] == {0: 4, 1: 4}, "what was decided, not what leads now"

    run(scenario())


def test_an_aborted_load_stays_aborted():
    async def scenario() -> None:
        primaries = Primaries()
        loader = primaries.loader()
        await loader.stage(chunk())
        await loader.abort("docs", "l1")
        await loader.abort("docs", "l1")
        with pytest.raises(Conflict, match="was aborted"):
            await loader.commit("docs", "l1", ["0-0"], timeout_s=1)
        assert primaries.committed == {}

    run(scenario())


def test_bad_chunks_are_refused_by_name():
    async def scenario() -> None:
        loader = Primaries().loader()
        many = tuple(map(str, range(LOAD_CHUNK_ROWS_MAX + 1)))
        for bad, field in (
            (chunk(ids=many), "points"),
            (chunk(ids=("a", "a")), "points[1].id"),
            (chunk(name="a/b"), "chunk"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await loader.stage(bad)
            assert caught.value.field == field
        for chunks in ([], ["0-0", "0-0"]):
            with pytest.raises(InvalidRequest) as caught:
                await loader.commit("docs", "l1", chunks, timeout_s=1)
            assert caught.value.field == "chunks"

    run(scenario())
