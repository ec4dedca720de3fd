"""Work in the background fails visibly, is tried again after a pause, and ends nothing else."""

import asyncio

import pytest
from structlog.testing import capture_logs

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Corrupt, Internal, InvalidRequest, Overloaded
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.observation import ReplicaState
from shoal_cluster.shard import garbage, host, primary, sealing
from shoal_cluster.shard.failures import RETRY_S_MAX, Failures
from shoal_cluster.shard.host import ShardHost
from tests.unit.shard.nodes import (
    SCHEMA,
    SHARD,
    LoopClock,
    Node,
    SeededIds,
    Shard,
    points_of,
    run,
    upsert,
)

NAME = (SCHEMA.id, SHARD)
BUGS = [RuntimeError("out of cheese"), Internal("build died"), InvalidRequest("5 GiB are too many")]


@pytest.fixture(autouse=True)
def logs():
    """What was logged. Printed as structlog does by itself, a traceback takes seconds."""
    with capture_logs() as found:
        yield found


class FailingBuilds:
    """Builds that fail, while `error` is set, when `fails` says so of the order."""

    def __init__(self, node, monkeypatch, fails=lambda order: True):
        self.error = None
        self.ordered_s = []
        inner = node.ports.builds.build

        async def build(order):
            if self.error is not None and fails(order):
                self.ordered_s.append(asyncio.get_running_loop().time())
                raise self.error
            return await inner(order)

        monkeypatch.setattr(node.ports.builds, "build", build)


def fences(shard: Shard) -> int:
    return sum("/wal/" in key and b"fence" in body for key, body in shard.objects.items())


# ------------------------------------------------------------------------------- what is noted


def test_pauses_double_up_to_a_bound_and_end_with_a_success():
    async def scenario():
        failures = Failures(LoopClock(), SeededIds(1), ShardNumber(0))
        error = Internal("no")
        pauses = [failures.note(error, "seal") for _ in range(9)]
        assert pauses == [1, 2, 4, 8, 16, 32, RETRY_S_MAX, RETRY_S_MAX, RETRY_S_MAX]
        assert (failures.count, failures.reason()) == (9, "seal: no")
        assert failures.may_try("merge") and not failures.may_try("seal")
        await asyncio.sleep(RETRY_S_MAX)
        assert failures.may_try("seal")
        failures.clear("seal")
        assert (failures.count, failures.reason()) == (0, "")
        assert failures.note(error, "seal") == 1

    run(scenario())


def test_a_failure_for_a_year_does_not_overflow():
    failures = Failures(FixedClock(), SeededIds(1), ShardNumber(0))
    assert {failures.note(Internal("no"), "seal") for _ in range(5000)} <= {*range(64)}


class FixedClock(LoopClock):
    def monotonic_s(self):
        return 0.0


def test_what_fails_together_is_told_once_and_a_bug_under_an_incident(logs):
    failures = Failures(FixedClock(), SeededIds(1), ShardNumber(0))
    failures.note(Corrupt("object x is damaged"), "merge of a", "merge of b")
    failures.note(KeyError("nope"), "seal")
    merge, seal = failures.reason().split("; seal: ")
    assert merge == "merge of a: object x is damaged"
    assert "KeyError('nope')" in seal
    (bug,) = [log for log in logs if log.get("incident") == seal.rsplit(" ", 1)[1]]
    assert isinstance(bug["exc_info"], KeyError)
    failures.keep("merge of ", {"b"})
    assert failures.may_try("merge of a") and not failures.may_try("merge of b")


