"""Estimates of live recall hold the truth, cost what they may, and see what the search saw."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from shoal_cluster.domain.recall import FilterClass, RecallEstimate, merged
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.index.families import Effort
from shoal_cluster.segment.search import allowed_rows
from shoal_cluster.shard import recall_sampling, search
from shoal_cluster.shard.recall_sampling import (
    JUDGED_MIN,
    SAMPLE_CORE_SHARE_MAX,
    RecallSampler,
    RecallWindow,
    SampleBudget,
    recall_of,
)
from shoal_cluster.shard.search import Prepared, SearchOrder, ShardHits
from tests.unit.segment.rows import build_and_open, random_rows
from tests.unit.shard.nodes import DIMENSION, SCHEMA, Node, Shard, colored, delete, run, upsert

K, TRIALS = 10, 400
"""Trials: of 100 chance alone may spoil six, at a true coverage of 0.98."""

Interval = Callable[[list[float]], tuple[float, float]]


def sampled(recalls: Iterable[float]) -> RecallEstimate:
    window = RecallWindow()
    for recall in recalls:
        window.add(recall, K)
    estimate = window.estimate(FilterClass.NONE)
    assert estimate is not None
    return estimate


def ours(recalls: list[float]) -> tuple[float, float]:
    estimate = sampled(recalls)
    return estimate.low, estimate.high


def usual(recalls: list[float]) -> tuple[float, float]:
    """Mean plus or minus standard errors: too narrow near recall 1."""
    mean = float(np.mean(recalls))
    half = 2.326 * float(np.std(recalls)) / np.sqrt(len(recalls))
    return mean - half, mean + half


def draw(rng: np.random.Generator, truth: float, how: str, count: int) -> list[float]:
    """Recalls of `count` queries whose expectation is `truth`."""
    if how == "independent":
        return (rng.binomial(K, truth, count) / K).tolist()
    if how == "clustered":  # queries are easy or hard: neighbours are lost together
        hard = rng.random(count) < (1 - truth) / 0.5
        return np.where(hard, 0.5, 1.0).tolist()
    assert how == "lost"  # a query finds all or nothing
    return (rng.random(count) < truth).astype(float).tolist()


def held_in(interval: Interval, truth: float, how: str, count: int) -> int:
    """Returns in how many of the trials the interval held the truth."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(TRIALS):
        low, high = interval(draw(rng, truth, how, count))
        held += low <= truth <= high
    return held


KINDS = ("independent", "clustered", "lost")
TRUTHS = (0.6, 0.9, 0.95, 0.99, 0.999)


@pytest.mark.parametrize(
    ("count", "truth"),
    [*((count, truth) for count in (20, 100) for truth in TRUTHS), (1000, 0.95)],
)
def test_the_interval_holds_the_truth_in_95_of_100_trials(count: int, truth: float) -> None:
    """LR-3."""
    assert all(held_in(ours, truth, how, count) >= 0.95 * TRIALS for how in KINDS)


def test_the_usual_interval_would_not() -> None:
    """The trials can fail."""
    assert min(held_in(usual, truth, "lost", 100) for truth in TRUTHS) < 0.95 * TRIALS


def test_the_interval_of_several_shards_holds_the_mean_of_their_searches() -> None:
    rng = np.random.default_rng(3)
    shares, truths = (0.6, 0.3, 0.1), (0.99, 0.93, 0.7)
    truth = sum(share * each for share, each in zip(shares, truths, strict=True))
    held = 0
    for _ in range(TRIALS):
        parts = [
            sampled(draw(rng, each, "clustered", round(300 * share)))
            for share, each in zip(shares, truths, strict=True)
        ]
        (estimate,) = merged(parts)
        held += estimate.low <= truth <= estimate.high
    assert held >= 0.95 * TRIALS
    assert estimate.samples == 300
    apart = [replace(parts[0], filter_class=each) for each in reversed(FilterClass)]
    assert [each.filter_class for each in merged(apart)] == list(FilterClass)


