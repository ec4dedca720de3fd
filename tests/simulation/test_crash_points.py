"""Crash points are read from the source, and a run comes to them."""

import ast

import pytest

from tests.simulation.bucket import CrashPlan
from tests.simulation.crash_points import Place, Sweep, _places_of, places
from tests.simulation.scenario import simulate

MUST_BE_THERE = {
    ("wal/log.py", "read"),
    ("wal/log.py", "append"),
    ("wal/log.py", "make_durable"),
    ("manifest/version_log.py", "commit"),
    ("manifest/version_log.py", "floor"),
    ("shard/takeover.py", "_claim_epoch"),
    ("shard/takeover.py", "_fence"),
    ("shard/takeover.py", "_validate"),
    ("shard/primary.py", "_append"),
    ("shard/sealing.py", "_commit"),
    ("shard/sealing.py", "_store_tombstones"),
    ("shard/segment_files.py", "_fetch"),
    ("bucket/create.py", "_put_until_resolved"),
    ("control/catalog.py", "update"),
}


def test_places_are_read_from_the_source() -> None:
    found = places()
    assert {(place.file, place.function) for place in found} >= MUST_BE_THERE
    assert {place.file for place in found} >= {"shard/building.py", "shard/garbage.py"}


def test_place_is_an_await_of_a_call_on_the_bucket() -> None:
    source = """
async def one(self):
    await self._store.get(key)
    await store.list(
        prefix
    )
    await create(store, key, body)
    await self._wake.wait()
    store.local_path(key)
"""
    found = list(_places_of(ast.parse(source), "x.py"))
    assert found == [
        Place("x.py", "one", 3, 3),
        Place("x.py", "one", 4, 6),
        Place("x.py", "one", 7, 7),
    ]


@pytest.mark.slow
def test_sweep_crashes_at_the_points_a_run_came_to() -> None:
    sweep = Sweep(0)
    sweep.learn(simulate(1, work_s=10.0))
    before = len(sweep.missing())
    for _ in range(2):
        step = sweep.step()
        assert step is not None
        outcome, how = step
        assert not outcome.violations, (how, outcome.violations)
    assert len(sweep.missing()) < before


@pytest.mark.slow
def test_a_crash_is_seen_again_by_what_is_printed() -> None:
    sweep = Sweep(0)
    sweep.learn(simulate(1, work_s=5.0))
    step = sweep.step()
    assert step is not None
    outcome, how = step
    plan = how.partition("--crash '")[2].removesuffix("'")
    assert CrashPlan.parse(plan).show() == plan
    again = simulate(1, crash=CrashPlan.parse(plan))
    assert (again.digest, again.hit) == (outcome.digest, outcome.hit)
