"""Reading, replaying and appending a shard's log."""

import asyncio
from dataclasses import replace

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.domain import limits
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Corrupt, Unavailable
from shoal_cluster.domain.ids import CollectionId, Epoch, Seq, ShardNumber, Slot
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.wal.log import Wal, check_follows
from shoal_cluster.wal.record import FIRST_PUT_ID, RecordKind, WalRecord

KEYS = ShardKeys(CollectionId("c" * 32), ShardNumber(0))


class Counting(MemoryStore):
    """Counts concurrent gets; fails those of `unavailable` keys."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = self.most = 0
        self.asked: list[str] = []
        self.unavailable: set[str] = set()

    async def get(self, key: str) -> bytes | None:
        self.asked.append(key)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if key in self.unavailable:
                raise Unavailable(f"no answer about {key}")
            return await super().get(key)
        finally:
            self.under_way -= 1


def put_id(slot: int) -> bytes:
    return slot.to_bytes(16, "big")


def fence(slot: int) -> WalRecord:
    return WalRecord(
        slot=Slot(slot),
        epoch=Epoch(slot),
        kind=RecordKind.FENCE,
        put_id=put_id(slot),
        prev_put_id=put_id(slot - 1),
        first_seq=Seq(1),
        memtable_start=Slot(1),
    )


async def log_of(slots: int) -> tuple[Counting, Wal]:
    store = Counting()
    wal = Wal(store, KEYS, bytes(16), SystemClock())
    for slot in range(1, slots + 1):
        record = fence(slot)
        assert await wal.append(record, wal.encode(record)) is None
    return store, wal


async def slots_of(wal: Wal, first: int, last: int | None = None) -> list[int]:
    end = None if last is None else Slot(last)
    return [record.slot async for record in wal.replay(Slot(first), end)]


def test_replay_yields_the_log_in_order_up_to_the_first_empty_slot():
    async def scenario():
        store, wal = await log_of(40)
        assert await slots_of(wal, 1) == list(range(1, 41))
        assert await slots_of(wal, 38) == [38, 39, 40]
        assert await slots_of(wal, 41) == []
        assert store.most <= limits.WAL_REPLAY_WINDOW
        del store.objects[KEYS.slot(Slot(20))]
        assert await slots_of(wal, 1) == list(range(1, 20))

    asyncio.run(scenario())


def test_replay_up_to_a_slot_asks_for_nothing_behind_it():
    async def scenario():
        store, wal = await log_of(40)
        store.asked.clear()
        assert await slots_of(wal, 5, 9) == [5, 6, 7, 8, 9]
        assert store.asked == [KEYS.slot(Slot(slot)) for slot in range(5, 10)]
        assert await slots_of(wal, 9, 8) == []

    asyncio.run(scenario())


def test_a_slot_that_cannot_be_read_ends_the_replay_after_its_predecessors():
    async def scenario():
        store, wal = await log_of(20)
        store.unavailable.add(KEYS.slot(Slot(7)))
        seen = []
        with pytest.raises(Unavailable):
            async for record in wal.replay(Slot(1)):
                seen.append(record.slot)
        assert seen == [1, 2, 3, 4, 5, 6]

    asyncio.run(scenario())


def test_a_slot_that_is_taken_gives_back_what_is_there():
    async def scenario():
        _, wal = await log_of(1)
        ours = replace(fence(1), put_id=put_id(99))
        other = await wal.append(ours, wal.encode(ours))
        assert other is not None and other.put_id == put_id(1)

    asyncio.run(scenario())


def test_neighbours_that_follow_pass():
    """W-1 to W-4."""
    check_follows(None, replace(fence(1), prev_put_id=FIRST_PUT_ID))
    check_follows(fence(4), fence(5))


@pytest.mark.parametrize(
    ("invariant", "broken"),
    [
        ("W-1", {"slot": Slot(6)}),
        ("W-2", {"first_seq": Seq(2)}),
        ("W-3", {"epoch": Epoch(3)}),
        ("W-4", {"prev_put_id": put_id(9)}),
    ],
)
def test_neighbours_that_do_not_follow_are_named_by_slot_and_invariant(invariant, broken):
    record = replace(fence(5), **broken)
    with pytest.raises(Corrupt, match=f"slot {record.slot} .{invariant}"):
        check_follows(fence(4), record)


@pytest.mark.parametrize("broken", [{"slot": Slot(2)}, {"first_seq": Seq(2)}, {"put_id": b""}])
def test_a_log_that_starts_anywhere_else_is_broken(broken):
    record = replace(fence(1), **broken)
    if "put_id" in broken:
        record = replace(record, prev_put_id=put_id(7))
    with pytest.raises(Corrupt, match="W-"):
        check_follows(None, record)