def test_the_interval_holds_the_truth_of_real_searches(tmp_path: Path) -> None:
    """LR-3, with recalls as a segment's codes give them."""
    _, reader = build_and_open(random_rows(2_000, 300), tmp_path, Metric.L2)
    queries = random_rows(1_500, 300, seed=2).vectors
    truth = reader.search(queries, K, exact=True).keys
    shallow = Effort(depth=3 * K, probes=1)
    found, _, _ = reader._scanned(queries, K, allowed_rows(reader.rows, None, None), shallow)
    recalls = np.array([recall_of(*each) for each in zip(found, truth, strict=True)])
    assert 0.7 < recalls.mean() < 0.995
    rng, held = np.random.default_rng(5), 0
    for _ in range(TRIALS):
        low, high = ours(rng.choice(recalls, 100, replace=False).tolist())
        held += low <= recalls.mean() <= high
    assert held >= 0.95 * TRIALS


def test_the_interval_becomes_narrow() -> None:
    estimate = sampled(draw(np.random.default_rng(1), 0.95, "independent", 1000))
    assert estimate.high - estimate.low < 0.015
    assert sampled([1.0] * 1000).low > 0.99


def test_recall_is_counted_by_key() -> None:
    def recall(found: list[float], truth: list[float]) -> float:
        return recall_of(np.array(found, np.float32), np.array(truth, np.float32))

    assert recall([1, 2, 9], [1, 2, 2]) == pytest.approx(2 / 3)
    # Another row at the same distance as the last true neighbour is as good.
    assert recall([1, 2, 2], [1, 2, 2]) == 1.0
    assert recall([], [4, 5]) == 0.0


class Clock:
    """Work takes `step_s` by it."""

    now_s, step_s = 0.0, 0.0

    def monotonic_s(self) -> float:
        self.now_s += self.step_s
        return self.now_s


class HeldCompute:
    def __init__(self) -> None:
        self.held: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self.runs = 0

    def run(self, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        self.runs += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.held.append((work, future))
        return future

    async def finish(self) -> None:
        work, future = self.held.pop(0)
        future.set_result(work())
        await turns()


async def turns() -> None:
    """Lets what was called soon happen, and what follows from it."""
    for _ in range(3):
        await asyncio.sleep(0)


class Sampling:
    """A sampler of a node of 40 points, whose background work waits to be finished."""

    def __init__(self, node: Node, share: float = 1.0) -> None:
        self.node, self.compute, self.clock = node, HeldCompute(), Clock()
        self.alter(recall_sample_share=share)
        budget = SampleBudget(self.clock)  # type: ignore[arg-type]
        self.sampler = RecallSampler(node.replica, self.compute, budget)

    def alter(self, **changes: Any) -> None:
        schema = self.node.replica.schema
        self.node.replica.alter(replace(schema, version=schema.version + 1, **changes))

    async def answer(self, order: SearchOrder, lose: int = 0) -> None:
        """Has a search answered, whose last neighbours are lost."""
        prepared, found = answered(self.node, order)
        spoiled = found.keys.copy()
        spoiled[len(spoiled) - lose :] += 99
        self.sampler.offer(prepared, order, replace(found, keys=spoiled))
        await turns()


def order(value: float = 3.0, queries: int = 1, **changes: Any) -> SearchOrder:
    fields: dict[str, Any] = {"k": 3, "filter": None, "exact": False, "recall_target": 0.95}
    vectors = np.full((queries, DIMENSION), value, np.float32)
    return SearchOrder(queries=vectors, **{**fields, **changes})


async def filled(tmp_path: Path) -> Node:
    node = await (await Shard(tmp_path).create()).lead()
    await node.write(upsert(1, {f"p{number:02}": float(number) for number in range(40)}))
    return node


def answered(node: Node, asked: SearchOrder) -> tuple[Prepared, ShardHits]:
    prepared = search.prepare(node.replica.state, asked)
    return prepared, search.execute(prepared, Metric.L2)


def test_a_sample_sees_the_rows_that_its_search_saw(tmp_path: Path) -> None:
    """LR-1: what is written meanwhile is not a miss."""

    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path))
        prepared, found = answered(sampling.node, order())
        await sampling.node.write(upsert(2, {f"near{number}": 3.0 for number in range(5)}))
        sampling.sampler.offer(prepared, order(), found)
        await turns()
        await sampling.node.write(delete(3, "p03"))
        await sampling.compute.finish()
        (estimate,) = sampling.sampler.estimates
        assert (estimate.samples, estimate.recall) == (1, 1.0)
        assert estimate.filter_class is FilterClass.NONE
        # The same against the newest state would have missed: the check can fail.
        _, newest = answered(sampling.node, order())
        _, before = answered(await filled(tmp_path / "again"), order())
        assert recall_of(before.keys, newest.keys) < 1.0

    run(scenario())


