"""Searches of a busy shard travel together, and each gets its own part of the answer."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.errors import InvalidRequest, Unavailable
from shoal_cluster.domain.ids import CollectionId, Epoch, Seq, ServerId, ShardNumber
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.domain.topology import Topology
from shoal_cluster.query.batching import BATCH_QUERIES_MAX, IN_FLIGHT_MAX, SearchBatches
from shoal_cluster.query.merge import hits_of
from shoal_cluster.query.replica_reads import ShardAnswer, ShardRead
from shoal_cluster.shard.calls import AsOf, ReadLevel, SearchCall, SearchReply

DIMENSION, K = 2, 3
TOPOLOGY = Topology(version=1, cluster_uuid=bytes(16))


def position(seq: int) -> Position:
    return Position(Epoch(1), Seq(seq))


class HeldReads:
    """Answers when told; a query's hits are named after its first value, fewer for odd ones."""

    def __init__(self) -> None:
        self.asked: list[tuple[SearchCall, list[float]]] = []
        self.held: list[asyncio.Future[None]] = []

    async def read(self, read: Any, topology: Topology, *, deadline_s: float) -> Any:
        call = SearchCall.from_wire(read.header)
        queries = np.frombuffer(read.body, np.float32).reshape(-1, DIMENSION)
        self.asked.append((call, queries[:, 0].tolist()))
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.held.append(held)
        await held
        counts = [K - int(value) % 2 for value in queries[:, 0]]
        names = [
            (value, rank)
            for value, count in zip(queries[:, 0], counts, strict=True)
            for rank in range(count)
        ]
        reply = SearchReply(
            counts=counts,
            ids=[f"{value:g}-{rank}".encode() for value, rank in names],
            keys=np.array([value + rank for value, rank in names], np.float32).tobytes(),
            seqs=[int(value) for value, _ in names],
            tails=[f"tail of {value:g}-{rank}".encode() for value, rank in names],
            as_of=AsOf(position=call.level.at_least, staleness_ms=0.0),
        )
        hits = hits_of(reply, memoryview(b""), dimension=DIMENSION, with_vector=False)
        return ShardAnswer((reply, hits), ServerId("a"), True, "held")

    async def answer(self, number: int, error: Exception | None = None) -> None:
        if error is None:
            self.held[number].set_result(None)
        else:
            self.held[number].set_exception(error)
        await turns()


async def turns() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def ask(batches: SearchBatches, *values: float, **changes: Any) -> "asyncio.Task[Any]":
    level = ReadLevel(
        consistency=changes.pop("consistency", Consistency.SESSION),
        at_least=position(changes.pop("at_least", 0)),
    )
    call = replace(
        SearchCall(collection=CollectionId("c" * 32), shard=ShardNumber(0), k=K, level=level),
        **changes,
    )
    queries = np.array([[value, 0] for value in values], np.float32)
    read: Any = ShardRead(
        collection="docs",
        collection_id=call.collection,
        shard=call.shard,
        method=SearchCall.METHOD,
        header=call.to_wire(),
        body=queries.data.cast("B"),
        parse=lambda header, body: (header, body),
        consistency=level.consistency,
        kind="search",
    )
    return asyncio.ensure_future(batches.read(read, call, len(values), TOPOLOGY, deadline_s=10.0))


def ids(task: "asyncio.Task[Any]") -> list[str]:
    return [point.decode() for point in task.result().reply[1].ids]


def expected(*values: float) -> list[str]:
    return [f"{value:g}-{rank}" for value in values for rank in range(K - int(value) % 2)]


