"""A whole shard against a dict: primary, follower, seals, compactions, crashes, collection."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Conflict, Indeterminate, Unavailable
from shoal_cluster.domain.ids import Slot
from shoal_cluster.domain.keys import epoch_of_segment
from shoal_cluster.domain.point import SUM_MODULUS, row_hash
from shoal_cluster.domain.schema import Metric
from shoal_cluster.domain.session import Consistency
from shoal_cluster.filtering.expression import Comparison, Operator
from shoal_cluster.manifest import invariants
from shoal_cluster.shard import rows, search
from shoal_cluster.shard.calls import ReadLevel, WriteCall, WriteReply
from shoal_cluster.shard.state import ShardState
from tests.unit.shard.nodes import (
    DIMENSION,
    KEYS,
    Node,
    Shard,
    VirtualLoop,
    colored,
    delete,
    delete_where,
    patch,
    points_of,
    upsert,
)

T = TypeVar("T")

POINTS = st.sampled_from([f"p{number}" for number in range(12)])
NUMBERS = st.integers(0, 6)
COLORS = st.sampled_from(["red", "green", "blue"])
STRONG = ReadLevel(consistency=Consistency.STRONG)

Model = dict[str, tuple[float, str]]


class WholeShard(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.scratch = Path(tempfile.mkdtemp(prefix="shoal-shard-"))
        self.model: Model = {}
        self.request_no = 0
        self.answered: list[tuple[WriteCall, WriteReply]] = []

    def teardown(self) -> None:
        for node in (*self.zombies, self.leader, self.follower):
            self.run(node.crash())
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()
        shutil.rmtree(self.scratch)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def create(self) -> None:
        self.zombies: list[Node] = []
        self.shard = self.run(Shard(self.scratch).create())
        self.leader = self.run(self.shard.lead())
        self.follower = self.run(self.shard.follow())

    def next_no(self) -> int:
        self.request_no += 1
        return self.request_no

    def write(self, call: WriteCall) -> WriteReply:
        reply = self.run(self.leader.write(call))
        self.answered.append((call, reply))
        return reply

    # --- writes

    @rule(points=st.dictionaries(POINTS, NUMBERS, min_size=1, max_size=5), color=COLORS)
    def upsert(self, points: dict[str, int], color: str) -> None:
        reply = self.write(upsert(self.next_no(), points, color=color))
        assert reply.affected == len(points)
        self.model.update({point: (number, color) for point, number in points.items()})

    @rule(points=st.lists(POINTS, min_size=1, max_size=4, unique=True))
    def delete(self, points: list[str]) -> None:
        reply = self.write(delete(self.next_no(), *points))
        assert reply.affected == len([point for point in points if point in self.model])
        for point in points:
            self.model.pop(point, None)

    @rule(points=st.lists(POINTS, min_size=1, max_size=4, unique=True), color=COLORS)
    def patch(self, points: list[str], color: str) -> None:
        reply = self.write(patch(self.next_no(), {point: {"color": color} for point in points}))
        present = [point for point in points if point in self.model]
        assert reply.affected == len(present)
        for point in present:
            self.model[point] = (self.model[point][0], color)

    @rule(color=COLORS)
    def delete_where(self, color: str) -> None:
        doomed = [point for point, (_, held) in self.model.items() if held == color]
        reply = self.write(delete_where(self.next_no(), colored(color)))
        assert (reply.affected, reply.more) == (len(doomed), False)
        for point in doomed:
            del self.model[point]

    @rule(point=POINTS, number=NUMBERS)
    def upsert_if_absent(self, point: str, number: int) -> None:
        call = upsert(self.next_no(), {point: number}, if_absent=True)
        if point in self.model:
            with pytest.raises(Conflict):
                self.run(self.leader.write(call))
        else:
            self.write(call)
            self.model[point] = (number, "red")

    @rule(groups=st.lists(st.tuples(POINTS, st.none() | NUMBERS), min_size=2, max_size=8))
    def many_requests_in_one_group(self, groups: list[tuple[str, int | None]]) -> None:
        calls = []
        for point, number in groups:
            if number is None:
                calls.append(delete(self.next_no(), point))
                self.model.pop(point, None)
            else:
                calls.append(upsert(self.next_no(), {point: number}))
                self.model[point] = (number, "red")

        async def at_once() -> list[WriteReply]:
            return await asyncio.gather(*(self.leader.write(call) for call in calls))

        self.answered += zip(calls, self.run(at_once()), strict=True)

    @precondition(lambda self: self.answered)
    @rule(choice=st.integers(0, 10_000))
    def retry(self, choice: int) -> None:
        call, reply = self.answered[choice % len(self.answered)]
        assert self.run(self.leader.write(call)) == reply

    # --- what happens to processes and objects

    @rule()
    def seal(self) -> None:
        self.run(self.leader.seal())
        assert self.leader.primary is not None and self.leader.primary.serving

    @rule()
    def take_over(self) -> None:
        """The follower leads; the old primary does not know it yet."""
        self.zombies.append(self.leader)
        self.run(self.follower.promote())
        self.leader = self.follower
        self.follower = self.run(self.shard.follow())
        while len(self.zombies) > 2:
            self.run(self.zombies.pop(0).crash())

    @precondition(lambda self: self.zombies)
    @rule(point=POINTS, number=NUMBERS)
    def zombie_writes(self, point: str, number: int) -> None:
        zombie = self.zombies[-1]
        with pytest.raises((Indeterminate, Unavailable)):
            self.run(zombie.write(upsert(1, {point: number}, client="zombie")))

    @rule()
    def restart_everything(self) -> None:
        for node in (*self.zombies, self.leader, self.follower):
            self.run(node.crash())
        self.zombies = []
        self.leader = self.run(self.shard.lead())
        self.follower = self.run(self.shard.follow())

    @rule(connected=st.booleans())
    def push(self, connected: bool) -> None:
        self.shard.network.connected = connected

    @rule()
    def collect(self) -> None:
        """Deletes what garbage collection may."""
        newest = self.run(self.shard.manifests.newest())
        assert newest is not None
        objects = self.shard.objects
        for slot in range(1, newest.floor_slot + 1):
            key = KEYS.slot(Slot(slot))
            if b"\xa4kind\xa4data" in objects.get(key, b""):
                del objects[key]
        listed = {entry.id for entry in newest.segments}
        for key in [key for key in objects if key.startswith(KEYS.segments)]:
            segment = key.removeprefix(KEYS.segments).split("/")[0]
            if segment not in listed and epoch_of_segment(segment) < newest.epoch:
                del objects[key]
        self.run(self.shard.manifests.versions.collect(newest.version, bytes(16)))

    # --- what must hold

    @invariant()
    def the_primary_shows_the_model(self) -> None:
        self.check(self.leader.replica.state)

    @rule()
    def the_follower_agrees(self) -> None:
        self.run(self.follower.replica.wait_for(STRONG))
        ours, theirs = self.leader.replica.state, self.follower.replica.state
        assert (theirs.position, theirs.sum, theirs.live) == (ours.position, ours.sum, ours.live)
        assert theirs.dedup.snapshot() == ours.dedup.snapshot()
        assert theirs.last_put_id == ours.last_put_id
        self.check(theirs)

    def check(self, state: ShardState) -> None:
        snapshot = state.snapshot()
        ids, places = rows.scroll(snapshot, b"", 1000, None)
        vectors = rows.vectors_of(snapshot, places, DIMENSION)
        shown = {i.decode(): float(v[0]) for i, v in zip(ids, vectors, strict=True)}
        assert shown == {point: number for point, (number, _) in self.model.items()}
        assert rows.count(snapshot, None) == len(self.model)
        seqs, tails = rows.seqs_of(snapshot, places), rows.tails_of(snapshot, places)
        parts = zip(ids, seqs, vectors, tails, strict=True)
        total = sum(row_hash(i, seq, v.tobytes(), tail) for i, seq, v, tail in parts)
        assert total % SUM_MODULUS == state.sum
        found, _ = rows.find_rows(snapshot, [f"p{number}".encode() for number in range(12)])
        assert {point.decode() for point in found} == set(self.model)
        self.check_searches(state)

    def check_searches(self, state: ShardState) -> None:
        for expression, passes in (
            (None, lambda held: True),
            (colored("green"), lambda held: held == "green"),
            (Comparison("color", Operator.NE, "red"), lambda held: held != "red"),
        ):
            expected = sorted(
                (DIMENSION * (number - 2.0) ** 2, point)
                for point, (number, held) in self.model.items()
                if passes(held)
            )
            order = search.SearchOrder(
                queries=np.full((1, DIMENSION), 2.0, dtype=np.float32),
                k=5,
                filter=expression,
                exact=True,
                recall_target=0.9,
            )
            hits = search.execute(search.prepare(state, order), Metric.L2)
            found = [(key, i.decode()) for key, i in zip(hits.keys.tolist(), hits.ids, strict=True)]
            assert found == expected[:5]
            assert rows.count(state.snapshot(), expression) == len(expected)

    @invariant()
    def the_manifest_keeps_its_invariants(self) -> None:
        """M-1 to M-6, R-4."""
        manifest = self.leader.replica.manifest
        assert manifest is not None
        assert invariants.violations(manifest) == []
        state = self.leader.replica.state
        assert state.memtables[0].start_slot == manifest.floor_slot + 1
        assert set(state.segments) == {entry.id for entry in manifest.segments}


@pytest.mark.slow
def test_a_shard_behaves_like_a_dict(monkeypatch):
    """R-1 to R-4, D-1, L-1, Q-1, Q-3, T-1."""
    monkeypatch.setattr(limits, "COMPACTION_FAN_IN", 3)
    run_state_machine_as_test(
        WholeShard, settings=settings(max_examples=40, stateful_step_count=30)
    )


@pytest.mark.slow
def test_a_shard_that_seals_all_the_time_behaves_like_a_dict(monkeypatch):
    """The same, with the primary's own decisions to seal."""
    monkeypatch.setattr(limits, "COMPACTION_FAN_IN", 3)
    monkeypatch.setattr(limits, "SEAL_OPERATIONS", 5)
    run_state_machine_as_test(
        WholeShard, settings=settings(max_examples=15, stateful_step_count=30)
    )


def test_points_are_what_scroll_shows():
    """The two ways in which these tests look at a shard agree."""
    loop = VirtualLoop()
    scratch = Path(tempfile.mkdtemp(prefix="shoal-shard-"))
    shard = loop.run_until_complete(Shard(scratch).create())
    node = loop.run_until_complete(shard.lead())
    loop.run_until_complete(node.write(upsert(1, {"a": 1})))
    assert points_of(node.replica) == {"a": 1}
    loop.run_until_complete(node.crash())
    loop.close()
    shutil.rmtree(scratch)
