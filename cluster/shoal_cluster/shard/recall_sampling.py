"""Repeats some searches exactly in the background: which recall do users get?

docs/design/live-recall.md: invariants LR-1 to LR-3, and what follows when it is too low.
"""

import asyncio
import functools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import structlog

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.recall import FilterClass, RecallEstimate
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.index.distances import Keys
from shoal_cluster.shard import search
from shoal_cluster.shard.compute import Compute
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.search import Prepared, SearchOrder, ShardHits

_log = structlog.get_logger()

SAMPLE_CORE_SHARE_MAX: Final = 0.02
"""Of one core: an exact search of 100,000 x 384 takes 10 ms, so two in a second at the most."""

WINDOW: Final = 1_000
"""Samples an estimate is made of: at recall 0.95 its interval is 0.01 wide or less."""

QUERIES_KEPT: Final = 256
"""Sampled queries kept to measure curves with, where there is one; the build uses 200 of a kind."""

MEASURED_TOGETHER: Final = 16
"""Queries of one piece of a measurement, for which the background thread does nothing else: 0.1 to
0.3 s of a segment of 100,000 x 384, two seconds for all pieces."""

JUDGED_MIN: Final = 100
"""Samples below which nothing is concluded."""

WIDE_SHARE_MIN: Final = 0.1


