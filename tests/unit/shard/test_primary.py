"""Primary: order, group commit, acknowledgement, and the end of an epoch."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import (
    Conflict,
    Indeterminate,
    InvalidRequest,
    NotPrimary,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import Epoch, Slot
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.shard.calls import ReadLevel
from shoal_cluster.shard.primary import IDLE_PROBE_S
from tests.unit.shard.nodes import (
    KEYS,
    Shard,
    delete,
    points_of,
    run,
    upsert,
)

STRONG = ReadLevel(consistency=Consistency.STRONG)


class Gate(MemoryStore):
    """A bucket whose creates under `wal/` wait until the gate opens, and may be refused."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.open = asyncio.Event()
        self.open.set()
        self.waiting = asyncio.Event()
        self.creates = 0
        self.refusal: ShoalError | None = None

    async def create(self, key: str, body: bytes) -> PutOutcome:
        if not key.startswith(KEYS.wal):
            return await super().create(key, body)
        self.creates += 1
        self.waiting.set()
        await self.open.wait()
        if self.refusal is not None:
            raise self.refusal
        return await super().create(key, body)


async def gated(tmp_path: Path) -> tuple[Shard, Gate, "object"]:
    shard = await Shard(tmp_path).create()
    gate = Gate(shard.objects)
    node = await shard.node(store=gate).load()
    await node.promote()
    gate.waiting.clear()
    return shard, gate, node


def test_a_write_is_acknowledged_with_its_position_and_is_readable_then(tmp_path):
    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        reply = await node.write(upsert(1, {"a": 1, "b": 2}))
        assert (reply.position, reply.first_seq, reply.affected) == (Position(1, 2), 1, 2)
        assert points_of(node.replica) == {"a": 1, "b": 2}
        await node.crash()

    run(scenario())


def test_nothing_is_visible_or_acknowledged_before_its_record_is_durable(tmp_path):
    """P-1, P-2."""

    async def scenario():
        shard, gate, node = await gated(tmp_path)
        gate.open.clear()
        writing = asyncio.ensure_future(node.write(upsert(1, {"a": 1})))
        await gate.waiting.wait()
        await asyncio.sleep(1)
        assert not writing.done()
        assert points_of(node.replica) == {}
        gate.open.set()
        await writing
        assert points_of(node.replica) == {"a": 1}
        assert KEYS.slot(node.replica.state.slot) in shard.objects
        await node.crash()

    run(scenario())


def test_concurrent_writers_share_appends(tmp_path):
    """64 writers of one row each, 20 rounds: at least 20 rows a PUT."""

    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()

        async def writer(number: int) -> None:
            for turn in range(20):
                await node.write(upsert(turn + 1, {f"{number}-{turn}": 1}, client=f"w{number}"))

        await asyncio.gather(*(writer(number) for number in range(64)))
        assert node.primary.operations == 64 * 20
        assert node.primary.operations / node.primary.appends >= 20
        assert node.replica.state.live == 64 * 20
        await node.crash()

    run(scenario())


def test_only_one_append_is_under_way_at_a_time(tmp_path):
    """P-1."""

    async def scenario():
        _, gate, node = await gated(tmp_path)
        gate.open.clear()
        creates = gate.creates
        writing = [asyncio.ensure_future(node.write(upsert(1, {"p1": 1})))]
        await gate.waiting.wait()
        writing += [asyncio.ensure_future(node.write(upsert(i, {f"p{i}": i}))) for i in range(2, 9)]
        await asyncio.sleep(5)
        assert gate.creates == creates + 1
        gate.open.set()
        await asyncio.gather(*writing)
        # The first went alone, the seven that waited together.
        assert gate.creates == creates + 2
        await node.crash()

    run(scenario())


def test_a_refused_request_does_not_disturb_its_neighbours(tmp_path):
    async def scenario():
        _, gate, node = await gated(tmp_path)
        await node.write(upsert(1, {"a": 1}))
        gate.open.clear()
        calls = [
            upsert(2, {"b": 2}),
            upsert(3, {"a": 3}, if_absent=True),
            delete(4, "a", if_seqs=[1, 2]),
            upsert(5, {"c": 3}),
        ]
        writing = [asyncio.ensure_future(node.write(call)) for call in calls]
        await asyncio.sleep(0.1)
        gate.open.set()
        results = await asyncio.gather(*writing, return_exceptions=True)
        assert [type(result).__name__ for result in results] == [
            "WriteReply",
            "Conflict",
            "InvalidRequest",
            "WriteReply",
        ]
        assert isinstance(results[2], InvalidRequest)
        assert points_of(node.replica) == {"a": 1, "b": 2, "c": 3}
        await node.crash()

    run(scenario())


