"""When a scan under a filter of far rows was deep enough, and when it is not even tried."""

import numpy as np
import pytest

from shoal_cluster.index.calibration import BeyondPoint, RecallCurve
from shoal_cluster.index.distances import Keys, Rows
from shoal_cluster.index.families import Effort
from shoal_cluster.segment.far_rows import (
    late_share,
    rows_judged,
    settles,
    suffices,
    sure_way,
    try_depths,
)

K, LISTS = 10, 7
SHALLOWEST, ALLOWED = 100, 100_000


def ranked(depth: int, late: int) -> Keys:
    """Keys by code; of the ten nearest, and of the next ten, so many are behind the first quarter.

    The nearest are late last, so of the twenty nearest too.
    """
    keys = np.full(depth, 100.0, dtype=np.float32)
    for first in (0, 10):
        early = 10 - late
        keys[first : first + early] = np.arange(first, first + early)
        keys[depth - first - late : depth - first] = np.arange(first + early, first + 10)
    return keys


class Scans:
    """Answers scans; of each depth so many of the ten nearest rows stand late."""

    def __init__(self, late: dict[int, int]) -> None:
        self.late = late
        self.asked: list[int] = []

    def __call__(self, effort: Effort) -> tuple[Keys, Rows, Keys]:
        assert effort.probes == LISTS
        self.asked.append(effort.depth)
        found = np.full((1, K), effort.depth)
        keys = ranked(effort.depth, self.late[effort.depth])
        return found.astype(np.float32), found, keys[np.newaxis]


def tried(scans: Scans, *, sure_ns: float = 1e9, allowed: int = ALLOWED) -> int | None:
    """Returns the depth whose hits were taken, None for the sure way. A candidate costs 1 ns."""
    found = try_depths(
        K,
        0.95,
        shallowest=SHALLOWEST,
        allowed=allowed,
        lists=LISTS,
        cost_ns=lambda effort: float(effort.depth),
        sure_ns=sure_ns,
        scan=scans,
    )
    return None if found is None else int(found[1][0])


@pytest.mark.parametrize("late", [0, 1, 7, 10])
@pytest.mark.parametrize("judged", [10, 20])
def test_the_share_of_late_rows_is_counted_among_the_nearest(late: int, judged: int) -> None:
    assert late_share(ranked(400, late), judged) == late / 10


def test_codes_that_tell_nothing_leave_three_quarters_of_the_nearest_late() -> None:
    keys = np.random.default_rng(1).random(200_000).astype(np.float32)

    assert late_share(keys, 2_000) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(("target", "late"), [(0.9, 0), (0.95, 0), (0.99, 1), (0.999, 0)])
def test_no_hit_may_be_late_and_of_twice_as_many_rows_two(target: float, late: int) -> None:
    assert settles(ranked(400, late), K, target)
    assert not settles(ranked(400, late + 1), K, target)


@pytest.mark.parametrize(("target", "judged"), [(0.95, 10), (0.96, 20)])
def test_above_a_target_twice_as_many_rows_as_hits_are_judged(target: float, judged: int) -> None:
    keys = ranked(400, 0)
    keys[[200, 201, 202]] = [10.5, 10.6, 10.7]

    assert rows_judged(K, target) == judged
    assert settles(keys, K, target) == (judged == 10)


@pytest.mark.parametrize(("target", "enough"), [(0.95, True), (0.99, False)])
def test_hits_of_the_filtered_scan_may_stand_in_its_first_half_at_low_targets(
    target: float, enough: bool
) -> None:
    keys = np.full(100, 100.0, dtype=np.float32)
    keys[30:50] = np.arange(20)

    assert suffices(keys, K, target) == enough
    assert not settles(keys, K, target)
    assert not suffices(np.roll(keys, 11), K, target)


def test_too_few_candidates_never_settle() -> None:
    assert not settles(np.arange(39, dtype=np.float32), K, 0.5)
    assert not settles(np.empty(0, dtype=np.float32), K, 0.5)
    assert settles(np.arange(40, dtype=np.float32), K, 0.5)


def test_a_depth_that_does_not_settle_is_followed_by_four_times_as_much() -> None:
    scans = Scans({640: 4, 2_560: 2, 10_240: 0})

    assert tried(scans) == 10_240
    assert scans.asked == [640, 2_560, 10_240]


def test_a_try_that_costs_more_than_half_the_sure_way_is_not_made() -> None:
    for sure_ns, asked in ((1_279, []), (1_280, [640]), (5_119, [640]), (5_120, [640, 2_560])):
        scans = Scans({640: 4, 2_560: 4})

        assert tried(scans, sure_ns=sure_ns) is None
        assert scans.asked == asked


def test_codes_that_tell_nothing_are_not_asked_twice() -> None:
    scans = Scans({640: 5})

    assert tried(scans) is None
    assert scans.asked == [640]


def test_no_try_is_as_deep_as_there_are_allowed_rows() -> None:
    scans = Scans({640: 4})

    assert tried(scans, allowed=2_560) is None
    assert scans.asked == [640]


@pytest.mark.parametrize(
    ("beyond", "gather_ns", "effort", "cost_ns"),
    [
        (0.01, 1_000.0, Effort(depth=640, probes=LISTS), 640.0),
        (0.01, 640.0, None, 640.0),
        (0.02, 1_000.0, None, 1_000.0),
    ],
)
def test_the_sure_way_is_the_cheaper_of_the_measured_depth_and_comparing_all(
    beyond: float, gather_ns: float, effort: Effort | None, cost_ns: float
) -> None:
    measured = BeyondPoint(beyond=0.01, factor=64, recall=0.99, lower=0.99)

    way = sure_way(
        RecallCurve(points=(), queries=200, beyond=(measured,)),
        0.95,
        K,
        lists=LISTS,
        beyond=beyond,
        scan_ns=lambda effort: float(effort.depth),
        gather_ns=gather_ns,
    )

    assert (way.effort, way.cost_ns) == (effort, cost_ns)
