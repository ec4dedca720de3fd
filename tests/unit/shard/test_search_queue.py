"""When searches run together, alone, on the loop or cut up; and that each gets its own hits."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.schema import Metric
from shoal_cluster.shard import search, search_queue
from shoal_cluster.shard.search_queue import INLINE_S_MAX, SearchQueue
from tests.unit.shard.nodes import DIMENSION, LoopClock, Shard, colored, run, upsert


class HeldCompute:
    """Keeps work until told to do it, as threads that are busy."""

    def __init__(self) -> None:
        self.held: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []

    def run(self, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.held.append((work, future))
        return future

    async def do_next(self) -> None:
        work, future = self.held.pop(0)
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  as a thread does
            future.set_exception(error)
        await turns()


class SteppedClock(LoopClock):
    """Each reading is later by `step_s`: work seems to take as long."""

    step_s = 0.0
    _now_s = 0.0

    def monotonic_s(self) -> float:
        self._now_s += self.step_s
        return self._now_s


class SlowClock(SteppedClock):
    """No search is ever short enough for the loop."""

    step_s = 2 * INLINE_S_MAX


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def order(*values: float, **changes: Any) -> search.SearchOrder:
    fields: dict[str, Any] = {"k": 3, "filter": None, "exact": True, "recall_target": 0.9}
    return search.SearchOrder(
        queries=np.array([[value] * DIMENSION for value in values], dtype=np.float32),
        **{**fields, **changes},
    )


@pytest.fixture
def threads_only(monkeypatch):
    monkeypatch.setattr(search_queue, "INLINE_ROWS_MAX", 0)


async def filled(tmp_path):
    node = await (await Shard(tmp_path).create()).lead()
    await node.write(upsert(1, {f"p{number:02}": float(number) for number in range(40)}))
    return node


def found_ids(found: search_queue.Found) -> list[str]:
    return [point.decode() for point in found.hits.ids]


def alone(node, asked: search.SearchOrder) -> list[str]:
    hits = search.execute(search.prepare(node.replica.state, asked), Metric.L2)
    return [point.decode() for point in hits.ids]


def test_searches_that_wait_for_a_worker_run_as_one_batch(tmp_path, threads_only):
    async def scenario():
        node = await filled(tmp_path)
        compute = HeldCompute()
        queue = SearchQueue(compute, SlowClock(), workers=1)
        orders = [order(float(value)) for value in (3, 9, 14, 20)]
        first = queue.search(node.replica, orders[0])
        await turns()
        others = [queue.search(node.replica, asked) for asked in orders[1:]]
        await turns()
        assert len(compute.held) == 1 and queue.waiting == 3
        await compute.do_next()
        assert len(compute.held) == 1 and queue.waiting == 0, "three ran as one"
        await compute.do_next()
        for asked, future in zip(orders, [first, *others], strict=True):
            found = future.result()
            assert found_ids(found) == alone(node, asked)
            assert found.hits.counts == [3] and len(found.hits.places) == 3

    run(scenario())


def test_searches_of_different_plans_never_share_a_batch(tmp_path, threads_only):
    async def scenario():
        node = await filled(tmp_path)
        compute = HeldCompute()
        queue = SearchQueue(compute, SlowClock(), workers=1)
        queue.search(node.replica, order(1.0))
        await turns()
        different = [
            order(5.0),
            order(5.0, k=4),
            order(5.0, filter=colored("red")),
            order(5.0, recall_target=0.5),
            order(5.0, max_cost_ns=1e6),
            order(5.0, exact=False),
            order(5.0, explain=True),
            order(5.0, explain=True),
        ]
        futures = [queue.search(node.replica, asked) for asked in different]
        for _ in range(1 + len(different)):
            assert len(compute.held) == 1
            await compute.do_next()
        assert not compute.held
        for asked, future in zip(different, futures, strict=True):
            assert found_ids(future.result()) == alone(node, asked)

    run(scenario())


def test_idle_workers_share_what_arrived_together(tmp_path, threads_only):
    async def scenario():
        node = await filled(tmp_path)
        compute = HeldCompute()
        queue = SearchQueue(compute, SlowClock(), workers=2)
        futures = [queue.search(node.replica, order(float(value))) for value in range(4)]
        await turns()
        assert len(compute.held) == 2, "two and two, not four on one worker"
        await compute.do_next()
        await compute.do_next()
        assert [found_ids(future.result())[0] for future in futures] == ["p00", "p01", "p02", "p03"]

    run(scenario())


def test_a_search_of_many_queries_is_cut_up_and_sees_one_snapshot(tmp_path, threads_only):
    async def scenario():
        node = await filled(tmp_path)
        compute = HeldCompute()
        queue = SearchQueue(compute, SlowClock(), workers=2)
        asked = order(*(value / 2 for value in range(35)))
        expected = alone(node, asked)
        position = node.replica.state.position
        future = queue.search(node.replica, asked)
        await turns()
        assert len(compute.held) == 2
        await compute.do_next()
        await node.write(upsert(2, {"p00": 999.0, "new": 0.0}))
        await compute.do_next()
        found = future.result()
        assert found_ids(found) == expected
        assert found.hits.counts == [3] * len(asked.queries)
        assert found.as_of.position == position

    run(scenario())


def test_a_position_promised_is_not_older_than_the_rows_searched(tmp_path, threads_only):
    async def scenario():
        node = await filled(tmp_path)
        compute = HeldCompute()
        queue = SearchQueue(compute, SlowClock(), workers=1)
        queue.search(node.replica, order(1.0))
        await turns()
        late = queue.search(node.replica, order(77.0))
        await node.write(upsert(2, {"late": 77.0}))
        await compute.do_next()
        await compute.do_next()
        found = late.result()
        assert found_ids(found)[0] == "late"
        assert found.as_of.position == node.replica.state.position

    run(scenario())


def test_a_lone_short_search_runs_on_the_loop_once_its_pace_is_known(tmp_path, threads_only):
    async def scenario():
        node = await filled(tmp_path)
        compute, clock = HeldCompute(), SteppedClock()
        queue = SearchQueue(compute, clock, workers=2)
        clock.step_s = INLINE_S_MAX / 4
        first = queue.search(node.replica, order(1.0))
        await turns()
        assert len(compute.held) == 1, "nothing is known of it yet"
        await compute.do_next()
        second = queue.search(node.replica, order(2.0))
        await turns()
        assert not compute.held and first.done() and second.done()

        together = [queue.search(node.replica, order(3.0)) for _ in range(2)]
        await turns()
        assert len(compute.held) == 2, "two are not alone"
        clock.step_s = INLINE_S_MAX * 20
        await compute.do_next()
        await compute.do_next()
        assert all(future.done() for future in together)
        queue.search(node.replica, order(4.0))
        await turns()
        assert len(compute.held) == 1, "it has become slow"

    run(scenario())


def test_a_failed_batch_fails_each_of_its_searches_and_nothing_after(
    tmp_path, threads_only, monkeypatch
):
    async def scenario():
        node = await filled(tmp_path)
        compute = HeldCompute()
        queue = SearchQueue(compute, SlowClock(), workers=1)
        with monkeypatch.context() as broken:
            broken.setattr(search, "execute", _raise)
            futures = [queue.search(node.replica, order(float(value))) for value in range(3)]
            await turns()
            while compute.held:
                await compute.do_next()
        for future in futures:
            assert isinstance(future.exception(), RuntimeError)
        after = queue.search(node.replica, order(5.0))
        await turns()
        await compute.do_next()
        assert found_ids(after.result())[0] == "p05"

    run(scenario())


def test_a_cancelled_search_is_not_run(tmp_path, threads_only):
    async def scenario():
        node = await filled(tmp_path)
        compute = HeldCompute()
        queue = SearchQueue(compute, SlowClock(), workers=1)
        queue.search(node.replica, order(1.0))
        await turns()
        given_up = queue.search(node.replica, order(2.0, k=1))
        wanted = queue.search(node.replica, order(3.0))
        given_up.cancel()
        await compute.do_next()
        await compute.do_next()
        assert found_ids(wanted.result())[0] == "p03" and not compute.held

    run(scenario())


def _raise(*_: Any) -> Any:
    raise RuntimeError("broken")
