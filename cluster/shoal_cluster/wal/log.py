"""A shard's write-ahead log in the bucket: read a slot, replay a tail, fill the next slot.

Invariants (wal/README.md): W-1 slots are contiguous from 1; W-2 a record's sequence numbers follow
its predecessor's; W-3 epochs never go back along the log; W-4 prev_put_id names the predecessor.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from shoal_cluster.bucket.create import create
from shoal_cluster.bucket.envelope import put_id_of
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain import limits
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import Slot
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.wal.record import (
    FIRST_PUT_ID,
    WalIdentity,
    WalRecord,
    decode_record,
    encode_record,
)


class Wal:
    """The log of one shard. Holds no position: readers and writers keep their own."""

    def __init__(self, store: Store, keys: ShardKeys, cluster_uuid: bytes, clock: Clock) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self.identity = WalIdentity(
            cluster_uuid=cluster_uuid, collection=keys.collection, shard=keys.shard
        )

    async def read(self, slot: Slot) -> WalRecord | None:
        """Returns the record in a slot, or None when the slot is empty at this moment.

        Raises: Corrupt naming the object; Unavailable when the bucket does not answer.
        """
        key = self._keys.slot(slot)
        body = await self._store.get(key)
        return None if body is None else decode_record(body, self.identity, key=key)

    def decode(self, slot: Slot, body: bytes | memoryview) -> WalRecord:
        """Decodes a record's bytes that arrived some other way than from the bucket."""
        return decode_record(body, self.identity, key=self._keys.slot(slot))

    def encode(self, record: WalRecord) -> bytes:
        return encode_record(record, self.identity)

    async def replay(self, first: Slot, last: Slot | None = None) -> AsyncGenerator[WalRecord]:
        """Yields records from `first` in order, up to the first empty slot or to `last`.

        Reads ahead WAL_REPLAY_WINDOW slots; a record is yielded only after its predecessors. An
        empty slot was empty when it was read, which may be before its predecessor was yielded.

        Raises: as `read`, after everything before the failing slot was yielded.
        """
        window: deque[asyncio.Task[WalRecord | None]] = deque()
        slot = first
        try:
            while True:
                while len(window) < limits.WAL_REPLAY_WINDOW and (last is None or slot <= last):
                    window.append(asyncio.ensure_future(self.read(slot)))
                    slot = Slot(slot + 1)
                if not window:
                    return
                record = await window.popleft()
                if record is None:
                    return
                yield record
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def append(self, record: WalRecord, body: bytes) -> WalRecord | None:
        """Fills record.slot with `body` (its encoding), resolving every ambiguity.

        Returns None when the slot is ours and durable, or the record that was there first. Must not
        be called for slot n + 1 while slot n is unresolved.
        """
        key = self._keys.slot(record.slot)
        # Repeats itself for ever while the put is in doubt: giving up would mean stepping down,
        # and the callers wait no longer than their own deadlines anyway.
        other = await create(
            self._store,
            key,
            body,
            put_id=record.put_id,
            read_put_id=put_id_of,
            clock=self._clock,
            deadline_s=None,
        )
        return None if other is None else decode_record(other, self.identity, key=key)

    async def make_durable(self) -> None:
        """Makes what `replay` read survive a power cut (a no-op but on a local directory)."""
        await self._store.make_durable(self._keys.wal)


def check_follows(previous: WalRecord | None, record: WalRecord) -> None:
    """Checks W-1 to W-4 between two neighbours; previous None: the record should be the first.

    Raises: Corrupt naming the slot and the invariant.
    """
    broken = None
    if previous is None:
        if record.slot != 1 or record.first_seq != 1:
            broken = f"W-1: slot {record.slot}, seq {record.first_seq} starts the log"
        elif record.prev_put_id != FIRST_PUT_ID:
            broken = "W-4: the first record names a predecessor"
    elif record.slot != previous.slot + 1:
        broken = f"W-1: slot {record.slot} follows {previous.slot}"
    elif record.first_seq != previous.first_seq + len(previous.batch):
        broken = f"W-2: seq {record.first_seq} follows {previous.last_seq}"
    elif record.epoch < previous.epoch:
        broken = f"W-3: epoch {record.epoch} follows {previous.epoch}"
    elif record.prev_put_id != previous.put_id:
        broken = "W-4: prev_put_id does not name the record before"
    if broken is not None:
        raise Corrupt(f"the write-ahead log is broken at slot {record.slot} ({broken})")
