"""Turns memtables into segments, merges segments, and commits both by manifest.

Seal: (1) between two appends freeze the memtables at slot f; (2) have a segment built from their
slots; (3) write tombstones for older segments that lost rows; (4) commit a manifest
with floor f; (5) install it. Compaction: the same without a memtable; rows that died while it ran
are found again in the merged segment by id.

Crash before 4: objects that no manifest lists; the rows are still in the log. Crash after 4: the
next primary, and every follower, loads the manifest.

What fails: an unavailable bucket is waited for. A merge that fails for good is given up, and its
sources are left alone for a while that doubles; they go on being served. A seal that meets a bug or
a limit is tried again after such a pause; writers are held up once the memtables are full. The next
epoch would meet the same, so neither ends this one: each attempt would leave a fence for ever. What
says that this epoch's own state is wrong or deposed does end it.

Invariant L-1: the sum of a sealed manifest equals the sum the log had at its floor.
"""

import asyncio
import functools
import hashlib
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
from pyroaring import BitMap

from shoal_cluster.bucket.create import create
from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import (
    Corrupt,
    Indeterminate,
    Internal,
    InvalidRequest,
    NotFound,
    NotPrimary,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import Epoch, ManifestVersion, SegmentId
from shoal_cluster.domain.keys import segment_id
from shoal_cluster.domain.point import SUM_MODULUS
from shoal_cluster.filtering.bitmaps import from_rows, to_rows
from shoal_cluster.manifest.manifest import FileEntry, Manifest, SegmentEntry
from shoal_cluster.segment.build import SegmentInput
from shoal_cluster.segment.deletes import encode_tombstones
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.building import BuildOrder, rows_of_memtables
from shoal_cluster.shard.compaction import plan_compaction, plan_settling
from shoal_cluster.shard.copying import put_copy
from shoal_cluster.shard.damage import Damage, Part
from shoal_cluster.shard.garbage import GarbageCollector
from shoal_cluster.shard.ports import Publisher
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.state import SealPoint, SegmentView, open_view

_log = structlog.get_logger()

T = TypeVar("T")

SEAL_SLOTS = 2000
"""Slots behind the floor past which a seal is due whatever they hold: bounds takeover's replay."""

SEAL_BYTES = limits.MEMTABLE_BYTES_MAX // 4
"""A memtable of large rows is sealed before it has many: 16 MiB build in half a second."""

_RETRY_S = 0.5
_RETRY_S_MAX = 10.0

MERGE_AGAIN_S_MIN = 60.0
MERGE_AGAIN_S_MAX = 3600.0
"""How long the sources of a merge that failed for good are left alone: each attempt reads them all,
and searches only miss some speed meanwhile."""

_SEAL, _MERGE, _REPAIR, _GARBAGE = "seal", "merge", "repair", "garbage collection"
_MERGE_OF = "merge of "


class Sealer:
    """Seals and compacts for one primary; at most one of each at a time."""

    def __init__(
        self,
        replica: Replica,
        epoch: Epoch,
        publisher: Publisher,
        *,
        between_appends: asyncio.Lock,
        on_lost: Callable[[str], None],
        on_idle: Callable[[], None],
        on_load: Callable[[str, bool], None],
    ) -> None:
        """on_lost: the epoch cannot go on, and why. on_idle: a seal ended, another may be due.

        between_appends: who holds it keeps records from being appended and seals from being begun.
        on_load: of a bulk load whose objects were found; see GarbageCollector.
        """
        self.between_appends = between_appends
        self._replica = replica
        self._epoch = epoch
        self._publisher = publisher
        self.on_lost = on_lost
        self._on_idle = on_idle
        self._committing = asyncio.Lock()
        self._seal: asyncio.Task[None] | None = None
        self._compaction: asyncio.Task[None] | None = None
        self._counter = 0
        self._stopped = False
        self.in_flight: set[SegmentId] = set()
        self._putting: set[SegmentId] = set()
        self._garbage = GarbageCollector(replica, epoch, on_load)
        self._collection: asyncio.Task[None] | None = None
        self._seal_asked = False
        self._repair: asyncio.Task[None] | None = None
        self._failures = replica.failures

    @property
    def busy(self) -> bool:
        return self._seal is not None and not self._seal.done()

    @property
    def behind(self) -> bool:
        """Whether a seal is under way, or the last one failed."""
        return self.busy or self._failures.is_failing(_SEAL)

    @property
    def compacting(self) -> bool:
        return self._compaction is not None and not self._compaction.done()

    def due(self) -> bool:
        """Says whether there is enough to seal and nothing in the way."""
        if self.busy or self._stopped or not self._failures.may_try(_SEAL):
            return False
        return self._is_enough()

    def _is_enough(self) -> bool:
        """Says whether the memtables hold enough for a seal."""
        state = self._replica.state
        return (
            self._seal_asked
            or state.slot - self.manifest().floor_slot >= SEAL_SLOTS
            or sum(memtable.operations for memtable in state.memtables) >= limits.SEAL_OPERATIONS
            or sum(memtable.size_bytes for memtable in state.memtables) >= SEAL_BYTES
        )

    def start(self) -> None:
        """Freezes the memtables and seals them in the background. Call between appends."""
        self._start(self._maybe_compact)

    def _start(self, afterwards: Callable[[], None]) -> None:
        self._seal_asked = False
        point = self._replica.state.rotate()

        async def seal() -> None:
            await self._run_seal(point)
            afterwards()

        self._seal = asyncio.ensure_future(self._guard(_SEAL, seal))
        self._seal.add_done_callback(lambda _: self._on_idle())

    def stop(self) -> None:
        """Stops without waiting; nothing is committed from here on."""
        self._stopped = True
        for work in (_SEAL, _MERGE, _REPAIR, _GARBAGE):
            self._failures.clear(work)
        for task in self._tasks():
            # Not the task that found out that the epoch is over: it is on its way out.
            if task is not asyncio.current_task():
                task.cancel()

    async def close(self) -> None:
        self.stop()
        await asyncio.gather(*self._tasks(), return_exceptions=True)

    def _tasks(self) -> list[asyncio.Task[None]]:
        tasks = (self._seal, self._compaction, self._collection, self._repair)
        return [task for task in tasks if task is not None]

    def tidy(self) -> None:
        """Starts deleting garbage in the background when it is time to."""
        if self._stopped or not self._garbage.due():
            return
        if self._collection is None or self._collection.done():
            self._collection = asyncio.ensure_future(self._collect())

    async def _collect(self) -> None:
        try:
            async with self._committing:
                await self._garbage.collect(self._is_in_flight)
        except Exception as error:  # noqa: BLE001  a bug must not end it without a word
            # Nothing depends on it: the next round tries again, and says so again.
            self._failures.note(error, _GARBAGE)
        else:
            self._failures.clear(_GARBAGE)

    def _is_in_flight(self, segment: SegmentId) -> bool:
        return segment in self.in_flight or segment in self._putting

    async def _guard(self, work: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs background work; see the module for which failures end the epoch."""
        try:
            await run()
        except NotPrimary as error:
            self.on_lost(error.message)
        except Exception as error:  # noqa: BLE001  a bug must not end it without a word
            if isinstance(error, ShoalError) and not isinstance(error, InvalidRequest | Internal):
                _log.error("sealing_failed", shard=self._replica.keys.shard, reason=error.message)
                self.on_lost(error.message)
            else:
                self._failures.note(error, work)
        else:
            self._failures.clear(work)

    async def _run_seal(self, point: SealPoint) -> None:
        keys = self._replica.keys
        entry = await self.build_of_memory(point)
        try:
            reader = await self.open(entry)
            await self._when_possible(lambda: self._commit_seal(point, entry, reader))
        finally:
            self.landed(entry)
        _log.info(
            "segment_sealed",
            shard=keys.shard,
            segment=None if entry is None else entry.id,
            rows=0 if entry is None else entry.rows,
            floor=point.floor_slot,
        )

    async def build_of_memory(self, point: SealPoint) -> SegmentEntry | None:
        """Has the segment of the frozen memtables built; None when none of their rows lives."""
        if not any(memtable.operations for memtable in point.memtables):
            return None
        order = BuildOrder(
            schema=self._replica.schema,
            shard=self._replica.keys.shard,
            cluster_uuid=self._replica.ports.cluster_uuid,
            segment=segment_id(self._epoch, 0, ""),
            wal_first=point.first_slot,
            wal_last=point.floor_slot,
        )
        try:
            return await self.build(order)
        except Corrupt as error:
            _log.error("sealing_from_memory", shard=order.shard, reason=error.message)
            return await self.build(order, rows_of_memtables(point.views))

    def settle(self) -> None:
        """Brings a quiet shard closer to one segment and a short log. Call between appends."""
        if self._stopped or self.busy or self.compacting or not self._failures.may_try(_SEAL):
            return
        if self._has_much_to_settle():
            self._start(self._settle_segments)
        else:
            self._settle_segments()

    def _has_much_to_settle(self) -> bool:
        memtables = self._replica.state.memtables
        return sum(memtable.operations for memtable in memtables) >= limits.SETTLE_OPERATIONS

    def _settle_segments(self) -> None:
        if self._has_much_to_settle():
            self._maybe_compact()  # not quiet any more
        elif not self._stopped and not self.compacting:
            self._compact(plan_settling(self._mergeable(), self._replica.schema.dimension))

    def _maybe_compact(self) -> None:
        if self._stopped or self.compacting:
            return
        segments = self._mergeable()
        # Then another seal follows, and this question with it.
        if not self._is_enough() or len(segments) >= limits.SEGMENTS_WHILE_LOADING_MAX:
            self._compact(plan_compaction(segments, self._replica.schema.dimension))

    def _mergeable(self) -> tuple[SegmentEntry, ...]:
        """Returns the segments that no failed merge keeps from being merged."""
        return tuple(
            entry
            for entry in self.manifest().segments
            if self._failures.may_try(f"{_MERGE_OF}{entry.id}")
        )

    def _compact(self, chosen: tuple[SegmentEntry, ...]) -> None:
        if chosen:
            segments = self._replica.state.segments
            sources = tuple(segments[source.id] for source in chosen)
            self._compaction = asyncio.ensure_future(
                self._guard(_MERGE, functools.partial(self._run_compaction, sources))
            )

    async def _run_compaction(self, sources: tuple[SegmentView, ...]) -> None:
        """Merges segments, or gives it up; sources: as they are in the present manifest."""
        try:
            entry = await self._merge(sources)
        except (NotPrimary, NotFound, Indeterminate):
            raise
        except Exception as error:  # noqa: BLE001  whatever it was, the rows are where they were
            # Which source it was the message says, if it was one; all of them wait.
            self._failures.note(
                error,
                *(f"{_MERGE_OF}{source.entry.id}" for source in sources),
                shortest_s=MERGE_AGAIN_S_MIN,
                longest_s=MERGE_AGAIN_S_MAX,
            )
            if isinstance(error, Corrupt):
                self._replica.suspected = True
                self._replica.doubted.update(source.entry.id for source in sources)
            return
        _log.info(
            "segments_compacted",
            shard=self._replica.keys.shard,
            sources=len(sources),
            segment=None if entry is None else entry.id,
            rows=0 if entry is None else entry.rows,
        )
        self._compaction = None
        self._maybe_compact()

    async def _merge(self, sources: tuple[SegmentView, ...]) -> SegmentEntry | None:
        """Builds, opens and commits; returns the new segment's entry, None if no row is left."""
        order = BuildOrder(
            schema=self._replica.schema,
            shard=self._replica.keys.shard,
            cluster_uuid=self._replica.ports.cluster_uuid,
            segment=segment_id(self._epoch, 0, ""),
            sources=tuple(source.entry for source in sources),
        )
        entry = await self.build(order)
        try:
            reader = await self.open(entry)
            await self._when_possible(lambda: self._commit_compaction(sources, entry, reader))
        finally:
            self.landed(entry)
        return entry

    def repair(self, damages: Sequence[Damage]) -> None:
        """Replaces objects that fail their checksum by what this primary holds, or can derive.

        damages: none of a file that holds rows, unless copied. What cannot be done now is asked for
        again.
        """
        parts = {damage.part for damage in damages}
        if Part.LOG in parts and not self.busy:
            self._seal_asked = True
            self._on_idle()
        derived = {damage.segment for damage in damages if damage.part is Part.DERIVED}
        segments = [entry for entry in self._mergeable() if entry.id in derived]
        if segments and not self.compacting:
            self._compact((segments[0],))
        if self._repair is not None and not self._repair.done():
            return
        if parts & {Part.MANIFEST, Part.TOMBSTONES}:
            dead = {damage.segment for damage in damages if damage.part is Part.TOMBSTONES}
            self._repair = asyncio.ensure_future(
                self._guard(_REPAIR, lambda: self._when_possible(lambda: self._commit_again(dead)))
            )
        elif Part.COPIED in parts and self._failures.may_try(_REPAIR):
            keys = {damage.key for damage in damages if damage.part is Part.COPIED}
            self._repair = asyncio.ensure_future(
                self._guard(_REPAIR, lambda: self._put_copies(keys))
            )

    async def _put_copies(self, keys: Set[str]) -> None:
        """Puts cached copies of damaged objects under other names and commits those."""
        replica = self._replica
        chosen = [
            (entry.id, copy)
            for entry in self.manifest().segments
            for copy in replica.ports.files.copies(entry)
            if copy.entry.key in keys
        ]
        replaced: dict[str, FileEntry] = {}
        self._putting.update(segment for segment, _ in chosen)
        try:
            for segment, copy in chosen:
                put = functools.partial(put_copy, replica.ports, replica.keys, segment, copy)
                replaced[copy.entry.key] = await self.until_available("put of a copy", put)
            await self._when_possible(lambda: self._commit_files(replaced))
        except Corrupt as error:
            # The copy has gone bad as well, or what was put has: the finding is no longer right.
            _log.error("copy_not_put", shard=replica.keys.shard, reason=error.message)
        finally:
            # What was put is read back, and what was not is judged anew.
            replica.doubted |= self._putting
            self._putting.clear()

    async def build(
        self, order: BuildOrder, rows: SegmentInput | None = None
    ) -> SegmentEntry | None:
        """Has the segment built, under a new name on every attempt. rows: see Builds.build."""
        builds = self._replica.ports.builds

        async def attempt() -> SegmentEntry | None:
            self._counter += 1
            name = segment_id(self._epoch, self._counter, self._replica.ports.ids.hex(4))
            named = replace(order, segment=name)
            self.in_flight.add(name)
            try:
                # Only a rescue passes rows.
                return await (builds.build(named) if rows is None else builds.build(named, rows))
            except Exception:
                self.in_flight.discard(name)
                raise

        kind = "load" if order.chunks else _MERGE if order.sources else _SEAL
        return await self.until_available(f"build of a {kind}", attempt)

    async def open(self, entry: SegmentEntry | None) -> SegmentReader | None:
        if entry is None:
            return None
        opening = functools.partial(
            self._replica.ports.files.open_reader, entry, self._replica.schema
        )
        return await self.until_available(f"opening segment {entry.id}", opening)

    async def _when_possible(self, commit: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Commits as soon as the bucket takes it: a full disk or an outage costs time only.

        Between attempts others may commit, and garbage collection, which makes space, may run.
        """

        async def attempt() -> None:
            async with self._committing:
                await commit()

        await self.until_available("commit of a manifest", attempt)

    async def until_available(self, work: str, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            while True:
                try:
                    return await attempt()
                except NotPrimary:
                    raise
                except Unavailable as error:
                    pause_s = self._failures.note(
                        error, work, shortest_s=_RETRY_S, longest_s=_RETRY_S_MAX
                    )
                await self._replica.ports.clock.sleep(pause_s)
        finally:
            self._failures.clear(work)

    def landed(self, entry: SegmentEntry | None) -> None:
        """A build's segment is in the manifest, or came to nothing: no more in flight."""
        if entry is not None:
            self.in_flight.discard(entry.id)

    def manifest(self) -> Manifest:
        assert self._replica.manifest is not None, "a primary has loaded a manifest"
        return self._replica.manifest

    async def _commit_seal(
        self, point: SealPoint, entry: SegmentEntry | None, reader: SegmentReader | None
    ) -> None:
        views = []
        # A copy: writes go on meanwhile and replace views, though never what is sealed in them.
        for view in tuple(self._replica.state.segments.values()):
            killed = [memtable.killed_rows(view.entry.id) for memtable in point.memtables]
            views.append(await self._bury(view, np.concatenate(killed)))
        if entry is not None and reader is not None:
            views.append(open_view(entry, reader, BitMap()))
        parent = self.manifest()
        child = replace(
            self.child(parent, views),
            floor_slot=point.floor_slot,
            floor_epoch=point.floor_epoch,
            floor_seq=point.floor_seq,
            floor_put_id=point.floor_put_id,
            dedup=point.dedup,
        )
        if child.sum != point.sum:
            raise Corrupt(
                f"sealed rows sum to {child.sum:016x}, the log to {point.sum:016x} at slot "
                f"{point.floor_slot} (L-1); nothing was committed, the log keeps everything"
            )
        await self._commit(parent, child, views)

    async def _commit_compaction(
        self,
        sources: tuple[SegmentView, ...],
        entry: SegmentEntry | None,
        reader: SegmentReader | None,
    ) -> None:
        dead_before = {source.entry.id: source.sealed_dead for source in sources}
        died: list[bytes] = []
        views = []
        for view in tuple(self._replica.state.segments.values()):
            before = dead_before.get(view.entry.id)
            if before is None:
                views.append(open_view(view.entry, view.reader, view.sealed_dead))
            else:
                died += view.reader.ids_of(to_rows(view.sealed_dead - before))
        if entry is not None and reader is not None:
            # Each was live when the build began, so the merged segment has every one of them.
            rows = reader.lookup(died)
            views.append(await self._bury(open_view(entry, reader, BitMap()), rows))
        parent = self.manifest()
        child = self.child(parent, views)
        if child.sum != parent.sum:
            raise Corrupt(
                f"compaction of {sorted(dead_before)} changed the live rows' sum from "
                f"{parent.sum:016x} "
                f"to {child.sum:016x} (M-1); nothing was committed"
            )
        await self._commit(parent, child, views)

    async def _commit_again(self, segments: Set[SegmentId | None]) -> None:
        """Commits the manifest we have once more, with new tombstones objects for `segments`."""
        views = []
        for view in tuple(self._replica.state.segments.values()):
            entry = view.entry
            if entry.id in segments and entry.tombstones is not None:
                stored = await self._store_tombstones(entry, view.sealed_dead)
                entry = replace(entry, tombstones=stored)
            views.append(open_view(entry, view.reader, view.sealed_dead))
        parent = self.manifest()
        await self._commit(parent, self.child(parent, views), views)

    async def _commit_files(self, replaced: Mapping[str, FileEntry]) -> None:
        """Commits a manifest that lists objects of the same bytes in place of these keys."""
        views = []
        for view in tuple(self._replica.state.segments.values()):
            files = tuple(replaced.get(file.key, file) for file in view.entry.files)
            views.append(open_view(replace(view.entry, files=files), view.reader, view.sealed_dead))
        parent = self.manifest()
        child = self.child(parent, views)
        if child.segments != parent.segments:
            await self._commit(parent, child, views)

    async def _bury(self, view: SegmentView, rows: npt.NDArray[np.int64]) -> SegmentView:
        """Returns the view with `rows` dead for good, their tombstones stored."""
        assert (rows >= 0).all(), "every buried row was found in the segment"
        added = from_rows(rows.astype(np.uint32)) - view.sealed_dead
        if not added:
            return open_view(view.entry, view.reader, view.sealed_dead)
        dead = view.sealed_dead | added
        removed = int(view.reader.hashes_of(to_rows(added)).sum(dtype=np.uint64))
        entry = replace(
            view.entry,
            tombstones=await self._store_tombstones(view.entry, dead),
            dead=len(dead),
            sum=(view.entry.sum - removed) % SUM_MODULUS,
        )
        return open_view(entry, view.reader, dead)

    async def _store_tombstones(self, entry: SegmentEntry, dead: BitMap) -> FileEntry:
        ports = self._replica.ports
        name = f"tombstones-{ports.ids.hex(8)}"
        key = self._replica.keys.segment(entry.id) + name
        body = encode_tombstones(entry.rows, dead)
        digest = hashlib.sha256(body)
        other = await create(
            ports.store,
            key,
            body,
            put_id=digest.digest(),
            read_put_id=lambda found: hashlib.sha256(found).digest(),
            clock=ports.clock,
            deadline_s=None,
        )
        if other is not None:
            raise Corrupt(f"{key} holds somebody else's tombstones; its name should be unique")
        return FileEntry(name=name, key=key, size_bytes=len(body), sha256=digest.hexdigest())

    def child(self, parent: Manifest, views: list[SegmentView]) -> Manifest:
        entries = tuple(view.entry for view in views)
        return replace(
            parent,
            version=ManifestVersion(parent.version + 1),
            parent_put_id=parent.put_id,
            put_id=self._replica.ports.ids.put_id(),
            segments=entries,
            schema_version=self._replica.schema.version,
            sum=sum(entry.sum for entry in entries) % SUM_MODULUS,
        )

    async def _commit(self, parent: Manifest, child: Manifest, views: list[SegmentView]) -> None:
        """Commits and installs. Only this epoch's primary commits, so a conflict ends the epoch."""
        if self._stopped:
            raise NotPrimary(f"epoch {self._epoch} has ended before manifest {child.version}")
        if not await self._replica.manifests.commit(parent, child):
            raise NotPrimary(f"manifest {child.version} was taken by another epoch")
        try:
            self._replica.install(child, views)
        except Corrupt as error:
            # The bucket is ahead of us, and what we hold does not lead there.
            raise NotPrimary(f"manifest {child.version} was committed, but {error}") from error
        self._failures.keep(_MERGE_OF, self._replica.state.segments.keys())
        self._publisher.manifest()
