"""Reads again, very slowly, the segment objects of which replicas only use cached copies.

In the primary of a shard alone: one reader, and the one that can put things right. Nothing to do
where the bucket's own files are mapped. What is found stands until no manifest lists the object;
scrubbing.py hands it on (docs/design/scrubbing.md).

Invariant Z-4: no more than OBJECT_BYTES_PER_S of objects are read in the long run by one server,
and no segment twice within OBJECT_PASS_S unless it is doubted.
"""

from collections.abc import Callable, Mapping

import structlog

from shoal_cluster.domain.errors import ShoalError
from shoal_cluster.domain.ids import CollectionId, SegmentId, ShardNumber
from shoal_cluster.domain.limits import MIB
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.segment import format as layout
from shoal_cluster.segment.salvage import ROW_FILES
from shoal_cluster.shard.damage import Damage, Part
from shoal_cluster.shard.paced_reading import READS_MAX, PacedReader, differs
from shoal_cluster.shard.ports import ShardPorts
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.segment_files import LocalFile

_log = structlog.get_logger()

OBJECT_BYTES_PER_S = 1 * MIB
"""A bucket may charge for requests and transfer: at most 2.7 TB and 330,000 GETs a month and
server (13 cents at $0.0004 a thousand). 100 GB take 28 hours."""
OBJECT_PASS_S = 7 * 24 * 3600.0
"""A segment's objects are read at most so often; fetching a copy has read it too."""

_WORK = "reading objects of the bucket again"


class ObjectScrubber:
    """replicas: those that serve now. copies: reads cached copies, at a rate of their own."""

    def __init__(
        self,
        ports: ShardPorts,
        replicas: Callable[[], Mapping[tuple[CollectionId, ShardNumber], Replica]],
        copies: PacedReader,
    ) -> None:
        self._ports = ports
        self._replicas = replicas
        self._copies = copies
        self._objects = PacedReader(ports.clock, ports.background, bytes_per_s=OBJECT_BYTES_PER_S)
        self._found: dict[SegmentId, tuple[Replica, list[Damage]]] = {}
        self.segments = 0

    @property
    def read_bytes(self) -> int:
        return self._objects.read_bytes

    async def visit_due(self) -> None:
        """Reads the segments whose time has come, of the shards that are led here."""
        replicas = list(self._replicas().values())
        self._found = {
            segment: found for segment, found in self._found.items() if found[0] in replicas
        }
        while (due := self._next()) is not None:
            replica, entry = due
            try:
                await self._visit(replica, entry)
            except ShoalError as error:
                replica.failures.note(error, _WORK)
            else:
                replica.failures.clear(_WORK)

    def damages_of(self, replica: Replica) -> list[Damage]:
        """Returns what was found, is not about to be read again, and is still listed."""
        return [
            damage
            for segment, (finder, damages) in self._found.items()
            if finder is replica and segment not in replica.doubted
            for damage in damages
            if _lists(replica, damage.key)
        ]

    def _next(self) -> tuple[Replica, SegmentEntry] | None:
        """Returns a segment that is due: one that is doubted, if there is one."""
        replicas = self._replicas().values()
        due = [(replica, entry) for replica in replicas for entry in self._due(replica)]
        return min(due, key=lambda each: each[1].id not in each[0].doubted, default=None)

    def _due(self, replica: Replica) -> list[SegmentEntry]:
        manifest = replica.manifest
        if manifest is None or replica.leader is None or not replica.failures.may_try(_WORK):
            return []
        replica.doubted &= {entry.id for entry in manifest.segments}
        return [
            entry
            for entry in manifest.segments
            if self._ports.files.copies(entry)
            and self._ports.files.salvage_of(entry.id) is None
            and (entry.id in replica.doubted or self._is_old(entry.id))
        ]

    def _is_old(self, segment: SegmentId) -> bool:
        if segment in self._found:
            return False  # it waits to be put right
        age_s = self._now_s() - self._ports.files.compared_s(segment)
        # A time that lies ahead says nothing.
        return not 0 <= age_s < OBJECT_PASS_S

    def _now_s(self) -> float:
        return self._ports.clock.wall_ms() / 1000

    async def _visit(self, replica: Replica, entry: SegmentEntry) -> None:
        found = []
        for copy in self._ports.files.copies(entry):
            damage = await self._examine(replica, entry, copy)
            if damage is not None:
                _log.error(
                    "object_damaged",
                    shard=replica.keys.shard,
                    key=damage.key,
                    reason=damage.reason,
                    advice=damage.advice,
                )
                found.append(damage)
        self.segments += 1
        self._found.pop(entry.id, None)
        if entry.id not in replica.state.segments:
            return  # merged away meanwhile, and forgotten
        replica.doubted.discard(entry.id)
        # A finding does not outlive the process: then the next one finds it at once.
        ago_s = OBJECT_PASS_S if found else 0.0
        self._ports.files.mark_compared(entry.id, self._now_s() - ago_s)
        if found:
            self._found[entry.id] = (replica, found)
            # What is said of the replica is to be true of all of it.
            replica.suspected = True

    async def _examine(
        self, replica: Replica, entry: SegmentEntry, copy: LocalFile
    ) -> Damage | None:
        """Returns what is wrong with the object that a copy was made of, None when nothing is."""
        reason = ""
        for _ in range(READS_MAX):
            if not _lists(replica, copy.entry.key):
                return None
            found = await self._objects.digest_of_object(self._ports.store, copy.entry)
            reason = differs(copy.entry, found)
            if not reason:
                return None
        if not _lists(replica, copy.entry.key) or await _is_superseded(replica):
            return None
        return await self._judge(entry.id, copy, reason)

    async def _judge(self, segment: SegmentId, copy: LocalFile, reason: str) -> Damage:
        """Says what a damaged object means, given what has become of its cached copy."""
        file = copy.entry
        found = await self._copies.digest_of_file(copy.path)
        if not differs(file, found):
            return Damage(part=Part.COPIED, key=file.key, reason=reason, segment=segment)
        reason = f"{reason}; the cached copy is {'gone' if found is None else 'damaged'} too"
        if file.name in ROW_FILES:
            part, served = Part.ROWS, True
        else:
            # Only attributes stay mapped; of a copy that is gone the mapping holds the pages.
            part, served = Part.DERIVED, file.name == layout.ATTRIBUTES and found is not None
        return Damage(part=part, key=file.key, reason=reason, segment=segment, served=served)


def _lists(replica: Replica, key: str) -> bool:
    manifest = replica.manifest
    return manifest is not None and any(
        file.key == key for entry in manifest.segments for file in entry.files
    )


async def _is_superseded(replica: Replica) -> bool:
    """Says whether there is a newer manifest than ours: then another leads."""
    newest = await replica.manifests.newest_number()
    return newest is not None and newest > replica.manifest_version