def test_the_query_that_is_repeated_is_one_of_the_call_in_turn(tmp_path: Path) -> None:
    """A batch on the way through the kernels is no batch of the one who asked."""

    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path), share=1 / 5)
        mine = order(queries=4)
        mine.queries[:] = np.array([[1], [11], [21], [31]], np.float32)
        batch = replace(mine, queries=np.concatenate([order(queries=2).queries, mine.queries]))
        prepared, _ = answered(sampling.node, batch)
        _, hits = answered(sampling.node, mine)
        for _ in range(2):  # the fifth is the first of the second call
            sampling.sampler.offer(prepared, mine, hits)
        await turns()
        ((work, _),) = sampling.compute.held
        repeated = work.args[1].order.queries  # type: ignore[attr-defined]
        assert repeated.tolist() == [[1.0] * DIMENSION]
        assert repeated.base is None, "the rest of the batch is not kept"
        await sampling.compute.finish()
        assert sampling.sampler.estimates[0].recall == 1.0

    run(scenario())


def test_sampling_stays_within_its_share_of_a_core_and_of_the_searches(tmp_path: Path) -> None:
    """LR-2."""

    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path), share=0.25)
        compute, clock = sampling.compute, sampling.clock
        other = RecallSampler(sampling.node.replica, compute, sampling.sampler._budget)

        async def searches(count: int) -> int:
            before = compute.runs
            for _ in range(count):
                await sampling.answer(order())
                other.offer(*_with_order(answered(sampling.node, order()), order()))
            await turns()
            return compute.runs - before

        assert await searches(3) == 0, "a share of them"
        assert await searches(8) == 1, "one at a time, in the whole process"
        clock.step_s = 1.0  # the sample takes a second
        await compute.finish()
        clock.step_s = 0.0
        assert await searches(100) == 0, "its cost is not paid off"
        clock.now_s += 0.99 / SAMPLE_CORE_SHARE_MAX
        assert await searches(100) == 0, "nor is it now"
        clock.now_s += 0.01 / SAMPLE_CORE_SHARE_MAX
        assert await searches(4) == 1

    run(scenario())


def _with_order(
    found: tuple[Prepared, ShardHits], asked: SearchOrder
) -> tuple[Prepared, SearchOrder, ShardHits]:
    return found[0], asked, found[1]


def test_searches_that_say_nothing_about_the_target_are_not_sampled(tmp_path: Path) -> None:
    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path))
        await sampling.answer(order(exact=True))
        await sampling.answer(order(max_cost_ns=1e6))
        await sampling.answer(order(recall_target=0.5))
        sampling.alter(recall_sample_share=0.0)
        sampling.sampler.alter()
        for _ in range(1000):
            await sampling.answer(order())
        assert sampling.compute.runs == 0
        sampling.alter(recall_sample_share=1.0, recall_target=0.5)
        sampling.sampler.alter()
        await sampling.answer(order(recall_target=0.5))
        assert sampling.compute.runs == 1

    run(scenario())


