"""Searches of a busy shard travel together, and each gets its own part of the answer."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.errors import InvalidRequest, Unavailable
from shoal_cluster.domain.ids import Epoch, Seq, ServerId, ShardNumber
from shoal_cluster.domain.schema import AttributeType
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.domain.topology import CollectionPlace, Topology
from shoal_cluster.filtering.expression import Comparison, Operator
from shoal_cluster.query import batching
from shoal_cluster.query.batching import (
    BATCH_QUERIES_MAX,
    SearchBatches,
    Waiting,
)
from shoal_cluster.query.merge import hits_of
from shoal_cluster.query.plan import Freshness, SearchRequest
from shoal_cluster.query.prepared import prepare_search
from shoal_cluster.query.replica_reads import ShardAnswer
from shoal_cluster.shard.calls import AsOf, ReadLevel, SearchCall, SearchReply
from tests.unit.query.fake_cluster import a_schema

DIMENSION, K = 2, 3
IN_FLIGHT_MAX = 2
SCHEMA = replace(
    a_schema(shards=2, dimension=DIMENSION), attributes={"color": AttributeType.KEYWORD}
)
TOPOLOGY = Topology(
    version=1,
    cluster_uuid=bytes(16),
    collections={"docs": CollectionPlace(schema=SCHEMA, shards=())},
)


@pytest.fixture(autouse=True)
def two_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "IN_FLIGHT_MAX", IN_FLIGHT_MAX)


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


class Asking:
    """A search of one shard that ends with its answer."""

    topology = TOPOLOGY
    deadline_s = 10.0

    def __init__(self, batches: SearchBatches) -> None:
        self._batches = batches
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def done(self) -> bool:
        return self.future.done()

    def answered(self, number: int, answer: Any) -> None:
        assert number == 0
        self.future.set_result(answer)

    def failed(self, error: BaseException) -> None:
        self.future.set_exception(error)

    def give_up(self) -> None:
        self.future.cancel()
        self._batches.abandon()


def ask(batches: SearchBatches, *values: float, **changes: Any) -> "asyncio.Future[Any]":
    return asking(batches, *values, **changes).future


def asking(batches: SearchBatches, *values: float, **changes: Any) -> Asking:
    level = ReadLevel(
        consistency=changes.pop("consistency", Consistency.SESSION),
        at_least=position(changes.pop("at_least", 0)),
    )
    changes.setdefault("shard", ShardNumber(0))
    request = SearchRequest(
        collection="docs",
        k=changes.pop("k", K),
        freshness=Freshness(
            consistency=level.consistency, token={changes["shard"]: level.at_least}
        ),
        **{name: value for name, value in changes.items() if name != "shard"},
    )
    prepared = prepare_search(request, TOPOLOGY)
    read = prepared.reads[changes["shard"]]
    queries = np.array([[value, 0] for value in values], np.float32)
    asker = Asking(batches)
    batches.ask(Waiting(asker, 0, read, queries.data.cast("B"), len(values)))
    return asker


def ids(task: "asyncio.Future[Any]") -> list[str]:
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
        {"filter": Comparison("color", Operator.EQ, "red")},
        {"exact": True},
        {"recall_target": 0.5},
        {"max_cost_ms": 0.5},
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
        given_up, wanted = asking(batches, 2), ask(batches, 3)
        await turns()
        given_up.give_up()
        await turns()
        await reads.answer(0)
        assert reads.asked[-1][1] == [3]
        await reads.answer(2)
        await reads.answer(1)
        assert ids(wanted) == expected(3)
        assert not batches._lines

    asyncio.run(scenario())


def test_a_call_that_nobody_waits_for_any_more_is_ended() -> None:
    async def scenario() -> None:
        reads = HeldReads()
        batches = SearchBatches(reads)  # type: ignore[arg-type]
        alone = asking(batches, 0)
        others = [ask(batches, 1)]
        await turns()
        late = [asking(batches, 2), asking(batches, 3)]
        alone.give_up()
        await turns()
        assert reads.held[0].cancelled()
        assert reads.asked[-1][1] == [2, 3], "and its place is free"
        late[0].give_up()
        await turns()
        assert not reads.held[2].cancelled(), "one of the two still waits"
        late[1].give_up()
        await turns()
        assert reads.held[2].cancelled()
        await reads.answer(1)
        assert ids(others[0]) == expected(1)
        assert not batches._lines and not batches._running

    asyncio.run(scenario())


def test_a_call_that_is_given_up_before_it_began_frees_its_place() -> None:
    async def scenario() -> None:
        reads = HeldReads()
        batches = SearchBatches(reads)  # type: ignore[arg-type]
        for number in range(IN_FLIGHT_MAX):
            asking(batches, float(number)).give_up()
        await turns()
        assert reads.asked == [] and not batches._lines and not batches._running
        wanted = ask(batches, 7)
        await turns()
        await reads.answer(0)
        assert ids(wanted) == expected(7)

    asyncio.run(scenario())


def test_a_bug_between_search_and_shard_fails_the_search() -> None:
    async def scenario() -> None:
        batches = SearchBatches(HeldReads())  # type: ignore[arg-type]
        (read, *_) = prepare_search(SearchRequest(collection="docs", k=K), TOPOLOGY).reads
        asker = Asking(batches)
        level: Any = None
        batches.ask(Waiting(asker, 0, replace(read, level=level), b"", 1))
        await turns()
        assert isinstance(asker.future.exception(), AttributeError)
        assert not batches._lines and not batches._running

    asyncio.run(scenario())
