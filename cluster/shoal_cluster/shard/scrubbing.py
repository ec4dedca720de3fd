"""Reads again, slowly and for ever, everything the replicas of one server depend on.

Checksums are compared whenever something is loaded; the scrubber finds what is damaged later, while
there is still a copy: in another server's cache, in a primary's memory, in the files that others
are derived from. What it finds, shard/host.py acts on; docs/design/scrubbing.md says how and why.

Invariants:
Z-1 a replica that serves from damaged bytes stops serving, whatever else becomes of it.
Z-2 nothing is called damaged that a newer manifest has made garbage.
Z-3 no more than SCRUB_BYTES_PER_S are read in the long run, by all passes of a server together.

On an object store replicas read copies; the objects are read by object_scrubbing.py.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import Any

import structlog

from shoal_cluster.domain.errors import Corrupt, ShoalError
from shoal_cluster.domain.ids import CollectionId, ShardNumber, Slot
from shoal_cluster.domain.limits import MIB
from shoal_cluster.manifest.manifest import FileEntry, Manifest, SegmentEntry
from shoal_cluster.segment import format as layout
from shoal_cluster.segment.salvage import ROW_FILES
from shoal_cluster.shard.damage import Damage, Part
from shoal_cluster.shard.object_scrubbing import ObjectScrubber
from shoal_cluster.shard.paced_reading import READS_MAX, PacedReader, differs
from shoal_cluster.shard.ports import ShardPorts
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.segment_files import LocalFile
from shoal_cluster.wal.log import check_follows
from shoal_cluster.wal.record import WalRecord

_log = structlog.get_logger()

SCRUB_BYTES_PER_S = 8 * MIB
"""1 % of a core for hashing, and 100 GB in three and a half hours."""
PASS_S = 3600.0
"""A replica is read at most so often: loading has checked everything just before."""
RECHECK_S = 60.0
"""A replica with damage, or whose pass was cut short, is read again so much later."""
ROUND_S = 5.0
"""How soon a suspicion, or a salvaged segment, is looked at."""

_SCRUB = "scrubbing"
_SERVED_FILES = (*ROW_FILES, layout.ATTRIBUTES)
"""Mapped while a segment is open; `codes` and `meta` are copied into memory."""

ShardName = tuple[CollectionId, ShardNumber]


class Scrubber:
    """Visits one replica after the other.

    replicas: those that serve now. treat: told after a pass what was found, nothing included, and
    at once when a replica must stop serving.
    """

    def __init__(
        self,
        ports: ShardPorts,
        replicas: Callable[[], Mapping[ShardName, Replica]],
        treat: Callable[[ShardName, Replica, Sequence[Damage]], None],
    ) -> None:
        self._ports = ports
        self._replicas = replicas
        self._treat = treat
        self._due: dict[ShardName, tuple[Replica, float]] = {}
        self._reader = PacedReader(ports.clock, ports.background, bytes_per_s=SCRUB_BYTES_PER_S)
        self.objects = ObjectScrubber(ports, replicas, self._reader)
        self.passes = 0

    @property
    def read_bytes(self) -> int:
        return self._reader.read_bytes

    async def run(self) -> None:
        """Scrubs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self.visit_due))
            group.create_task(self._repeat(self.objects.visit_due))

    async def _repeat(self, visit_due: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await self._ports.clock.sleep(ROUND_S)
            try:
                await visit_due()
            except Exception as error:  # noqa: BLE001  a bug must not end it without a word
                _log.error("scrubbing_met_a_bug", exc_info=error)

    async def visit_due(self) -> None:
        """Goes through the replicas whose time has come."""
        replicas = self._replicas()
        self._due = {name: due for name, due in self._due.items() if name in replicas}
        for name, replica in replicas.items():
            standing = self._standing(replica)
            if standing:
                self._treat(name, replica, standing)
            if not any(damage.served for damage in standing) and self._is_due(name, replica):
                await self._visit(name, replica)

    async def scrub(self, replica: Replica) -> AsyncGenerator[Damage]:
        """Reads everything a replica depends on once; yields what fails its check.

        Raises: Unavailable when the bucket does not answer.
        """
        manifest = replica.manifest
        if manifest is None:
            return
        for part in (
            self._scrub_manifest(replica, manifest),
            self._scrub_segments(replica, manifest),
            self._scrub_log(replica, manifest),
        ):
            async with contextlib.aclosing(part):
                async for damage in part:
                    yield damage
        for damage in self._standing(replica):
            yield damage

    def _is_due(self, name: ShardName, replica: Replica) -> bool:
        now_s = self._ports.clock.monotonic_s()
        known, due_s = self._due.get(name, (None, 0.0))
        if known is not replica:
            self._due[name] = (replica, now_s + PASS_S)
            return replica.suspected
        return replica.suspected or now_s >= due_s

    async def _visit(self, name: ShardName, replica: Replica) -> None:
        replica.suspected = False
        found: list[Damage] = []
        delay_s = PASS_S
        try:
            async with contextlib.aclosing(self.scrub(replica)) as damages:
                async for damage in damages:
                    _log.error("damage_found", shard=name[1], key=damage.key, reason=damage.reason)
                    found.append(damage)
                    if damage.served:
                        break
            self._treat(name, replica, found)
        except Exception as error:  # noqa: BLE001  a bug must not end it without a word
            delay_s = max(RECHECK_S, replica.failures.note(error, _SCRUB))
        else:
            replica.failures.clear(_SCRUB)
            self.passes += 1
        if found:
            delay_s = RECHECK_S
        self._due[name] = (replica, self._ports.clock.monotonic_s() + delay_s)

    def _standing(self, replica: Replica) -> list[Damage]:
        """Returns the damage that is known of and waits for the primary."""
        return [*self._salvaged(replica), *self.objects.damages_of(replica)]

    def _salvaged(self, replica: Replica) -> list[Damage]:
        """Returns a damage for each segment that could be opened only by building it again."""
        found = []
        for segment in replica.state.segments:
            salvage = self._ports.files.salvage_of(segment)
            if salvage is not None:
                found.append(
                    Damage(
                        part=Part.DERIVED,
                        key=f"{replica.keys.segment(segment)}",
                        reason=salvage.reason,
                        segment=segment,
                    )
                )
        return found

    async def _scrub_manifest(self, replica: Replica, manifest: Manifest) -> AsyncGenerator[Damage]:
        key = f"{replica.keys.manifests}{manifest.version:020d}"
        reason = ""
        for _ in range(READS_MAX):
            try:
                version = await replica.manifests.versions.read(manifest.version)
            except Corrupt as error:
                reason = error.message
                continue
            if version is not None and version.put_id == manifest.put_id:
                return
            reason = f"object {key} is gone, or is not what was committed there"
            break
        if not await self._is_superseded(replica, manifest):
            yield Damage(part=Part.MANIFEST, key=key, reason=reason)

    async def _scrub_segments(self, replica: Replica, manifest: Manifest) -> AsyncGenerator[Damage]:
        for entry in manifest.segments:
            if entry.tombstones is not None:
                reason = await self._tombstones_reason(entry)
                if reason and _lists_tombstones(replica, entry.tombstones):
                    yield Damage(
                        part=Part.TOMBSTONES,
                        key=entry.tombstones.key,
                        reason=reason,
                        segment=entry.id,
                    )
            if entry.id not in replica.state.segments:
                continue
            for file in self._ports.files.local_files(entry):
                damage = await self._scrub_file(replica, manifest, entry, file)
                if damage is not None:
                    yield damage

    async def _tombstones_reason(self, entry: SegmentEntry) -> str:
        """Returns what is wrong with the tombstones object, '' when nothing is."""
        reason = ""
        for _ in range(READS_MAX):
            try:
                await self._ports.files.tombstones(entry)
            except ShoalError as error:
                if not isinstance(error, Corrupt) and error.kind != "not_found":
                    raise
                reason = error.message
            else:
                await self._reader.pace(
                    0 if entry.tombstones is None else entry.tombstones.size_bytes
                )
                return ""
        return reason

    async def _scrub_file(
        self, replica: Replica, manifest: Manifest, entry: SegmentEntry, file: LocalFile
    ) -> Damage | None:
        reason = ""
        for _ in range(READS_MAX):
            found = await self._reader.digest_of_file(file.path)
            reason = differs(file.entry, found)
            if not reason:
                return None
            if found is None:
                if file.fetched or await self._is_superseded(replica, manifest):
                    return None  # a copy that was cleared away; the mapping holds its pages
                break
        if entry.id not in replica.state.segments:
            return None
        served = file.entry.name in _SERVED_FILES
        if file.fetched and not served:
            # Nobody reads this copy: the next opening fetches another.
            file.path.unlink(missing_ok=True)
            replica.doubted.add(entry.id)  # the object is all that is left
            _log.warning("cached_copy_removed", path=str(file.path), reason=reason)
            return None
        return Damage(
            part=Part.ROWS if file.entry.name in ROW_FILES else Part.DERIVED,
            key=file.entry.key,
            reason=reason,
            segment=entry.id,
            served=served,
            fetched=file.fetched,
        )

    async def _scrub_log(self, replica: Replica, manifest: Manifest) -> AsyncGenerator[Damage]:
        """Checks the slots that only memtables cover, as far as this replica has applied them."""
        previous: WalRecord | None = None
        for number in range(manifest.floor_slot + 1, replica.state.slot + 1):
            slot = Slot(number)
            if _is_sealed(replica, slot):
                previous = None
                continue
            record, reason = await self._read_slot(replica, slot, previous)
            previous = record
            if (
                reason
                and not _is_sealed(replica, slot)
                and not await self._is_superseded(replica, manifest)
            ):
                yield Damage(part=Part.LOG, key=replica.keys.slot(slot), reason=reason)

    async def _read_slot(
        self, replica: Replica, slot: Slot, previous: WalRecord | None
    ) -> tuple[WalRecord | None, str]:
        """Returns the record, and what is wrong with it or ''."""
        key = replica.keys.slot(slot)
        reason = ""
        for _ in range(READS_MAX):
            body = await self._ports.store.get(key)
            if body is None:
                return None, f"object {key} is gone"
            await self._reader.pace(len(body))
            try:
                record = replica.wal.decode(slot, body)
                if previous is not None:
                    check_follows(previous, record)
                return record, ""
            except Corrupt as error:
                reason = error.message
        return None, reason

    async def _is_superseded(self, replica: Replica, manifest: Manifest) -> bool:
        newest = await replica.manifests.newest_number()
        return newest is not None and newest > manifest.version


def _lists_tombstones(replica: Replica, tombstones: FileEntry) -> bool:
    return any(
        view.entry.tombstones is not None and view.entry.tombstones.key == tombstones.key
        for view in replica.state.segments.values()
    )


def _is_sealed(replica: Replica, slot: Slot) -> bool:
    return replica.manifest is not None and slot <= replica.manifest.floor_slot
