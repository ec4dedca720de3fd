"""Deletes what no manifest needs any more: log data, old manifests, unreferenced segment objects.

Runs in the primary, beside sealing, on positive evidence only (docs/design/protocol.md, garbage):

1. list the shard's segments and log, then its bulk loads; then read the newest manifest, which must
   be of our epoch.
2. a segment object may go when that manifest does not list it and no build or commit of ours is
   about to: names carry their epoch, so what an older epoch left can never be committed again,
   but for what a bulk load has prepared and may still be committed (load_garbage.py).
3. a log object may go when its slot is at or below the manifest's floor and it holds data. Fences
   stay for ever: they are what stops a primary that slept through several takeovers.
4. manifests below the newest few go after a floor marker says so (manifest/version_log.py).
5. what was found is deleted only after GRACE_S, ascending, and after the journal (deletions.py)
   names each object, with the manifest that justified it. On a full disk the journal comes after.

Invariants:
G-1 nothing that the newest manifest lists is deleted.
G-2 no fence is deleted.
G-3 nothing is deleted of a bulk load that may still be committed, nor a segment it names.
Crash anywhere: what is left is found again; a deleted object is never missed, because readers that
meet a missing one read the newest manifest.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import structlog

from shoal_cluster.bucket.store import ObjectEntry
from shoal_cluster.domain.errors import Corrupt, Unavailable
from shoal_cluster.domain.ids import Epoch, SegmentId, Slot
from shoal_cluster.domain.keys import LoadKeys, ShardKeys, epoch_of_segment, number_of
from shoal_cluster.domain.limits import LOAD_ABANDONED_S
from shoal_cluster.manifest.manifest import Manifest
from shoal_cluster.shard.deletions import Deletion, DeletionJournal, runs
from shoal_cluster.shard.load_garbage import LoadPlan, find_loads, plan_loads
from shoal_cluster.shard.load_objects import ABORT, decide
from shoal_cluster.shard.replica import Replica
from shoal_cluster.wal.record import RecordKind

_log = structlog.get_logger()

GRACE_S = 30.0
"""Followers that are opening a segment or reading the log's tail finish in peace. Comfort only."""
ROUND_S = 10.0
DELETIONS_MAX = 1000
"""In one round; the rest waits for the next, which then comes sooner."""
BEHIND_ROUND_S = 1.0
"""Between rounds while there is more to delete. A local directory takes up to a thousand single-row
records a second; a thousand deletions every ROUND_S would never catch up with them."""
MANIFESTS_KEPT = 8
FENCE_BYTES_MAX = 4096
"""A fence is about 300 bytes; only objects below this are read to see what they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What may be deleted, and the manifest that says so. versions: superseded manifests."""

    manifest_version: int
    manifest_put_id: bytes
    floor_slot: Slot
    segment_keys: tuple[str, ...]
    wal_keys: tuple[str, ...]
    load_keys: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()


def plan_garbage(
    *,
    keys: ShardKeys,
    manifest: Manifest,
    epoch: Epoch,
    segments: Iterable[ObjectEntry],
    wal: Iterable[ObjectEntry],
    loads: LoadPlan,
    is_in_flight: Callable[[SegmentId], bool],
    is_fence: Callable[[str], bool],
) -> Garbage:
    """Returns what may be deleted. `manifest` was read after the listings. Pure.

    is_in_flight: whether we are building a segment, or putting an object beside one's others.
    is_fence: asked only of log objects small enough to be one.
    """
    listed = {file.key for entry in manifest.segments for file in entry.files}
    listed |= {entry.tombstones.key for entry in manifest.segments if entry.tombstones is not None}
    loose = []
    for entry in segments:
        segment = SegmentId(entry.key.removeprefix(keys.segments).split("/", 1)[0])
        made_by = epoch_of_segment(segment)
        if entry.key in listed or made_by > epoch:
            continue
        if segment in loads.staged or is_in_flight(segment):
            continue
        loose.append(entry.key)
    covered = sorted(
        (number_of(entry.key), entry)
        for entry in wal
        if Slot(number_of(entry.key)) <= manifest.floor_slot
    )
    return Garbage(
        manifest_version=manifest.version,
        manifest_put_id=manifest.put_id,
        floor_slot=manifest.floor_slot,
        segment_keys=tuple(sorted(loose)),
        load_keys=loads.garbage,
        wal_keys=tuple(
            entry.key
            for _, entry in covered
            if entry.size_bytes > FENCE_BYTES_MAX or not is_fence(entry.key)
        ),
    )


def may_be_fences(wal: Iterable[ObjectEntry], manifest: Manifest) -> list[str]:
    """Returns the log objects at or below the floor that must be read to see what they are."""
    return sorted(
        entry.key
        for entry in wal
        if entry.size_bytes <= FENCE_BYTES_MAX and number_of(entry.key) <= manifest.floor_slot
    )


def superseded(versions: Iterable[int], newest: int) -> tuple[int, ...]:
    """Returns those of the manifest `versions` that are no longer kept beside `newest`."""
    return tuple(version for version in versions if version <= newest - MANIFESTS_KEPT)


