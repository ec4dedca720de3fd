"""Searches against a fake cluster: results, retries, hedges, freshness, pruning."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import (
    Corrupt,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from shoal_cluster.domain.ids import CollectionId, Epoch, Seq, ServerId, ShardNumber
from shoal_cluster.domain.partition import shard_of_id, shard_of_value
from shoal_cluster.domain.schema import CollectionSchema, EmbeddingModel, Metric
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.filtering.expression import And, Comparison, Exists, In, Operator
from shoal_cluster.query.execute import Searcher, SearchResult
from shoal_cluster.query.hedging import (
    HEDGE_BURST,
    HEDGE_SHARE,
    HedgeBudget,
    LatencyWindow,
    first_answer,
)
from shoal_cluster.query.plan import Freshness, SearchRequest
from tests.unit.query.fake_cluster import (
    EPOCH,
    FakeClock,
    FakeCluster,
    a_schema,
    store,
)

QUERY = np.array([[1, 0, 0, 0]], np.float32)


def request(**changes: Any) -> SearchRequest:
    return SearchRequest(**{"collection": "docs", "k": 3, "queries": QUERY, **changes})


def fill(cluster: FakeCluster, schema: CollectionSchema, points: int, seed: int = 1) -> None:
    generator = np.random.default_rng(seed)
    for number in range(points):
        section = f"s{number % 5}"
        point_id = f"p{number:03}"
        if schema.partition_by is None:
            shard = shard_of_id(point_id, schema.shards)  # type: ignore[arg-type]
        else:
            shard = shard_of_value(section, schema.shards)
        vector = generator.normal(size=schema.dimension)
        store(cluster, schema, shard, point_id, vector.tolist(), section=section, size=number)


def a_cluster(
    shards: int = 1, replicas: Sequence[str] = ("a",), clock: Any = None, **changes: Any
) -> tuple[FakeCluster, CollectionSchema, Searcher]:
    cluster = FakeCluster(clock or FakeClock())
    schema = a_schema(shards=shards, **changes)
    cluster.add_collection(schema, [replicas] * shards)
    searcher = Searcher(caller=cluster, topology=cluster, clock=cluster.clock)
    return cluster, schema, searcher


async def turns() -> None:
    """Lets what was just cancelled come to its end."""
    for _ in range(4):
        await asyncio.sleep(0)


def ids_of(result: SearchResult) -> list[str]:
    return [point_id.decode() for point_id in result.hits.ids]


def test_every_shard_contributes_to_the_global_top_k() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(shards=4)
        fill(cluster, schema, 60)
        result = await searcher.search(request(k=10), timeout_s=5)
        everything = {
            point_id: float(row.vector[0])
            for shard in range(4)
            for point_id, row in cluster.shard(schema, shard).rows.items()
        }
        expected = sorted(everything, key=lambda i: (-everything[i], i))[:10]
        assert list(result.hits.ids) == expected
        assert len({call.message.shard for call in cluster.calls}) == 4
        assert set(result.as_of) == {0, 1, 2, 3}
        assert result.as_of[ShardNumber(2)].epoch == EPOCH
        assert result.staleness_ms == 3.5

    asyncio.run(scenario())


def test_queries_reach_the_shard_with_unit_length_under_cosine_only() -> None:
    async def scenario(metric: Metric) -> float:
        cluster, schema, searcher = a_cluster(metric=metric)
        store(cluster, schema, 0, "p", [3, 0, 0, 0])
        queries = np.array([[0, 0, 0, 5]], np.float32)
        seen: list[float] = []
        inner = cluster.shard(schema, 0).search

        def spy(call: Any, body: bytes) -> Any:
            seen.append(float(np.linalg.norm(np.frombuffer(body, np.float32))))
            return inner(call, body)

        object.__setattr__(cluster, "_answer", lambda server, message, body: spy(message, body))
        await searcher.search(request(queries=queries), timeout_s=5)
        return seen[0]

    assert asyncio.run(scenario(Metric.COSINE)) == pytest.approx(1.0)
    assert asyncio.run(scenario(Metric.DOT)) == 5.0


def test_a_dead_server_fails_no_search_while_another_replica_lives() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(shards=3, replicas=("a", "b"))
        fill(cluster, schema, 30)
        cluster.dead.add(ServerId("a"))
        for _ in range(20):
            assert len(ids_of(await searcher.search(request(), timeout_s=5))) == 3
        to_the_dead = [call for call in cluster.calls if call.server == "a"]
        assert len(to_the_dead) <= 3, "a server that failed is tried last for a while"
        assert cluster.clock.now_s == 1000.0, "and nobody waited"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "failure", [Unavailable("gone"), NotFound("not here"), Corrupt("bad checksum"), Overloaded("x")]
)
def test_what_one_replica_cannot_do_another_is_asked_for(failure: Exception) -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(replicas=("a", "b"))
        fill(cluster, schema, 5)
        cluster.scripts[ServerId("a")].append(failure)
        assert len(ids_of(await searcher.search(request(), timeout_s=5))) == 3
        assert [call.server for call in cluster.calls] == ["a", "b"]

    asyncio.run(scenario())


def test_a_bug_or_a_bad_request_is_not_tried_elsewhere() -> None:
    async def scenario(error: Exception) -> int:
        cluster, _, searcher = a_cluster(replicas=("a", "b"))
        cluster.scripts[ServerId("a")].append(error)
        with pytest.raises(type(error)):
            await searcher.search(request(), timeout_s=5)
        return len(cluster.calls)

    assert asyncio.run(scenario(Internal("a bug"))) == 1
    assert asyncio.run(scenario(InvalidRequest("bad"))) == 1


def test_when_all_replicas_failed_the_read_waits_for_a_newer_topology() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(replicas=("a",))
        fill(cluster, schema, 5)
        cluster.dead.add(ServerId("a"))
        place = cluster.topology.collections["docs"]

        def another_server_takes_over() -> None:
            cluster.add_collection(schema, [["b"]])
            cluster.shards[schema.id, 0] = shard

        shard = cluster.shard(schema, 0)
        assert place.shards[0].primary == "a"
        cluster.on_wait.append(another_server_takes_over)
        assert len(ids_of(await searcher.search(request(), timeout_s=5))) == 3
        assert [call.server for call in cluster.calls] == ["a", "b"]

    asyncio.run(scenario())


def test_a_replica_that_comes_back_is_found_without_a_newer_topology() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(replicas=("a", "b"))
        fill(cluster, schema, 5)
        cluster.dead |= {ServerId("a"), ServerId("b")}
        cluster.on_wait += [lambda: None, cluster.dead.clear]
        assert len(ids_of(await searcher.search(request(), timeout_s=5))) == 3

    asyncio.run(scenario())


def test_without_any_replica_the_search_ends_at_its_deadline_as_unavailable() -> None:
    async def scenario() -> None:
        cluster, _, searcher = a_cluster(shards=2, replicas=("a",))
        cluster.dead.add(ServerId("a"))
        with pytest.raises(Unavailable, match=r"no replica of shard \d of 'docs'"):
            await searcher.search(request(), timeout_s=3)
        assert cluster.clock.now_s >= 1003

    asyncio.run(scenario())


def test_overload_of_every_replica_is_passed_on_at_once() -> None:
    async def scenario() -> None:
        cluster, _, searcher = a_cluster(replicas=("a", "b"))
        for server in ("a", "b"):
            cluster.scripts[ServerId(server)].append(Overloaded("full", retry_after_ms=70))
        with pytest.raises(Overloaded) as caught:
            await searcher.search(request(), timeout_s=5)
        assert caught.value.retry_after_ms == 70
        assert len(cluster.calls) == 2

    asyncio.run(scenario())


def test_a_dropped_collection_ends_a_waiting_read() -> None:
    async def scenario() -> None:
        cluster, _, searcher = a_cluster()
        cluster.dead.add(ServerId("a"))
        cluster.on_wait.append(lambda: cluster.publish({}))
        with pytest.raises(NotFound, match="dropped"):
            await searcher.search(request(), timeout_s=5)

    asyncio.run(scenario())


def test_a_collection_of_the_same_name_is_not_read_in_place_of_a_dropped_one() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster()
        cluster.dead.add(ServerId("a"))
        successor = replace(schema, id=CollectionId("d" * 32))
        cluster.on_wait.append(lambda: cluster.add_collection(successor, [["b"]]) and None)
        with pytest.raises(NotFound, match="dropped"):
            await searcher.search(request(), timeout_s=5)

    asyncio.run(scenario())


def test_one_failing_shard_fails_the_search_and_ends_the_others() -> None:
    async def scenario() -> None:
        cluster = FakeCluster(SystemClock())
        schema = a_schema(shards=2)
        cluster.add_collection(schema, [["slow"], ["broken"]])
        cluster.hanging.add(ServerId("slow"))
        cluster.scripts[ServerId("broken")].append(Internal("a bug"))
        searcher = Searcher(caller=cluster, topology=cluster, clock=cluster.clock)
        with pytest.raises(Internal):
            await searcher.search(request(), timeout_s=30)
        await turns()
        assert cluster.cancelled == ["slow"]

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_a_silent_replica_is_hedged_and_its_call_cancelled() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(replicas=("a", "b"), clock=SystemClock())
        fill(cluster, schema, 5)
        for _ in range(25):
            await searcher.search(request(), timeout_s=5)  # so that the usual latency is known
        cluster.calls.clear()
        cluster.hanging.add(ServerId("a"))
        started = cluster.clock.monotonic_s()
        result = await searcher.search(request(explain=True), timeout_s=30)
        assert cluster.clock.monotonic_s() - started < 5
        assert len(ids_of(result)) == 3
        assert [call.server for call in cluster.calls] == ["a", "b"]
        assert cluster.cancelled == ["a"]
        assert result.explain is not None
        assert result.explain.searched[0].server == "b"
        # It is not asked first again, so that it does not use up the budget of hedges.
        await searcher.search(request(), timeout_s=30)
        assert cluster.calls[-1].server == "b"
        current = asyncio.current_task()
        assert current is not None and current.cancelling() == 0

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_hedge_that_fails_leaves_the_first_call_alone() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(replicas=("a", "b"), clock=SystemClock())
        fill(cluster, schema, 5)
        for _ in range(25):
            await searcher.search(request(), timeout_s=5)
        cluster.calls.clear()
        cluster.scripts[ServerId("a")].append(0.2)
        cluster.scripts[ServerId("b")].append(Unavailable("gone"))
        result = await searcher.search(request(explain=True), timeout_s=30)
        assert [call.server for call in cluster.calls] == ["a", "b"]
        assert result.explain is not None
        assert result.explain.searched[0].server == "a"

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_cancelling_a_hedged_search_cancels_both_calls() -> None:
    async def scenario() -> None:
        cluster, _, searcher = a_cluster(replicas=("a", "b"), clock=SystemClock())
        cluster.hanging |= {ServerId("a"), ServerId("b")}
        task = asyncio.ensure_future(searcher.search(request(), timeout_s=30))
        while len(cluster.calls) < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert sorted(cluster.cancelled) == ["a", "b"]

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_caller_cancelled_just_when_its_hedge_wins_stays_cancelled() -> None:
    async def scenario() -> None:
        async def never() -> str:
            await asyncio.Event().wait()
            return "first"

        async def ask() -> None:
            caller = asyncio.current_task()
            assert caller is not None

            async def wins() -> str:
                asyncio.get_running_loop().call_soon(caller.cancel)
                return "second"

            await first_answer(never(), wins, 0.0, elsewhere=(Unavailable,))

        task = asyncio.ensure_future(ask())
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_hedges_are_at_most_a_tenth_of_reads_in_the_long_run() -> None:
    budget = HedgeBudget()
    spent = 0
    for _ in range(10_000):
        budget.earn()
        spent += budget.spend()
    assert spent <= HEDGE_BURST + 10_000 * HEDGE_SHARE


def test_the_hedge_delay_follows_four_times_the_95th_percentile() -> None:
    window = LatencyWindow()
    for _ in range(300):
        window.add(0.001)
    assert window.hedge_delay_s() == 0.020
    for _ in range(300):
        window.add(0.1)
    assert window.hedge_delay_s() == pytest.approx(0.4)


def test_a_search_of_one_shard_makes_one_task_for_its_call() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(replicas=("a", "b"))
        fill(cluster, schema, 5)
        made: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_task_factory(
            lambda on, coro, **kw: made.append(coro) or asyncio.Task(coro, loop=on)
        )
        await searcher.search(request(), timeout_s=5)
        assert len(made) == 1

    asyncio.run(scenario())


def test_a_session_read_carries_its_shards_position() -> None:
    async def levels(freshness: Freshness) -> list[Any]:
        cluster, _, searcher = a_cluster(shards=2)
        await searcher.search(request(freshness=freshness), timeout_s=5)
        by_shard = sorted(cluster.calls, key=lambda call: call.message.shard)
        return [call.message.level for call in by_shard]

    seen = Position(Epoch(3), Seq(9))
    token = {ShardNumber(1): seen}
    session = asyncio.run(levels(Freshness(token=token, collection_id="c" * 32)))
    assert [level.at_least for level in session] == [(0, 0), seen]
    stranger = asyncio.run(levels(Freshness(token=token, collection_id="d" * 32)))
    assert [level.at_least for level in stranger] == [(0, 0), (0, 0)]
    strong = asyncio.run(levels(Freshness(consistency=Consistency.STRONG, token=token)))
    assert {level.consistency for level in strong} == {Consistency.STRONG}


def test_a_filter_on_the_partition_attribute_reaches_only_its_shards() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(shards=4, partition_by="section")
        fill(cluster, schema, 40)
        filter = Comparison("section", Operator.EQ, "s1")
        result = await searcher.search(request(filter=filter, explain=True), timeout_s=5)
        owner = shard_of_value("s1", 4)
        assert [call.message.shard for call in cluster.calls] == [owner]
        assert result.explain is not None
        assert {p.shard for p in result.explain.pruned} == {0, 1, 2, 3} - {owner}
        assert '"s1"' in result.explain.pruned[0].reason
        assert set(result.explain.stages_us) == {"plan", "scatter", "merge"}
        assert set(result.as_of) == {owner}

    asyncio.run(scenario())


def test_pruning_changes_no_result() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(shards=4, partition_by="section")
        fill(cluster, schema, 80)
        for filter in (
            In("section", ("s1", "s3")),
            Comparison("section", Operator.NE, "s1"),
            Exists("section"),
        ):
            result = await searcher.search(request(k=100, filter=filter), timeout_s=5)
            everywhere = {
                point_id
                for shard in range(4)
                for point_id in cluster.shard(schema, shard).matching(
                    cluster.calls[-1].message.filter
                )
            }
            assert set(result.hits.ids) == everywhere

    asyncio.run(scenario())


def test_a_filter_no_value_satisfies_asks_no_shard() -> None:
    async def scenario() -> None:
        cluster, _, searcher = a_cluster(shards=4, partition_by="section")
        filter = And(
            (Comparison("section", Operator.EQ, "x"), Comparison("section", Operator.EQ, "y"))
        )
        result = await searcher.search(request(filter=filter, queries=QUERY), timeout_s=5)
        assert list(result.hits.counts) == [0]
        assert cluster.calls == []

    asyncio.run(scenario())


def test_a_search_by_id_leaves_out_each_point_from_its_own_hits_only() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(3)
        fill(cluster, schema, 30)
        result = await searcher.search(
            request(queries=None, ids=(b"p001", b"p002"), k=29), timeout_s=5
        )
        first, second = set(result.hits.ids[:29]), set(result.hits.ids[29:])
        assert result.hits.counts == [29, 29]
        assert b"p001" not in first and b"p002" in first
        assert b"p002" not in second and b"p001" in second

    asyncio.run(scenario())


def test_a_search_by_id_still_finds_k_others() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster()
        fill(cluster, schema, 10)
        result = await searcher.search(request(queries=None, ids=(b"p001",), k=4), timeout_s=5)
        assert len(result.hits.ids) == 4 and b"p001" not in result.hits.ids

    asyncio.run(scenario())


def test_a_search_by_an_unknown_id_names_it() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(3)
        fill(cluster, schema, 3)
        with pytest.raises(NotFound) as caught:
            await searcher.search(request(queries=None, ids=(b"p001", b"nope")), timeout_s=5)
        assert caught.value.field == "ids[1]"

    asyncio.run(scenario())


def test_vectors_come_with_their_lengths_under_cosine() -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(shards=2)
        store(cluster, schema, 0, "p", [1, 0, 0, 0], norm=3.0)
        store(cluster, schema, 1, "q", [0, 1, 0, 0], norm=2.0)
        result = await searcher.search(request(with_vector=True), timeout_s=5)
        assert result.hits.tails is not None, "the length is in the tail"
        assert result.hits.vectors is not None
        assert result.hits.vectors.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]

    asyncio.run(scenario())


NAN = np.array([[1, np.nan, 0, 0]], np.float32)
INFINITE = np.array([[1, 0, -np.inf, 0]], np.float32)
HUGE = np.array([[1e19, 0, 0, 0]], np.float32)


@pytest.mark.parametrize(
    ("changes", "field", "limit"),
    [
        ({"k": 0}, "k", "1 to 1000"),
        ({"k": 1001}, "k", "1 to 1000"),
        ({"queries": np.ones((257, 4), np.float32)}, "vectors", "1 to 256 queries"),
        ({"queries": np.ones((0, 4), np.float32)}, "vectors", "1 to 256 queries"),
        ({"queries": np.ones((1, 5), np.float32)}, "vectors[0]", "dimension 4"),
        ({"queries": np.vstack([QUERY, NAN])}, "vectors[1]", "finite numbers"),
        ({"queries": np.vstack([QUERY, INFINITE])}, "vectors[1]", "finite numbers"),
        ({"queries": np.zeros((1, 4), np.float32)}, "vectors[0]", "length above 0"),
        ({"queries": None}, "vectors", None),
        ({"ids": (b"p",)}, "vectors", None),
        ({"queries": None, "ids": (b"",)}, "ids[0]", "1 to 256 bytes"),
        ({"queries": None, "ids": (b"p" * 257,)}, "ids[0]", "1 to 256 bytes"),
        ({"recall_target": 0.2}, "recall_target", "0.5 to 1.0"),
        ({"recall_target": float("nan")}, "recall_target", "0.5 to 1.0"),
        ({"max_cost_ms": 0.0}, "max_cost_ms", "above 0 to 60000"),
        ({"max_cost_ms": -1.0}, "max_cost_ms", "above 0 to 60000"),
        ({"max_cost_ms": float("nan")}, "max_cost_ms", "above 0 to 60000"),
        ({"max_cost_ms": 60_001.0}, "max_cost_ms", "above 0 to 60000"),
        ({"max_cost_ms": 1.0, "recall_target": 0.9}, "max_cost_ms", None),
        ({"max_cost_ms": 1.0, "exact": True}, "max_cost_ms", None),
        ({"model": EmbeddingModel(name="other", version="1")}, "model", None),
        ({"filter": Exists("nope")}, "filter.attribute", None),
        ({"filter": Comparison("size", Operator.EQ, "x")}, "filter.value", None),
        (
            {"queries": np.ones((256, 4), np.float32), "k": 40, "with_payload": True},
            "k",
            "10000 hits of all queries together",
        ),
    ],
)
def test_a_bad_search_names_field_and_limit(
    changes: dict[str, Any], field: str, limit: str | None
) -> None:
    async def scenario() -> None:
        cluster, _, searcher = a_cluster(model=EmbeddingModel(name="m", version="1"))
        with pytest.raises(InvalidRequest) as caught:
            await searcher.search(request(**changes), timeout_s=5)
        assert caught.value.field == field
        assert limit is None or caught.value.limit == limit
        assert cluster.calls == []

    asyncio.run(scenario())


def test_an_undeclared_attribute_lists_the_declared_ones() -> None:
    async def scenario() -> None:
        _, _, searcher = a_cluster()
        with pytest.raises(InvalidRequest, match="section, size, tags"):
            await searcher.search(request(filter=Exists("colour")), timeout_s=5)

    asyncio.run(scenario())


def test_a_vector_too_long_for_its_keys_is_refused_where_length_counts() -> None:
    async def scenario(metric: Metric) -> None:
        _, _, searcher = a_cluster(metric=metric)
        await searcher.search(request(queries=HUGE), timeout_s=5)

    asyncio.run(scenario(Metric.COSINE))
    for metric in (Metric.DOT, Metric.L2):
        with pytest.raises(InvalidRequest, match="longer than"):
            asyncio.run(scenario(metric))


def test_an_unknown_collection_is_not_found() -> None:
    async def scenario() -> None:
        _, _, searcher = a_cluster()
        with pytest.raises(NotFound, match="nothing_here"):
            await searcher.search(request(collection="nothing_here"), timeout_s=5)

    asyncio.run(scenario())


def test_hits_of_many_shards_that_hold_too_much_together_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        cluster, schema, searcher = a_cluster(3)
        for number in range(30):
            store(cluster, schema, number % 3, f"p{number}", [1, number, 0, 0], payload=b"x" * 100)
        monkeypatch.setattr("shoal_cluster.query.execute.GATHERED_BYTES_MAX", 2000)
        found = await searcher.search(request(k=10, with_payload=True), timeout_s=5)
        assert len(found.hits.ids) == 10
        with pytest.raises(InvalidRequest, match="fewer hits") as refused:
            await searcher.search(request(k=30, with_payload=True), timeout_s=5)
        assert (refused.value.field, refused.value.limit) == ("with_payload", "2000 bytes")
        bare = await searcher.search(request(k=30), timeout_s=5)
        assert len(bare.hits.ids) == 30

    asyncio.run(scenario())