def test_a_busy_shard_is_asked_for_all_that_wait_at_once() -> None:
    async def scenario() -> None:
        reads = HeldReads()
        batches = SearchBatches(reads)  # type: ignore[arg-type]
        first = [ask(batches, float(number)) for number in range(IN_FLIGHT_MAX)]
        await turns()
        assert [values for _, values in reads.asked] == [[0], [1]], "sent as they came"
        late = [
            ask(batches, 2, at_least=5),
            ask(batches, 3, 4, at_least=9),
            ask(batches, 5, at_least=7),
        ]
        await turns()
        assert len(reads.asked) == IN_FLIGHT_MAX
        await reads.answer(0)
        call, values = reads.asked[-1]
        assert values == [2, 3, 4, 5]
        assert call.level.at_least == position(9), "the newest that any of them needs"
        await reads.answer(2)
        await reads.answer(1)
        for task, asked in zip([*first, *late], [(0,), (1,), (2,), (3, 4), (5,)], strict=True):
            assert ids(task) == expected(*asked)
            hits = task.result().reply[1]
            assert hits.counts == [K - value % 2 for value in asked]
            assert hits.tails == [f"tail of {name}".encode() for name in expected(*asked)]
            assert len(hits.keys) == len(hits.seqs) == len(hits.ids)
        assert not batches._lines, "nothing is kept of a line that is empty"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "other",
    [
        {"k": K + 1},
        {"filter": ["=", "color", "red"]},
        {"exact": True},
        {"recall_target": 0.5},
        {"with_payload": True},
        {"shard": ShardNumber(1)},
        {"consistency": Consistency.STRONG},
        {"explain": True},
    ],
)
def test_searches_that_differ_do_not_wait_for_each_other(other: dict[str, Any]) -> None:
    async def scenario() -> None:
        reads = HeldReads()
        batches = SearchBatches(reads)  # type: ignore[arg-type]
        for number in range(IN_FLIGHT_MAX):
            ask(batches, float(number))
        await turns()
        different = ask(batches, 7, **other)
        await turns()
        assert reads.asked[-1][1] == [7]
        await reads.answer(IN_FLIGHT_MAX)
        assert ids(different) == expected(7)
        for number in range(IN_FLIGHT_MAX):
            await reads.answer(number)

    asyncio.run(scenario())


def test_a_batch_is_bounded_and_the_rest_follows() -> None:
    async def scenario() -> None:
        reads = HeldReads()
        batches = SearchBatches(reads)  # type: ignore[arg-type]
        tasks = [ask(batches, float(number)) for number in range(IN_FLIGHT_MAX)]
        await turns()
        half = range(BATCH_QUERIES_MAX // 2 + 1)
        tasks += [ask(batches, *map(float, half)) for _ in range(3)]
        await turns()
        for number in range(IN_FLIGHT_MAX + 3):
            await reads.answer(number)
        assert len(reads.asked) == IN_FLIGHT_MAX + 3
        assert all(task.done() and not task.exception() for task in tasks)

    asyncio.run(scenario())


def test_a_failed_batch_fails_each_of_its_searches_and_nothing_after() -> None:
    async def scenario() -> None:
        reads = HeldReads()
        batches = SearchBatches(reads)  # type: ignore[arg-type]
        for number in range(IN_FLIGHT_MAX):
            ask(batches, float(number))
        await turns()
        doomed = [ask(batches, 2), ask(batches, 3)]
        await turns()
        await reads.answer(0)
        await reads.answer(2, Unavailable("nobody answers"))
        for task in doomed:
            assert isinstance(task.exception(), Unavailable)
        after = ask(batches, 4)
        await turns()
        await reads.answer(3)
        await reads.answer(1)
        assert ids(after) == expected(4)

    asyncio.run(scenario())


def test_searches_that_are_too_much_together_are_asked_apart() -> None:
    async def scenario() -> None:
        reads = HeldReads()
        batches = SearchBatches(reads)  # type: ignore[arg-type]
        for number in range(IN_FLIGHT_MAX):
            ask(batches, float(number))
        await turns()
        small, large = ask(batches, 2), ask(batches, 3)
        await turns()
        await reads.answer(0)
        await reads.answer(2, InvalidRequest("too large for one answer"))
        assert [values for _, values in reads.asked[3:]] == [[2], [3]]
        await reads.answer(3)
        await reads.answer(4, InvalidRequest("too large by itself"))
        assert ids(small) == expected(2)
        assert str(large.exception()) == "too large by itself"
        await reads.answer(1)
        assert not batches._lines

    asyncio.run(scenario())


def test_a_search_that_was_given_up_is_not_sent() -> None:
    async def scenario() -> None:
        reads = HeldReads()
        batches = SearchBatches(reads)  # type: ignore[arg-type]
        for number in range(IN_FLIGHT_MAX):
            ask(batches, float(number))
        await turns()
        given_up, wanted = ask(batches, 2), ask(batches, 3)
        await turns()
        given_up.cancel()
        await turns()
        await reads.answer(0)
        assert reads.asked[-1][1] == [3]
        await reads.answer(2)
        await reads.answer(1)
        assert ids(wanted) == expected(3)
        assert not batches._lines

    asyncio.run(scenario())
