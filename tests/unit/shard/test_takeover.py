"""Takeover: claim, replay, fence, validate."""

import asyncio
from pathlib import Path

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain.errors import Conflict, Corrupt, ShoalError
from shoal_cluster.domain.ids import Epoch, Seq, Slot
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.shard import takeover
from shoal_cluster.shard.calls import ReadLevel
from shoal_cluster.shard.replica import Replica
from shoal_cluster.wal.record import RecordKind, WalRecord
from tests.unit.shard.nodes import KEYS, Node, Shard, points_of, run, upsert
from tests.unit.shard.test_replica import collect_below_floor

STRONG = ReadLevel(consistency=Consistency.STRONG)


class Sleepy(MemoryStore):
    """A bucket that lets the process sleep right before its fence is written."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.asleep = asyncio.Event()
        self.wake = asyncio.Event()

    async def create(self, key: str, body: bytes) -> PutOutcome:
        if key.startswith(KEYS.wal):
            self.asleep.set()
            await self.wake.wait()
        return await super().create(key, body)


def test_of_two_claimants_at_once_one_leads(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        first = await shard.lead()
        await first.write(upsert(1, {"a": 1}))
        rivals = [await shard.follow() for _ in range(4)]
        results = await asyncio.gather(
            *(rival.promote() for rival in rivals), return_exceptions=True
        )
        won = [result for result in results if not isinstance(result, Exception)]
        assert won == [Epoch(2)]
        assert all(isinstance(result, Conflict | int) for result in results)
        leader = rivals[results.index(Epoch(2))]
        await leader.write(upsert(1, {"b": 2}, client="other"))
        for node in (first, *rivals):
            await node.replica.wait_for(STRONG)
            assert points_of(node.replica) == {"a": 1, "b": 2}
            await node.crash()

    run(scenario())


@pytest.mark.parametrize("seed", range(10))
def test_racing_claimants_never_lead_in_one_epoch(tmp_path, seed):
    async def scenario():
        shard = await Shard(tmp_path, seed).create()
        nodes = [await shard.follow() for _ in range(3)]
        epochs: list[Epoch] = []

        async def claim(node: Node) -> None:
            for _ in range(4):
                try:
                    epochs.append(await node.promote())
                    await node.write(upsert(int(epochs[-1]), {"a": 1}, client="c"))
                except ShoalError:
                    await node.ports.clock.sleep(0.1)

        await asyncio.gather(*(claim(node) for node in nodes))
        assert len(epochs) == len(set(epochs))
        fences = []
        for slot in range(1, nodes[0].replica.state.slot + 1):
            record = await nodes[0].replica.wal.read(Slot(slot))
            if record is not None and record.kind is RecordKind.FENCE:
                fences.append(record.epoch)
        assert fences == sorted(set(fences))
        for node in nodes:
            await node.crash()

    run(scenario())


def test_the_next_primary_holds_every_acknowledged_write(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        for turn in range(4):
            node = await shard.lead()
            for number in range(5):
                await node.write(upsert(5 * turn + number + 1, {f"{turn}-{number}": number}))
            if turn % 2:
                await node.seal()
            await node.crash()
        node = await shard.lead()
        assert len(points_of(node.replica)) == 20
        await node.crash()

    run(scenario())


async def led_shard(shard: Shard) -> Node:
    first = await (await shard.create()).lead()
    await first.write(upsert(1, {"a": 1}))
    return first


async def sleep_through_an_epoch(shard: Shard, first: Node) -> tuple[Node, Node, Exception | int]:
    """Returns a claimant that woke up after another led, sealed and collected; that other; and
    what became of the claim. first: led the shard until then, and is closed.

    The claimant read the log up to slot n and slept before it fenced n. Meanwhile n and what
    follows were written, sealed and collected, so that its fence finds n free.
    """
    sleepy = Sleepy(shard.objects)
    claimant = await shard.node(store=sleepy).load()
    shard.network.connected = False
    claiming = asyncio.ensure_future(claimant.promote())
    await sleepy.asleep.wait()
    # The old primary does not know of the claim, and appends to the slot that was to be fenced.
    await first.write(upsert(2, {"b": 2}))
    leader = await shard.lead()
    await leader.write(upsert(3, {"c": 3}))
    await leader.seal()
    collect_below_floor(shard, leader.replica.manifest.floor_slot)
    sleepy.wake.set()
    [claimed] = await asyncio.gather(claiming, return_exceptions=True)
    await first.crash()
    return claimant, leader, claimed


def test_a_claimant_that_slept_through_an_epoch_does_not_serve(tmp_path):
    """Step 5, the validation after the fence."""

    async def scenario():
        shard = Shard(tmp_path)
        claimant, leader, claimed = await sleep_through_an_epoch(shard, await led_shard(shard))
        assert isinstance(claimed, Conflict) and "overtaken" in claimed.message
        assert claimant.primary is None
        await leader.write(upsert(4, {"d": 4}))
        await claimant.replica.wait_for(STRONG)
        assert points_of(claimant.replica) == {"a": 1, "b": 2, "c": 3, "d": 4}
        await claimant.crash()
        await leader.crash()

    run(scenario())


async def skipped_a_write(tmp_path: Path) -> bool:
    """Says whether a slow follower's position ever passed a write that it did not show.

    A session's token (epoch 1, seq 2) must not be met by a fence of epoch 2 at seq 1.
    """
    shard = Shard(tmp_path)
    first = await led_shard(shard)
    slow = await shard.follow()
    # Stops it from following by itself, right before the slot that will be collected.
    async with slow.replica.advancing:
        claimant, leader, _ = await sleep_through_an_epoch(shard, first)
    assert slow.replica.state.slot == Slot(2)
    token = Position(Epoch(1), Seq(2))
    bogus = await slow.replica.wal.read(Slot(3))
    assert (bogus.kind, bogus.epoch) == (RecordKind.FENCE, Epoch(2))
    seen = []
    apply = slow.replica._apply

    def watched_apply(record: WalRecord) -> None:
        apply(record)
        seen.append((slow.replica.state.position, points_of(slow.replica)))

    slow.replica._apply = watched_apply
    await slow.replica.wait_for(STRONG)
    assert points_of(slow.replica) == points_of(leader.replica) == {"a": 1, "b": 2, "c": 3}
    for node in (slow, claimant, leader):
        await node.crash()
    return any(position >= token and "b" not in points for position, points in seen)


def test_a_fence_in_a_collected_slot_does_not_lift_a_follower_over_writes_it_lacks(tmp_path):
    assert not run(skipped_a_write(tmp_path))


def test_a_follower_that_takes_every_fence_at_its_word_would_be_lifted(tmp_path, monkeypatch):
    """The mutant of Replica.accept: shows that the test above can fail."""

    async def take_at_its_word(replica: Replica, record: WalRecord) -> None:
        replica._apply(record)

    monkeypatch.setattr(Replica, "accept", take_at_its_word)
    try:
        assert run(skipped_a_write(tmp_path))
    except Corrupt as error:
        assert "R-1" in error.message  # the chain gives the fence away, but a slot too late


def test_without_the_validation_the_sleeper_would_lose_acknowledged_writes(tmp_path, monkeypatch):
    """The mutant of step 5: shows that the test above can fail."""
    monkeypatch.setattr(takeover, "_validate", unvalidated)

    async def scenario():
        shard = Shard(tmp_path)
        claimant, leader, claimed = await sleep_through_an_epoch(shard, await led_shard(shard))
        assert claimed == Epoch(2)
        shown = points_of(claimant.replica)
        assert "b" not in shown or "c" not in shown
        await claimant.crash()
        await leader.crash()

    run(scenario())


async def unvalidated(*_: object) -> None:
    return None


def test_a_crash_between_claim_and_fence_burns_an_epoch_and_nothing_else(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        first = await shard.lead()
        sleepy = Sleepy(shard.objects)
        claimant = await shard.node(store=sleepy).load()
        claiming = asyncio.ensure_future(claimant.promote())
        await sleepy.asleep.wait()
        claiming.cancel()
        await asyncio.wait([claiming])
        await claimant.crash()
        # The old primary goes on appending until somebody fences it.
        await first.write(upsert(1, {"a": 1}))
        heir = await shard.lead()
        assert heir.primary.epoch == Epoch(3)
        assert points_of(heir.replica) == {"a": 1}
        await first.crash()
        await heir.crash()

    run(scenario())


def test_a_claimed_epoch_already_keeps_the_old_one_from_committing(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        first = await shard.lead()
        await first.write(upsert(1, {"a": 1}))
        sleepy = Sleepy(shard.objects)
        claimant = await shard.node(store=sleepy).load()
        claiming = asyncio.ensure_future(claimant.promote())
        await sleepy.asleep.wait()
        await first.seal()
        assert not first.primary.serving
        newest = await shard.manifests.newest()
        assert (newest.epoch, newest.segments) == (Epoch(2), ())
        sleepy.wake.set()
        await claiming
        assert points_of(claimant.replica) == {"a": 1}
        await first.crash()
        await claimant.crash()

    run(scenario())


def test_frozen_memtables_of_a_dead_primary_are_sealed_by_the_next(tmp_path):
    """L-1: the first seal after a takeover covers everything behind the floor."""

    async def scenario():
        shard = await Shard(tmp_path).create()
        first = await shard.lead()
        await first.write(upsert(1, {"a": 1, "b": 2}))
        first.replica.state.rotate()  # frozen, and the primary dies before the build is done
        await first.write(upsert(2, {"b": 3, "c": 4}))
        await first.crash()
        heir = await shard.lead()
        assert len(heir.replica.state.memtables) == 2
        await heir.seal()
        assert heir.primary.serving
        assert heir.replica.state.unsealed_rows == 0
        assert points_of(heir.replica) == {"a": 1, "b": 3, "c": 4}
        await heir.crash()

    run(scenario())


class _Gate(MemoryStore):
    """A handle whose reads of the log wait, once shut: its process sleeps there."""

    def __init__(self, objects):
        super().__init__(objects)
        self.shut = False
        self.asleep = asyncio.Event()
        self.wake = asyncio.Event()

    async def get(self, key):
        if self.shut and key.startswith(KEYS.wal):
            self.asleep.set()
            await self.wake.wait()
        return await super().get(key)


def test_a_claimant_that_slept_through_a_whole_reign_leaves_the_shard_alone(tmp_path):
    """Found by the protocol model (claim_outlived): its late fence made the shard unleadable."""

    async def scenario():
        shard = await Shard(tmp_path).create()
        shard.network.connected = False
        gate = _Gate(shard.objects)
        sleeper = await shard.node(store=gate).load()
        await sleeper.replica.close()
        first = await shard.lead()
        gate.shut = True
        claim = asyncio.ensure_future(sleeper.promote())
        await gate.asleep.wait()
        await first.write(upsert(1, {"a": 1.0}))
        winner = await shard.lead()
        await winner.seal()
        collect_below_floor(shard, winner.replica.manifest.floor_slot)
        gate.wake.set()
        (refused,) = await asyncio.gather(claim, return_exceptions=True)
        assert isinstance(refused, Conflict)
        for _ in range(3):
            node = await shard.lead()
            assert points_of(node.replica) == {"a": 1.0}

    run(scenario())