# ------------------------------------------------------------------------------------- seals


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_seal_that_meets_a_bug_is_tried_seldom_and_its_epoch_goes_on(
    tmp_path, monkeypatch, error
):
    monkeypatch.setattr(limits, "SEAL_OPERATIONS", 2)

    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        builds = FailingBuilds(node, monkeypatch)
        builds.error = error
        await node.write(upsert(1, {"a": 1.0, "b": 2.0}))
        await asyncio.sleep(300)
        assert node.primary.serving and fences(shard) == 1
        # After 0, 1, 3, 7 … seconds, and then once a minute.
        assert 8 <= len(builds.ordered_s) <= 12
        assert str(error.args[0]) in node.replica.failures.reason()
        assert node.replica.failures.count == len(builds.ordered_s)
        await node.write(upsert(2, {"c": 3.0}))
        builds.error = None
        await asyncio.sleep(RETRY_S_MAX + 2 * primary.IDLE_PROBE_S)
        await node.settle()
        assert node.replica.state.unsealed_rows == 0
        assert node.replica.failures.reason() == ""
        assert points_of(node.replica) == {"a": 1.0, "b": 2.0, "c": 3.0}
        await node.crash()

    run(scenario())


def test_writers_wait_while_seals_fail_and_memory_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SEAL_OPERATIONS", 2)
    monkeypatch.setattr(limits, "MEMTABLE_OPERATIONS_MAX", 5)

    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        builds = FailingBuilds(node, monkeypatch)
        builds.error = RuntimeError("out of cheese")
        refused = 0
        for number in range(200):
            try:
                await node.write(upsert(number + 1, {f"p{number}": float(number)}))
            except Overloaded as error:
                refused += 1
                assert "out of cheese" in error.message
            await asyncio.sleep(1)
        held = sum(memtable.operations for memtable in node.replica.state.memtables)
        assert held == 2 * limits.MEMTABLE_OPERATIONS_MAX and refused == 200 - held
        await node.crash()

    run(scenario())


# ------------------------------------------------------------------------------------ merges


async def with_segments(node: Node, count: int) -> None:
    for number in range(count):
        await node.write(upsert(number + 1, {f"p{number}": float(number)}))
        await node.seal()


@pytest.mark.parametrize("error", [*BUGS, Corrupt("object x is damaged")], ids=repr)
def test_a_merge_that_fails_for_good_leaves_its_sources_alone_for_a_while(
    tmp_path, monkeypatch, error
):
    monkeypatch.setattr(limits, "COMPACTION_FAN_IN", 3)

    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        builds = FailingBuilds(node, monkeypatch, lambda order: order.sources)
        builds.error = error
        await with_segments(node, 3)
        await asyncio.sleep(6 * 3600)
        assert node.primary.serving and fences(shard) == 1
        # After a minute, two, four … and then once an hour, whether the shard is quiet or not.
        assert 6 <= len(builds.ordered_s) <= 12
        assert str(error.args[0]) in node.replica.failures.reason()
        assert node.replica.suspected or not isinstance(error, Corrupt)
        assert len(node.replica.manifest.segments) == 3
        await node.write(upsert(9, {"later": 9.0}))
        await node.seal()
        assert points_of(node.replica) == {"p0": 0.0, "p1": 1.0, "p2": 2.0, "later": 9.0}
        builds.error = None
        await asyncio.sleep(sealing.MERGE_AGAIN_S_MAX + 2 * primary.IDLE_PROBE_S)
        await node.settle()
        assert len(node.replica.manifest.segments) == 1
        assert node.replica.failures.reason() == ""
        await node.crash()

    # Idle probes make the hours long: look seldom.
    monkeypatch.setattr(primary, "IDLE_PROBE_S", 30.0)
    monkeypatch.setattr("shoal_cluster.shard.replica.POLL_S", 30.0)
    monkeypatch.setattr("tests.unit.shard.nodes.VIRTUAL_S_MAX", 50_000.0)
    run(scenario())


def test_other_segments_are_merged_while_some_must_not_be(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "COMPACTION_FAN_IN", 2)

    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        builds = FailingBuilds(node, monkeypatch, lambda order: order.sources)
        builds.error = InvalidRequest("too large")
        await with_segments(node, 2)
        poisoned = {entry.id for entry in node.replica.manifest.segments}
        builds.error = None
        for number in (5, 6):
            await node.write(upsert(number, {f"p{number}": float(number)}))
            await node.seal()
        segments = {entry.id for entry in node.replica.manifest.segments}
        assert poisoned < segments and len(segments) == 3
        await node.crash()

    run(scenario())


