"""Deletes what no manifest needs any more: log data, old manifests, unreferenced segment objects.

Runs in the primary, beside sealing, on positive evidence only (docs/design/protocol.md, garbage):

1. list the shard's segments and log; then read the newest manifest, which must be of our epoch.
2. a segment object may go when that manifest does not list it and no build or commit of ours is
   about to: names carry their epoch, so what an older epoch left can never be committed again.
3. a log object may go when its slot is at or below the manifest's floor and it holds data. Fences
   stay for ever: they are what stops a primary that slept through several takeovers.
4. manifests below the newest few go after a floor marker says so (manifest/version_log.py).
5. what was found is deleted only after GRACE_S, ascending, and each deletion is logged with the
   version that justified it.

Invariants:
G-1 nothing that the newest manifest lists is deleted.
G-2 no fence is deleted.
Crash anywhere: what is left is found again; a deleted object is never missed, because readers that
meet a missing one read the newest manifest.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from shoal_cluster.bucket.store import ObjectEntry
from shoal_cluster.domain.errors import Corrupt, Unavailable
from shoal_cluster.domain.ids import Epoch, SegmentId, Slot
from shoal_cluster.domain.keys import ShardKeys, epoch_of_segment, number_of
from shoal_cluster.manifest.manifest import Manifest
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
    """What may be deleted, and the manifest version that says so."""

    manifest_version: int
    segment_keys: tuple[str, ...]
    wal_keys: tuple[str, ...]


def plan_garbage(
    *,
    keys: ShardKeys,
    manifest: Manifest,
    epoch: Epoch,
    segments: Iterable[ObjectEntry],
    wal: Iterable[ObjectEntry],
    is_in_flight: Callable[[SegmentId], bool],
    is_fence: Callable[[str], bool],
) -> Garbage:
    """Returns what may be deleted. `manifest` was read after the listings. Pure.

    is_in_flight: whether a segment of our epoch is being built or committed. is_fence: asked only
    of log objects small enough to be one.
    """
    listed = {file.key for entry in manifest.segments for file in entry.files}
    listed |= {entry.tombstones.key for entry in manifest.segments if entry.tombstones is not None}
    loose = []
    for entry in segments:
        segment = SegmentId(entry.key.removeprefix(keys.segments).split("/", 1)[0])
        made_by = epoch_of_segment(segment)
        if entry.key in listed or made_by > epoch:
            continue
        if made_by == epoch and is_in_flight(segment):
            continue
        loose.append(entry.key)
    covered = sorted(
        (number_of(entry.key), entry)
        for entry in wal
        if Slot(number_of(entry.key)) <= manifest.floor_slot
    )
    return Garbage(
        manifest_version=manifest.version,
        segment_keys=tuple(sorted(loose)),
        wal_keys=tuple(
            entry.key
            for _, entry in covered
            if entry.size_bytes > FENCE_BYTES_MAX or not is_fence(entry.key)
        ),
    )


class GarbageCollector:
    """Collects one shard's garbage for its primary. `collect` is called between commits."""

    def __init__(self, replica: Replica, epoch: Epoch) -> None:
        self._replica = replica
        self._epoch = epoch
        self._condemned_s: dict[str, float] = {}
        self._fences: dict[str, bool] = {}
        self._last_s = float("-inf")
        self._behind = False
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
        manifest = await replica.manifests.newest()
        if manifest is None or manifest.epoch != self._epoch:
            return None
        small = {
            entry.key
            for entry in wal
            if entry.size_bytes <= FENCE_BYTES_MAX and number_of(entry.key) <= manifest.floor_slot
        }
        self._fences = {key: found for key, found in self._fences.items() if key in small}
        for key in sorted(small):  # a set of text has another order in every process
            await self._learn(key)
        fences = self._fences
        return plan_garbage(
            keys=keys,
            manifest=manifest,
            epoch=self._epoch,
            segments=segments,
            wal=wal,
            is_in_flight=is_in_flight,
            is_fence=lambda key: fences[key],
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
        found = (*garbage.segment_keys, *garbage.wal_keys)
        self._condemned_s = {key: self._condemned_s.get(key, now_s) for key in found}
        ripe = [key for key in found if now_s - self._condemned_s[key] >= GRACE_S]
        self._behind = len(ripe) > DELETIONS_MAX
        for key in ripe[:DELETIONS_MAX]:
            await self._replica.ports.store.delete(key)
        deleted = ripe[:DELETIONS_MAX]
        keep_from = garbage.manifest_version - MANIFESTS_KEPT + 1
        deleted += await self._replica.manifests.versions.collect(
            keep_from, self._replica.ports.ids.put_id()
        )
        if deleted:
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