class SampleBudget:
    """Keeps the samples of one process within `SAMPLE_CORE_SHARE_MAX` of a core (LR-2).

    One runs at a time; one that took t seconds keeps the next away for t / 2 %.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._running = False
        self._next_s = float("-inf")

    def begin(self) -> bool:
        """Says whether a sample may run now. If so, `end` must follow."""
        if self._running or self.clock.monotonic_s() < self._next_s:
            return False
        self._running = True
        return True

    def end(self, taken_s: float) -> None:
        self._running = False
        self._next_s = self.clock.monotonic_s() + taken_s / SAMPLE_CORE_SHARE_MAX


class RecallWindow:
    """The newest samples of one class."""

    def __init__(self) -> None:
        self._recalls = np.zeros(WINDOW)
        self._neighbours = np.zeros(WINDOW)
        self._added = 0

    def add(self, recall: float, neighbours: int) -> None:
        """Takes the recall of one query that has so many true neighbours."""
        place = self._added % WINDOW
        self._recalls[place], self._neighbours[place] = recall, neighbours
        self._added += 1

    def estimate(self, filter_class: FilterClass) -> RecallEstimate | None:
        """Returns None as long as nothing was sampled."""
        count = min(self._added, WINDOW)
        if not count:
            return None
        recalls = self._recalls[:count]
        mean, trials = float(recalls.mean()), float(count)
        variance = float(recalls.var()) * count / max(count - 1, 1)
        if variance > 0:
            fitting = mean * (1 - mean) * count / variance
            trials = min(max(fitting, trials), float(self._neighbours[:count].sum()))
        return RecallEstimate(filter_class=filter_class, samples=count, recall=mean, trials=trials)


def recall_of(found: Keys, truth: Keys) -> float:
    """Returns the share of the true neighbours of a query that it found; both ascending.

    Counted by key: of rows at the same distance any is right.
    """
    reached = int(np.searchsorted(found, truth[-1], side="right"))
    return min(reached, len(truth)) / len(truth)


class RecallSampler:
    """Samples the searches of one replica. Used from its event loop.

    replica: of its segments the curves are measured again. budget: that of the process.
    """

    def __init__(self, replica: Replica, background: Compute, budget: SampleBudget) -> None:
        self._replica = replica
        self._background = background
        self._budget = budget
        self._queries: deque[Vectors] = deque(maxlen=QUERIES_KEPT)
        self._windows: dict[FilterClass, RecallWindow] = {}
        self._estimates: dict[FilterClass, RecallEstimate] = {}
        self._measuring: asyncio.Task[float] | None = None
        self._target = self._interval = self._until = 0.0
        self.alter()

    @property
    def estimates(self) -> tuple[RecallEstimate, ...]:
        return tuple(self._estimates.values())

    def alter(self) -> None:
        """Takes over what the replica's schema says now."""
        schema = self._replica.schema
        share = schema.recall_sample_share
        self._interval = self._until = 1 / share if share > 0 else math.inf
        if schema.recall_target != self._target:
            self._forget()
        self._target = schema.recall_target

    def close(self) -> None:
        """Stops measuring, and ignores what is under way."""
        self._target = math.nan  # equal to no search's
        if self._measuring is not None:
            self._measuring.cancel()

    def offer(self, prepared: Prepared, order: SearchOrder, hits: ShardHits) -> None:
        """Takes a search that was answered, if it is its turn. Costs next to nothing otherwise.

        prepared: what it ran as, perhaps together with others; order, hits: its own.
        """
        if order.exact or order.recall_target != self._target or order.max_cost_ns is not None:
            return
        self._until -= len(order.queries)
        if self._until > 0:
            return
        number = math.ceil(self._until + len(order.queries)) - 1
        self._until = max(self._until + self._interval, 1.0)
        if not self._budget.begin():
            return
        start = sum(hits.counts[:number])
        found = hits.keys[start : start + hits.counts[number]]
        # A copy: the queries of a whole batch would stay in memory with it.
        query = order.queries[number : number + 1].copy()
        exact = replace(order, queries=query, exact=True, explain=order.filter is not None)
        # In the loop's next turn: the answer is on its way by then.
        asyncio.get_running_loop().call_soon(
            self._repeat, replace(prepared, order=exact), found, self._replica.schema
        )

    def _repeat(self, prepared: Prepared, found: Keys, schema: CollectionSchema) -> None:
        future = self._background.run(
            functools.partial(_timed, self._budget.clock, prepared, schema.metric)
        )
        future.add_done_callback(
            functools.partial(self._finish, prepared, found, schema.recall_target)
        )

    def _finish(
        self,
        prepared: Prepared,
        found: Keys,
        target: float,
        done: "asyncio.Future[tuple[ShardHits, float]]",
    ) -> None:
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is not None:
            # Damage is the scrubber's. The budget keeps this from being told all the time.
            _log.warning("recall_sample_failed", reason=repr(error))
            self._budget.end(SAMPLE_CORE_SHARE_MAX)
            return
        truth, taken_s = done.result()
        if target != self._target or not len(truth.keys):
            self._budget.end(taken_s)
            return
        if any(view.reader.recall_curve.points for view in prepared.snapshot.segments):
            self._queries.append(prepared.order.queries)
        filter_class = filter_class_of(prepared, truth)
        window = self._windows.setdefault(filter_class, RecallWindow())
        window.add(recall_of(found, truth.keys), len(truth.keys))
        estimate = window.estimate(filter_class)
        assert estimate is not None
        self._estimates[filter_class] = estimate
        if estimate.samples < JUDGED_MIN or estimate.high >= target:
            self._budget.end(taken_s)
            return
        self._measuring = asyncio.ensure_future(self._measure_again(estimate, taken_s))
        self._measuring.add_done_callback(functools.partial(self._measured, taken_s))

    def _measured(self, taken_s: float, done: "asyncio.Task[float]") -> None:
        """Not in the task: one that is cancelled before its first step runs nothing of it."""
        self._measuring = None
        self._budget.end(taken_s if done.cancelled() else done.result())

    async def _measure_again(self, estimate: RecallEstimate, taken_s: float) -> float:
        """Has every segment measure its curve with the sampled queries; the estimate begins anew.

        Returns the seconds it took with the last sample. No sample runs meanwhile, and it is paid
        for like one.
        """
        schema = self._replica.schema
        log = _log.bind(collection=schema.id, shard=self._replica.keys.shard)
        log.warning(
            "recall_below_target",
            filter_class=estimate.filter_class.value,
            target=schema.recall_target,
            recall=round(estimate.recall, 4),
            low=round(estimate.low, 4),
            high=round(estimate.high, 4),
            samples=estimate.samples,
        )
        clock = self._budget.clock
        try:
            for view in list(self._replica.state.segments.values()):
                reader = view.reader
                # With fewer queries it would say little, and what is measured stays.
                if not reader.recall_curve.points or len(self._queries) < JUDGED_MIN:
                    continue
                queries = np.concatenate(list(self._queries))
                before = reader.factor(schema.recall_target)
                for piece in reader.measure_again(queries, MEASURED_TOGETHER):
                    begun_s = clock.monotonic_s()
                    await self._background.run(piece)
                    taken_s += clock.monotonic_s() - begun_s
                log.info(
                    "recall_curve_measured_again",
                    segment=view.entry.id,
                    queries=len(queries),
                    factor_before=before,
                    factor=reader.factor(schema.recall_target),
                )
            self._forget()
        except Exception as error:  # noqa: BLE001  samples will tell again
            log.warning("recall_curve_not_measured", reason=repr(error))
        return taken_s

    def _forget(self) -> None:
        """Begins anew: what was sampled says nothing of the settings from now on."""
        self._windows.clear()
        self._estimates.clear()


def _timed(clock: Clock, prepared: Prepared, metric: Metric) -> tuple[ShardHits, float]:
    begun_s = clock.monotonic_s()
    hits = search.execute(prepared, metric)
    return hits, clock.monotonic_s() - begun_s


def filter_class_of(prepared: Prepared, truth: ShardHits) -> FilterClass:
    """Returns the class by how many of the live rows the filter lets pass."""
    if prepared.order.filter is None:
        return FilterClass.NONE
    passing = truth.explain["memtable_rows"] + _passing(truth.explain["segments"])
    wide = passing >= WIDE_SHARE_MIN * max(prepared.snapshot.live, 1)
    return FilterClass.WIDE if wide else FilterClass.NARROW


def _passing(segments: Sequence[dict[str, Any]]) -> int:
    return sum(segment.get("rows_passing", 0) for segment in segments)