# ------------------------------------------------------------- garbage, followers, scrubbing


def test_a_bug_in_garbage_collection_is_seen_and_ends_nothing(tmp_path, monkeypatch):
    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()

        def plan(**_):
            raise KeyError("nope")

        with monkeypatch.context() as broken:
            broken.setattr(garbage, "plan_garbage", plan)
            await asyncio.sleep(3 * garbage.ROUND_S)
            assert "garbage collection: a bug, KeyError('nope')" in node.replica.failures.reason()
            assert node.primary.serving and node.replica.failures.count <= 4
        await asyncio.sleep(3 * garbage.ROUND_S)
        assert node.replica.failures.reason() == ""
        await node.crash()

    run(scenario())


async def hosting(tmp_path) -> ShardHost:
    """Returns a server whose one replica is ready."""
    shard = await Shard(tmp_path).create()
    server = ShardHost(shard.node().ports, lambda name: shard.network)
    server.open(SCHEMA, SHARD)
    await until(server, ReplicaState.READY)
    return server


async def until(server: ShardHost, state: ReplicaState) -> None:
    async with asyncio.timeout(100):
        while server.reports()[0].state is not state:
            await asyncio.sleep(0.01)


async def reopened(server: ShardHost) -> None:
    """Asks for the replica as the controller does, until it is there."""
    async with asyncio.timeout(100):
        while server.reports()[0].state is not ReplicaState.READY:
            server.open(SCHEMA, SHARD)
            await asyncio.sleep(0.3)


def test_a_follower_that_met_a_bug_is_opened_again_and_ever_more_seldom(tmp_path, monkeypatch):
    async def scenario():
        server = await hosting(tmp_path)
        replica = server._hosted[NAME].replica

        async def probe():
            raise KeyError("nope")

        replica.probe = probe
        await until(server, ReplicaState.FAILED)
        report = server.reports()[0]
        assert "following the log: a bug, KeyError('nope')" in report.reason
        assert report.failures == 1
        await reopened(server)
        assert server.reports()[0].reason == "" and server._hosted[NAME].replica is not replica
        # Each next one dies as well, soon after it was opened.
        opened = 0
        for _ in range(600):
            if server.reports()[0].state is ReplicaState.READY:
                if server._hosted[NAME].replica.probe is not probe:
                    opened += 1
                    server._hosted[NAME].replica.probe = probe
            else:
                server.open(SCHEMA, SHARD)
            await asyncio.sleep(0.5)
        assert 5 <= opened <= 12
        # One that lives for a while starts anew.
        await asyncio.sleep(2 * host.REOPEN_S_MAX)
        await reopened(server)
        await asyncio.sleep(2 * host.REOPEN_S_MAX)
        server._hosted[NAME].replica.probe = probe
        await until(server, ReplicaState.FAILED)
        assert server.reports()[0].failures == 1
        await server.close_all()

    run(scenario())


def test_a_bug_in_scrubbing_is_seen_and_the_scrubber_goes_on(tmp_path, monkeypatch):
    async def scenario():
        server = await hosting(tmp_path)
        replica = server._hosted[NAME].replica

        def scrub(_):
            raise KeyError("nope")

        with monkeypatch.context() as broken:
            broken.setattr(server.scrubber, "scrub", scrub)
            replica.suspected = True
            await server.scrubber.visit_due()
            assert "scrubbing: a bug, KeyError('nope')" in server.reports()[0].reason
        replica.suspected = True
        await server.scrubber.visit_due()
        assert server.reports()[0].reason == "" and server.scrubber.passes == 1
        await server.close_all()

    run(scenario())
