"""One replica of one shard: loads the sealed state, follows the log, answers at three read levels.

Reads (docs/design/protocol.md):
    eventual  answers at once and says as of when.
    session   answers once the position reached the session's token.
    strong    after the request arrived: get the next slot, then list the manifests; only when both
              show nothing newer is the state the newest. Reads that wait share one probe.

The order of the two probes matters: garbage collection may remove a slot only after the manifest
that covers it exists, so a slot found empty first, with no newer manifest after, was truly empty.

On a primary one thing more: an append of its own whose put began before the probe proves nothing.
It may have landed long ago, with its reply still under way, and others may have fenced the slot
after it, led and acknowledged since. Only an append that began after the probe shows the tail.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable
from typing import Protocol

import structlog

from shoal_cluster.domain.errors import Corrupt, NotFound, ShoalError, Unavailable
from shoal_cluster.domain.ids import ManifestVersion, SegmentId, ShardNumber, Slot
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.domain.limits import PUSH_BYTES_MAX, PUSHES_MAX
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Consistency
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.manifest.manifest import Manifest
from shoal_cluster.shard.calls import AsOf, ReadLevel
from shoal_cluster.shard.failures import Failures
from shoal_cluster.shard.ports import ShardPorts
from shoal_cluster.shard.state import SegmentView, ShardState
from shoal_cluster.wal.log import Wal
from shoal_cluster.wal.record import RecordKind, WalRecord

_log = structlog.get_logger()

POLL_S = 1.0
"""How often a follower probes when nothing is pushed: bounds staleness after a lost push."""
_STUCK_POLL_S_MAX = 60.0
"""How often a follower that met damage looks whether somebody has repaired it, at the least."""
_MOVING = "moving segments to another memory tier"
_LOAD_ATTEMPTS_MAX = 20
"""Each retry means garbage collection overtook the load, so a newer manifest is there to read."""


class Leader(Protocol):
    """The primary of this very replica: it alone applies records while it leads."""

    @property
    def appending(self) -> Slot | None:
        """The slot of the append under way, None when there is none."""
        ...

    async def settled(self) -> None:
        """Returns when the append under way, if there is one, is resolved."""
        ...

    async def meet(self, record: WalRecord) -> None:
        """Deals with a record found in our next slot: our own append, or the end of our epoch."""
        ...


class Replica:
    """Follows the shard until closed, or lets `leader` move it forward."""

    def __init__(self, schema: CollectionSchema, shard: ShardNumber, ports: ShardPorts) -> None:
        self.schema = schema
        self.keys = ShardKeys(schema.id, shard)
        self.ports = ports
        self.wal = Wal(ports.store, self.keys, ports.cluster_uuid, ports.clock)
        self.manifests = Manifests(ports.store, self.keys, ports.clock)
        self.state = ShardState(schema)
        self.manifest: Manifest | None = None
        self.leader: Leader | None = None
        self.failure: str | None = None
        self.failures = Failures(ports.clock, ports.ids, shard)
        self.on_died: Callable[[Exception], None] = lambda error: None
        """Told when a bug has ended the follower: the replica advances no more."""
        self.suspected = False
        """Something failed a check while it was read in passing: the scrubber looks at once."""
        self.doubted: set[SegmentId] = set()
        """Segments whose objects the primary is to read at once (shard/object_scrubbing.py)."""
        self.advancing = asyncio.Lock()
        # Clear while a bulk load's manifest of ours is on its way (load_commit.py).
        self.load_settled = asyncio.Event()
        self.load_settled.set()
        self._probe: asyncio.Task[None] | None = None
        self._probes: set[asyncio.Task[None]] = set()
        self._pushed: dict[Slot, bytes] = {}
        self._wake = asyncio.Event()
        self._tail_seen_s = float("-inf")
        self._follower: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Loads the newest manifest and the log's tail, then follows.

        Raises: NotFound when the shard was never created; Corrupt naming the object; Unavailable
        when the bucket does not answer.
        """
        if await self.manifests.newest_number() is None:
            raise NotFound(f"{self.keys.prefix} holds no manifest: the shard was never created")
        async with self.advancing:
            await self.load_manifest()
        await self.probe()
        self._follower = asyncio.ensure_future(self._live())

    async def close(self) -> None:
        """Stops following; reads that wait for a probe end as Unavailable."""
        tasks = [*self._probes]
        if self._follower is not None:
            tasks.append(self._follower)
            self._follower = None
        if self._moving is not None:
            tasks.append(self._moving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def as_of(self) -> AsOf:
        age_s = self.ports.clock.monotonic_s() - self._tail_seen_s
        return AsOf(
            position=self.state.position,
            staleness_ms=max(0.0, age_s * 1000),
            slot=self.state.slot,
        )

    async def wait_for(self, level: ReadLevel) -> None:
        """Returns when the state satisfies the read level.

        Raises: Unavailable when the bucket does not answer, or a token lies ahead of the log.
        """
        if level.consistency is Consistency.EVENTUAL:
            return
        if level.consistency is Consistency.SESSION:
            if self.state.position >= level.at_least:
                return
            await self.probe()
            if self.state.position < level.at_least:
                raise Unavailable(
                    f"shard {self.keys.shard} is at {tuple(self.state.position)}, the session saw "
                    f"{tuple(level.at_least)}; the token is of another bucket, or the bucket lost "
                    "data"
                )
            return
        await self.probe()

    async def probe(self) -> None:
        """Advances to the log's tail as of some moment after this call began.

        Calls that arrive before a probe started share it.

        Raises: Unavailable when the replica is closed meanwhile: another may answer.
        """
        probe = self._probe
        if probe is None:
            probe = self._probe = asyncio.ensure_future(self._run_probe())
            self._probes.add(probe)
            probe.add_done_callback(self._observe)
        try:
            await asyncio.shield(probe)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not probe.cancelled() or task is None or task.cancelling():
                raise  # whoever waits was cancelled himself
            raise Unavailable(
                f"the replica of shard {self.keys.shard} was closed while it looked for the log's "
                "tail; ask another"
            ) from None

    def offer(self, slot: Slot, body: bytes) -> None:
        """Takes a durable record that the primary pushed; out of order it waits or is dropped.

        Followers apply in slot order only, whatever arrives when.
        """
        if self.leader is not None or slot <= self.state.slot:
            return
        if slot == self.state.slot + 1 and not self.advancing.locked():
            record = self.wal.decode(slot, body)
            if not self._lacks_a_load(record):
                self._apply(record)
                return
        waiting_bytes = sum(map(len, self._pushed.values()))
        if len(self._pushed) < PUSHES_MAX and waiting_bytes + len(body) <= PUSH_BYTES_MAX:
            self._pushed[slot] = body
        self._wake.set()

    def wake(self) -> None:
        """Makes the follower probe now: a newer manifest is said to exist."""
        self._wake.set()

    def mark_at_tail(self, seen_s: float) -> None:
        """Notes that at `seen_s` (monotonic) nothing newer than the present state was durable."""
        self._tail_seen_s = seen_s

    async def load_manifest(self) -> Manifest:
        """Installs the newest manifest if it is newer than ours. Call while holding `advancing`."""
        for _ in range(_LOAD_ATTEMPTS_MAX):
            manifest = await self.manifests.newest()
            if manifest is None:
                raise Corrupt(f"every manifest of {self.keys.prefix} is gone")
            if self.manifest is not None and manifest.version <= self.manifest.version:
                return self.manifest
            try:
                views = await self.open_views(manifest)
            except NotFound as error:
                _log.info("manifest_load_overtaken", shard=self.keys.shard, reason=error.message)
                continue
            if self.state.can_install(manifest):
                self.install(manifest, views)
            else:
                await self._rebuild(manifest, views)
            return manifest
        raise Unavailable(f"manifests of {self.keys.prefix} change faster than they can be loaded")

    async def open_views(self, manifest: Manifest) -> list[SegmentView]:
        """Opens every segment of a manifest, reusing what is open already.

        Raises: NotFound when a newer manifest has replaced a segment; Corrupt naming the object.
        """
        opened = dict(self.state.segments)
        return [
            await self.ports.files.open_view(entry, self.schema, opened.get(entry.id))
            for entry in manifest.segments
        ]

    def install(self, manifest: Manifest, views: list[SegmentView]) -> None:
        """Swaps in a manifest's segments at once; readers see the old state or the new one.

        Requires state.can_install(manifest). Raises: Corrupt when the rows would change (R-3).
        """
        before = set(self.state.segments)
        self.state.install(manifest, views)
        self.manifest = manifest
        for segment in before - self.state.segments.keys():
            self.ports.files.forget(segment)
        # Views that were put together before the tier changed hold readers of the one before.
        self._keep_tier()

    async def _rebuild(self, manifest: Manifest, views: list[SegmentView]) -> None:
        """Installs a manifest whose floor lies inside a memtable: replays what follows it, aside.

        Happens to a primary that froze a memtable and was fenced before its next append: no other
        replica has cut its memtables there. Readers never see the state go back.
        """
        state = ShardState(self.schema)
        state.install(manifest, views)
        async for record in self.wal.replay(Slot(state.slot + 1), self.state.slot):
            state.apply(record)
        if state.position < self.state.position:
            raise Unavailable(
                f"the log of {self.keys.prefix} was collected up to slot {state.slot} and beyond "
                "while it was replayed; a newer manifest is there to load"
            )
        if state.schema is not self.schema:
            state.alter(self.schema)  # altered while the log was replayed
        self.state = state
        self.manifest = manifest
        self._keep_tier()

    def alter(self, schema: CollectionSchema) -> None:
        """Takes a newer version of the collection's schema."""
        if schema.version <= self.schema.version:
            return
        self.schema = schema
        self.state.alter(schema)
        self._keep_tier()

    def _keep_tier(self) -> None:
        """Begins to move opened segments to the schema's tier, if any is in another."""
        if self._moving is None and self._in_other_tier() is not None:
            self._moving = asyncio.ensure_future(self._move_segments())

    async def _move_segments(self) -> None:
        """Moves one segment after the other while all go on being searched."""
        try:
            while (segment := self._in_other_tier()) is not None:
                reader = self.state.segments[segment].reader
                move = functools.partial(reader.moved_to, self.schema.tier)
                self.state.replace_reader(segment, reader, await self.ports.compute.run(move))
            self.failures.clear(_MOVING)
        except Exception as error:  # noqa: BLE001  the next manifest or alteration tries again
            self.failures.note(error, _MOVING)
        finally:
            self._moving = None

    def _in_other_tier(self) -> SegmentId | None:
        for segment, view in self.state.segments.items():
            if view.reader.tier is not self.schema.tier:
                return segment
        return None

    @property
    def manifest_version(self) -> ManifestVersion:
        return ManifestVersion(-1) if self.manifest is None else self.manifest.version

    async def _run_probe(self) -> None:
        async with self.advancing:
            self._probe = None
            # While we lead, the one slot whose put may have landed before this moment.
            doubtful = None if self.leader is None else self.leader.appending
            while True:
                started_s = self.ports.clock.monotonic_s()
                slot = Slot(self.state.slot + 1)
                try:
                    record = await self._next_record()
                except Corrupt:
                    if not await self._pass_over_damage():
                        raise
                    continue
                if record is not None:
                    if self.leader is None:
                        await self.accept(record)
                        continue
                    await self.leader.meet(record)
                    if self.leader is not None and slot != doubtful:
                        return  # our own append, begun after the probe: nothing was there before it
                    doubtful = None
                    continue  # it proves nothing, or we are fenced and follow from here on
                newest = await self.manifests.newest_number()
                if newest is not None and newest > self.manifest_version:
                    if self.leader is None:
                        await self.load_manifest()
                        continue
                    if not self.load_settled.is_set():
                        # It may have landed, and a follower may have shown it already.
                        await self.load_settled.wait()
                        continue
                    if slot == doubtful:
                        # Absent may mean: landed, fenced, sealed by another and collected.
                        await self.leader.settled()
                        doubtful = None
                        continue
                self.mark_at_tail(started_s)
                return

    async def _pass_over_damage(self) -> bool:
        """Says whether a manifest lifts us past the damaged record in our next slot.

        A primary that applied the record while it was sound seals past it (shard/scrubbing.py).
        """
        slot = self.state.slot
        if self.leader is None:
            await self.load_manifest()
        return self.state.slot > slot

    async def _next_record(self) -> WalRecord | None:
        slot = Slot(self.state.slot + 1)
        pushed = self._pushed.pop(slot, None)
        if pushed is not None:
            return self.wal.decode(slot, pushed)
        return await self.wal.read(slot)

    async def accept(self, record: WalRecord) -> None:
        """Applies the record of our next slot, unless it is a fence in a slot that was collected.

        A record that was applied while it was read is passed over: our own append, when the epoch
        ended just after it.

        A claimant may sleep until its slot was written, sealed and collected, and then put a fence
        where nothing is any more. It never leads, but its fence must not be taken for the record
        that was there: it would lift our position over writes that we have not seen. Such a slot
        lies below the floor of a manifest that was there before the fence, so we look for one.

        Call while holding `advancing`. Raises: as `load_manifest`; Corrupt (R-1).
        """
        if record.kind is RecordKind.FENCE:
            newest = await self.manifests.newest_number()
            if newest is not None and newest > self.manifest_version:
                await self.load_manifest()
        if self._lacks_a_load(record):
            await self.load_manifest()
        if record.slot <= self.state.slot:
            return
        self._apply(record)

    def _lacks_a_load(self, record: WalRecord) -> bool:
        """Says whether a manifest that raised our slot's sequence number is missing here.

        A bulk load gives its rows numbers by a manifest whose floor is the log's end, so a record
        behind it fits only who has the manifest (docs/design/bulk-load.md).
        """
        return record.slot == self.state.slot + 1 and record.first_seq > self.state.seq + 1

    def _apply(self, record: WalRecord) -> None:
        self.state.apply(record)
        if self._pushed:
            for slot in [slot for slot in self._pushed if slot <= self.state.slot]:
                del self._pushed[slot]

    async def _live(self) -> None:
        try:
            await self._follow()
        except Exception as error:  # noqa: BLE001  a bug must not leave it behind without a word
            self.failures.note(error, "following the log")
            self.on_died(error)

    async def _follow(self) -> None:
        """Probes on every wake and every POLL_S; the only place where a follower meets faults."""
        retry_at_s, delay_s = float("-inf"), POLL_S
        while True:
            with contextlib.suppress(TimeoutError):
                # Not wait_for: Python 3.11's loses a cancellation that meets the event.
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            self._wake.clear()
            if self.leader is not None:
                continue
            if self.ports.clock.monotonic_s() < retry_at_s:
                continue
            try:
                await self.probe()
                self.failure = None
                delay_s = POLL_S
            except ShoalError as error:
                if not isinstance(error, Unavailable):
                    # Damage does not heal by itself, and looking may mean reading a whole segment.
                    retry_at_s = self.ports.clock.monotonic_s() + delay_s
                    delay_s = min(2 * delay_s, _STUCK_POLL_S_MAX)
                if self.failure != error.message:
                    level = _log.warning if isinstance(error, Unavailable) else _log.error
                    level("replica_stuck", shard=self.keys.shard, reason=error.message)
                self.failure = error.message

    def _observe(self, task: asyncio.Task[None]) -> None:
        """Marks a probe's error as seen: whoever awaits the probe raises it."""
        self._probes.discard(task)
        if not task.cancelled():
            task.exception()