def test_another_target_begins_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path))
        await sampling.answer(order())
        await sampling.compute.finish()
        assert sampling.sampler.estimates
        await sampling.answer(order())  # is under way meanwhile
        sampling.alter(recall_target=0.99)
        sampling.sampler.alter()
        assert sampling.sampler.estimates == ()
        await sampling.compute.finish()
        assert sampling.sampler.estimates == ()

    run(scenario())


def test_a_closed_sampler_takes_nothing_any_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path))
        await sampling.answer(order())
        sampling.sampler.close()
        await sampling.compute.finish()
        await sampling.answer(order())
        assert sampling.sampler.estimates == () and sampling.compute.runs == 1

    run(scenario())


def test_a_sampler_closed_as_it_begins_to_measure_frees_the_budget_of_the_others(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path))
        for _ in range(JUDGED_MIN - 1):
            await sampling.answer(order(), lose=1)
            await sampling.compute.finish()
        await sampling.answer(order(), lose=1)
        work, future = sampling.compute.held.pop(0)
        future.set_result(work())
        # Between the sample's end and the first step of what it leads to.
        asyncio.get_running_loop().call_soon(sampling.sampler.close)
        await turns()
        sampling.clock.now_s += 1.0
        assert sampling.sampler._budget.begin()

    run(scenario())


def test_filters_have_estimates_of_their_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path))
        await sampling.node.write(upsert(2, {"green": 3.0}, color="green"))
        for asked in (order(), order(filter=colored("red")), order(filter=colored("green"))):
            await sampling.answer(asked)
            await sampling.compute.finish()
        assert {each.filter_class for each in sampling.sampler.estimates} == set(FilterClass)
        assert all(each.samples == 1 for each in sampling.sampler.estimates)

    run(scenario())


def test_an_estimate_below_the_target_is_an_event_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path))
        with capture_logs() as logs:
            for number in range(JUDGED_MIN):
                assert not logs, f"{number} samples are too few"
                # As a segment with a spoiled curve would answer: one of three is missed.
                await sampling.answer(order(), lose=1)
                await sampling.compute.finish()
            (event,) = logs
            assert event["event"] == "recall_below_target" and event["log_level"] == "warning"
            assert event["recall"] == pytest.approx(2 / 3, abs=1e-4)
            assert event["low"] < event["recall"] < event["high"] < event["target"] == 0.95
            assert sampling.sampler.estimates == (), "it begins anew"
            for _ in range(JUDGED_MIN):
                await sampling.answer(order())
                await sampling.compute.finish()
            assert len(logs) == 1, "good answers are no news"

    run(scenario())


def test_a_sample_that_fails_is_left_out_and_sampling_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        sampling = Sampling(await filled(tmp_path))
        await sampling.answer(order())
        _, future = sampling.compute.held.pop(0)
        future.set_exception(RuntimeError("broken"))
        with capture_logs() as logs:
            await turns()
        assert [event["event"] for event in logs] == ["recall_sample_failed"]
        assert sampling.sampler.estimates == ()
        sampling.clock.now_s += 1.0
        await sampling.answer(order())
        await sampling.compute.finish()
        assert sampling.sampler.estimates[0].samples == 1

    run(scenario())


def test_what_is_kept_is_bounded() -> None:
    assert sampled([1.0] * 3 * recall_sampling.WINDOW).samples == recall_sampling.WINDOW


def test_a_schema_keeps_its_share_and_one_without_has_the_default() -> None:
    fields = SCHEMA.to_wire()
    assert "recall_sample_share" not in fields
    assert CollectionSchema.from_wire(fields).recall_sample_share == 0.01
    off = replace(SCHEMA, recall_sample_share=0.0)
    assert CollectionSchema.from_wire(off.to_wire()) == off