class GarbageCollector:
    """Collects one shard's garbage for its primary. `collect` is called between commits."""

    def __init__(
        self, replica: Replica, epoch: Epoch, on_load: Callable[[str, bool], None]
    ) -> None:
        """on_load: told of each load that was decided, and whether it is yet to be committed."""
        self._replica = replica
        self._epoch = epoch
        self._on_load = on_load
        self._undecided_s: dict[tuple[str, int], float] = {}
        self._condemned_s: dict[str, float] = {}
        self._fences: dict[str, bool] = {}
        self._last_s = float("-inf")
        self._behind = False
        ports = replica.ports
        self._journal = DeletionJournal(ports.store, replica.keys, epoch, ports.clock, ports.ids)
        self.deleted = 0

    def due(self) -> bool:
        pause_s = BEHIND_ROUND_S if self._behind else ROUND_S
        return self._replica.ports.clock.monotonic_s() - self._last_s >= pause_s

    async def find(self, is_in_flight: Callable[[SegmentId], bool]) -> Garbage | None:
        """Returns what may be deleted now, grace aside; None when our epoch is over.

        Call while no commit is under way.
        """
        replica = self._replica
        store, keys = replica.ports.store, replica.keys
        segments = await store.list(keys.segments)
        wal = await store.list(keys.wal)
        found_loads = await find_loads(store, keys)
        manifest = await replica.manifests.newest()
        if manifest is None or manifest.epoch != self._epoch:
            return None
        loads = plan_loads(found_loads, manifest, keys)
        await self._look_after(loads)
        small = may_be_fences(wal, manifest)
        self._fences = {key: found for key, found in self._fences.items() if key in small}
        for key in small:
            await self._learn(key)
        fences = self._fences
        found = plan_garbage(
            keys=keys,
            manifest=manifest,
            epoch=self._epoch,
            segments=segments,
            wal=wal,
            loads=loads,
            is_in_flight=is_in_flight,
            is_fence=lambda key: fences[key],
        )
        return replace(
            found, versions=superseded(await replica.manifests.versions.numbers(), manifest.version)
        )

    async def collect(self, is_in_flight: Callable[[SegmentId], bool]) -> Sequence[str]:
        """Deletes what has been garbage for GRACE_S; returns the deleted keys.

        Raises: Unavailable when the bucket does not answer (the next round goes on).
        """
        clock = self._replica.ports.clock
        self._last_s = clock.monotonic_s()
        garbage = await self.find(is_in_flight)
        if garbage is None:
            return ()
        now_s = clock.monotonic_s()
        found = (*garbage.segment_keys, *garbage.load_keys, *garbage.wal_keys)
        self._condemned_s = {key: self._condemned_s.get(key, now_s) for key in found}
        ripe = [key for key in found if now_s - self._condemned_s[key] >= GRACE_S]
        self._behind = len(ripe) > DELETIONS_MAX
        ripe = ripe[:DELETIONS_MAX]
        if not ripe and not garbage.versions:
            return ()
        deletion = self._deletion(garbage, ripe)
        journaled = await self._journal.write(deletion)
        for key in ripe:
            await self._replica.ports.store.delete(key)
        deleted = list(ripe)
        if garbage.versions:
            deleted += await self._replica.manifests.versions.collect(
                garbage.versions[-1] + 1, self._replica.ports.ids.put_id()
            )
        if not journaled and not await self._journal.write(deletion):
            _log.warning("deleted_without_journal", shard=self._replica.keys.shard, keys=deleted)
        if not deleted:  # another primary, whose epoch is over, has collected these versions
            return ()
        self.deleted += len(deleted)
        _log.info(
            "garbage_deleted",
            shard=self._replica.keys.shard,
            manifest_version=garbage.manifest_version,
            objects=len(deleted),
            first=deleted[0],
            last=deleted[-1],
        )
        return deleted

    def _deletion(self, garbage: Garbage, ripe: Sequence[str]) -> Deletion:
        keys = self._replica.keys
        wal = [key for key in ripe if key.startswith(keys.wal)]
        return Deletion(
            epoch=self._epoch,
            manifest_version=garbage.manifest_version,
            manifest_put_id=garbage.manifest_put_id,
            floor_slot=garbage.floor_slot,
            wall_ms=self._replica.ports.clock.wall_ms(),
            segment_objects=tuple(
                key.removeprefix(keys.prefix)
                for key in ripe
                if key.startswith((keys.segments, keys.loads))
            ),
            slots=runs(sorted(map(number_of, wal))),
            versions=runs(garbage.versions),
        )

    async def _look_after(self, loads: LoadPlan) -> None:
        """Aborts loads to which nothing was added for a day; tells of those that are decided."""
        now_s = self._replica.ports.clock.monotonic_s()
        seen = {item: self._undecided_s.get(item, now_s) for item in loads.undecided.items()}
        self._undecided_s = seen
        for (load, _), since_s in seen.items():
            if now_s - since_s >= LOAD_ABANDONED_S:
                ports = self._replica.ports
                keys = LoadKeys(self._replica.keys.collection, self._replica.keys.shard, load)
                # It may have been decided meanwhile: whichever object is there counts.
                await decide(ports.store, ports.clock, keys, ABORT, ports.ids.put_id())
                _log.info("load_abandoned", shard=keys.shard, load=load)
        for load in loads.ended:
            self._on_load(load, False)
        for load in loads.unfinished:
            self._on_load(load, True)

    async def _learn(self, key: str) -> None:
        """Finds out whether a small log object is a fence: by reading it, checksum and all."""
        if key in self._fences:
            return
        try:
            record = await self._replica.wal.read(Slot(number_of(key)))
        except Corrupt as error:
            # It may be a fence, so it stays; the rest is collected all the same.
            _log.error("garbage_unreadable", shard=self._replica.keys.shard, reason=error.message)
            self._fences[key] = True
            return
        if record is None:
            raise Unavailable(f"{key} vanished while garbage was being looked for")
        self._fences[key] = record.kind is RecordKind.FENCE