def test_a_retried_request_gets_its_first_answer_also_from_the_next_primary(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        first = await node.write(upsert(1, {"a": 1}))
        await node.write(delete(2, "a"))
        assert await node.write(upsert(1, {"a": 1})) == first
        await node.seal()
        await node.crash()
        heir = await shard.lead()
        assert await heir.write(upsert(1, {"a": 1})) == first
        assert points_of(heir.replica) == {}
        await heir.crash()

    run(scenario())


def test_a_caller_that_gave_up_while_queued_has_done_nothing(tmp_path):
    async def scenario():
        _, gate, node = await gated(tmp_path)
        gate.open.clear()
        first = asyncio.ensure_future(node.write(upsert(1, {"a": 1})))
        await gate.waiting.wait()
        second = asyncio.ensure_future(node.write(upsert(2, {"b": 2})))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await first
        await node.write(upsert(3, {"c": 3}))
        assert points_of(node.replica) == {"a": 1, "c": 3}
        await node.crash()

    run(scenario())


def test_a_put_that_surely_was_not_stored_is_unavailable_and_the_next_one_works(tmp_path):
    async def scenario():
        _, gate, node = await gated(tmp_path)
        gate.refusal = Unavailable("the disk is full")
        with pytest.raises(Unavailable) as refused:
            await node.write(upsert(1, {"a": 1}))
        assert refused.value.outcome is Outcome.NOT_APPLIED
        gate.refusal = None
        await node.write(upsert(2, {"b": 2}))
        assert points_of(node.replica) == {"b": 2}
        await node.crash()

    run(scenario())


def test_a_broken_promise_of_the_disk_reaches_the_caller_as_it_is_and_ends_the_epoch(tmp_path):
    class DiskLied(Indeterminate):
        pass

    async def scenario():
        _, gate, node = await gated(tmp_path)
        gate.refusal = DiskLied("fsync failed")
        with pytest.raises(DiskLied):
            await node.write(upsert(1, {"a": 1}))
        with pytest.raises(NotPrimary):
            await node.write(upsert(2, {"a": 1}))
        await node.crash()

    run(scenario())


def test_a_fenced_primary_says_it_does_not_know_and_then_that_it_does_not_lead(tmp_path):
    """P-3."""

    async def scenario():
        shard = await Shard(tmp_path).create()
        zombie = await shard.lead()
        await zombie.write(upsert(1, {"a": 1}))
        heir = await shard.lead()
        await heir.write(upsert(1, {"b": 2}, client="other"))
        with pytest.raises(Indeterminate):
            await zombie.write(upsert(2, {"lost": 3}))
        with pytest.raises(NotPrimary) as refused:
            await zombie.write(upsert(3, {"lost": 4}))
        assert refused.value.outcome is Outcome.NOT_APPLIED
        await zombie.replica.wait_for(STRONG)
        assert points_of(zombie.replica) == points_of(heir.replica) == {"a": 1, "b": 2}
        await zombie.crash()
        await heir.crash()

    run(scenario())


@pytest.mark.parametrize("call", [delete(9, "b"), upsert(9, {"a": 5}, if_absent=True)])
def test_a_fenced_primary_answers_nothing_from_its_old_state(tmp_path, call):
    """P-2: not even that there was nothing to delete, or that a condition fails."""

    async def scenario():
        shard = await Shard(tmp_path).create()
        zombie = await shard.lead()
        await zombie.write(upsert(1, {"a": 1}))
        heir = await shard.lead()
        await heir.write(upsert(1, {"b": 2}, client="other"))
        await heir.write(delete(2, "a", client="other"))
        shard.network.connected = False
        with pytest.raises((Unavailable, Indeterminate)) as refused:
            await zombie.write(call)
        assert not isinstance(refused.value, Conflict)
        await zombie.crash()
        await heir.crash()

    run(scenario())


def test_a_condition_that_fails_at_the_living_primary_is_a_conflict(tmp_path):
    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        await node.write(upsert(1, {"a": 1}))
        appends = node.primary.appends
        with pytest.raises(Conflict):
            await node.write(upsert(2, {"a": 2}, if_absent=True))
        assert node.primary.appends == appends, "a probe confirms it; nothing is written"
        await node.crash()

    run(scenario())


def test_an_idle_primary_notices_by_itself_that_it_was_fenced(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        shard.network.connected = False
        zombie = await shard.lead()
        heir = await shard.lead()
        await asyncio.sleep(2 * IDLE_PROBE_S)
        assert not zombie.primary.serving
        assert zombie.replica.leader is None
        assert zombie.replica.state.position == heir.replica.state.position
        await zombie.crash()
        await heir.crash()

    run(scenario())


def test_an_append_that_lands_after_the_epoch_ended_is_neither_acknowledged_nor_lost(tmp_path):
    """P-3: the follower that the primary has become applies the record, once."""

    async def scenario():
        _, gate, node = await gated(tmp_path)
        gate.open.clear()
        writing = asyncio.ensure_future(node.write(upsert(1, {"a": 1})))
        await gate.waiting.wait()
        node.primary._lose("a sealing failed")
        gate.open.set()
        with pytest.raises(Indeterminate):
            await writing
        await node.replica.wait_for(STRONG)
        assert points_of(node.replica) == {"a": 1}
        await node.crash()

    run(scenario())


class LateReply(MemoryStore):
    """A bucket in which the next put of a record takes effect and is answered when told to."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.reply: asyncio.Event | None = None
        self.landed = asyncio.Event()

    async def create(self, key: str, body: bytes) -> PutOutcome:
        outcome = await super().create(key, body)
        if self.reply is not None and key.startswith(KEYS.wal):
            reply, self.reply = self.reply, None
            self.landed.set()
            await reply.wait()
        return outcome


@pytest.mark.parametrize("collected", [False, True])
def test_a_strong_read_of_a_deposed_primary_does_not_stop_at_its_own_append(tmp_path, collected):
    """The append landed before another led; it shows nothing about what came after.

    collected: its slot is sealed and gone when the read looks, so that the slot seems to be free.
    """

    async def scenario():
        shard = await Shard(tmp_path).create()
        store = LateReply(shard.objects)
        old = await shard.node(store=store).load()
        await old.promote()
        heir = await shard.follow()
        shard.network.connected = False
        reply = store.reply = asyncio.Event()
        writing = asyncio.ensure_future(old.write(upsert(1, {"a": 1})))
        await store.landed.wait()
        slot = old.replica.state.slot + 1
        await heir.promote()
        await heir.write(upsert(1, {"b": 2}, client="other"))  # acknowledged before the read began
        if collected:
            await heir.seal()
            del shard.objects[KEYS.slot(Slot(slot))]
        reading = asyncio.ensure_future(old.replica.wait_for(STRONG))
        await asyncio.sleep(0.01)  # virtual: it has asked for the slot, and waits for the put
        reply.set()
        await reading
        assert points_of(old.replica) == {"a": 1, "b": 2}
        assert old.replica.state.position == heir.replica.state.position
        assert not old.primary.serving
        await writing  # true: the record is in the log, and was acknowledged at its position
        await old.crash()
        await heir.crash()

    run(scenario())


def test_a_strong_read_of_a_busy_primary_ends_with_the_first_append_that_began_after_it(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        store = LateReply(shard.objects)
        node = await shard.node(store=store).load()
        await node.promote()
        first_reply, second_reply, third_reply = (asyncio.Event() for _ in range(3))
        store.reply = first_reply
        writes = [asyncio.ensure_future(node.write(upsert(1, {"a": 1})))]
        await store.landed.wait()
        store.landed.clear()
        reading = asyncio.ensure_future(node.replica.wait_for(STRONG))
        writes.append(asyncio.ensure_future(node.write(upsert(2, {"b": 2}))))
        await asyncio.sleep(0.01)
        assert not reading.done()
        store.reply = second_reply
        first_reply.set()
        await store.landed.wait()
        writes.append(asyncio.ensure_future(node.write(upsert(3, {"c": 3}))))
        store.reply = third_reply
        second_reply.set()
        async with asyncio.timeout(60):
            await reading
        assert points_of(node.replica) == {"a": 1, "b": 2}
        assert not writes[2].done(), "it does not wait for the third"
        third_reply.set()
        await asyncio.gather(*writes)
        await node.crash()

    run(scenario())


def test_a_record_that_was_applied_while_a_probe_read_it_is_no_damage(tmp_path):
    """The read began while we led and was answered after the epoch; the append lies in between."""

    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        read = node.replica.wal.read
        asked, found, answer = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def read_late(slot):
            asked.set()
            while (record := await read(slot)) is None:
                await asyncio.sleep(0.001)
            found.set()
            await answer.wait()
            return record

        node.replica.wal.read = read_late
        reading = asyncio.ensure_future(node.replica.wait_for(STRONG))
        await asked.wait()
        await node.write(upsert(1, {"a": 1}))
        await found.wait()
        node.primary._lose("a sealing failed")
        node.replica.wal.read = read
        answer.set()
        await reading
        assert points_of(node.replica) == {"a": 1}
        await node.crash()

    run(scenario())


def test_writes_are_slowed_down_and_not_dropped_when_sealing_cannot_keep_up(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SEAL_OPERATIONS", 4)
    monkeypatch.setattr(limits, "MEMTABLE_OPERATIONS_MAX", 8)

    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        release = asyncio.Event()
        builds = node.ports.builds
        build = builds.build

        async def slow_build(order):
            await release.wait()
            return await build(order)

        monkeypatch.setattr(builds, "build", slow_build)
        refused: Overloaded | None = None
        for number in range(1, 40):
            try:
                await node.write(upsert(number, {f"p{number}": number}))
            except Overloaded as error:
                refused = error
                break
        assert refused is not None and refused.retry_after_ms is not None
        assert refused.outcome is Outcome.NOT_APPLIED
        release.set()
        await node.settle()
        await node.write(upsert(number, {f"p{number}": number}))
        assert node.replica.state.live == number
        await node.crash()

    run(scenario())


def test_a_closing_primary_answers_everybody(tmp_path):
    async def scenario():
        _, gate, node = await gated(tmp_path)
        gate.open.clear()
        flying = asyncio.ensure_future(node.write(upsert(1, {"a": 1})))
        await gate.waiting.wait()
        queued = asyncio.ensure_future(node.write(upsert(2, {"b": 2})))
        await asyncio.sleep(0)
        await node.primary.close()
        with pytest.raises(Indeterminate):
            await flying
        with pytest.raises(NotPrimary):
            await queued
        await node.crash()

    run(scenario())


def test_an_epoch_is_claimed_once_and_grows(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        epochs = []
        for _ in range(3):
            node = await shard.lead()
            epochs.append(node.primary.epoch)
            await node.crash()
        assert epochs == [Epoch(1), Epoch(2), Epoch(3)]

    run(scenario())


@pytest.mark.parametrize("sealed", [False, True])
def test_a_retry_of_a_forgotten_client_brings_no_deleted_point_back(tmp_path, monkeypatch, sealed):
    """Its first reply was lost; others wrote so much meanwhile that the shard has forgotten it.

    sealed: the next primary knows it from the manifest only.
    """
    monkeypatch.setattr(limits, "DEDUP_CLIENTS_MAX", 8)

    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        call = upsert(1, {"x": 1}, client="waiting")
        first = await node.write(call)
        await node.write(delete(1, "x", client="other"))
        for number in range(9):
            newcomer = upsert(1, {f"p{number}": number}, client=f"client-{number}")
            await node.write(replace(newcomer, since=node.replica.state.slot))
        if sealed:
            await node.seal()
            await node.crash()
            node = await shard.lead()
        for since in (0, first.slot - 1):
            with pytest.raises(Indeterminate, match="cannot be told") as refused:
                await node.write(replace(call, since=Slot(since)))
            assert refused.value.field == "request_id.client_id"
        assert "x" not in points_of(node.replica)
        newcomer = replace(upsert(1, {"n": 1}, client="newcomer"), since=node.replica.state.slot)
        assert (await node.write(newcomer)).affected == 1
        assert (await node.write(newcomer)).affected == 1
        await node.crash()

    run(scenario())


def test_busy_writers_do_not_push_out_the_answer_that_somebody_waits_for(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "DEDUP_CLIENTS_MAX", 16)
    monkeypatch.setattr(limits, "DEDUP_REQUESTS_MAX", 64)

    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        call = upsert(7, {"x": 1}, client="waiting")
        first = await node.write(call)
        await node.write(delete(1, "x", client="other"))
        for number in range(1, 40):
            writes = (upsert(number, {f"p{c}": number}, client=f"client-{c}") for c in range(8))
            await asyncio.gather(*map(node.write, writes))
        assert await node.write(call) == first
        assert "x" not in points_of(node.replica)
        assert len(node.replica.state.dedup) == 64
        await node.crash()

    run(scenario())
