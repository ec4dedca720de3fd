"""Commits a prepared load: one manifest that has its segments, at the end of the log.

Steps 10 to 15 of docs/design/bulk-load.md. Writes are held, so the log's tail is the manifest's
floor, and the rows get the sequence numbers that follow the last one given out. A part of the
sealer in a file of its own: it takes the same steps as a seal, the sealer's.

Invariant L-2: the sum of the manifest equals the log's sum at its floor, and the loaded rows', less
that of the rows they replace.
"""

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import structlog
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt, NotPrimary
from shoal_cluster.domain.ids import SegmentId, Seq
from shoal_cluster.domain.point import SUM_MODULUS
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.sealing import Sealer
from shoal_cluster.shard.state import SealPoint, SegmentView, open_view

_log = structlog.get_logger()

RowNumbers = npt.NDArray[np.int64]
Loaded = Sequence[tuple[SegmentEntry, SegmentReader]]
"""Segments as they were prepared, opened: their sequence numbers count from 1 over the load."""


class LoadCommit:
    """Commits one load for one primary."""

    def __init__(self, replica: Replica, sealer: Sealer, load: str, loaded: Loaded) -> None:
        self._replica = replica
        self._sealer = sealer
        self._load = load
        self._loaded = loaded
        self._replaced: dict[SegmentId, RowNumbers] = {}

    async def run(self) -> None:
        """Returns once the load is in the installed manifest; the same load again does nothing.

        Raises: NotPrimary when the epoch has ended; Corrupt when the sums say that it must.
        """
        await self._find_replaced()
        await self._seal_what_there_is()
        while not await self._commit_between_appends():
            pass
        # Writers were held up; and the segments may be enough to be merged.
        self._sealer._on_idle()
        self._sealer._maybe_compact()

    async def _seal_what_there_is(self) -> None:
        """So that the hold finds little to build."""
        sealer = self._sealer
        async with sealer.between_appends:
            if sealer._stopped:
                return
            memtables = self._replica.state.memtables
            if not sealer.busy and any(memtable.operations for memtable in memtables):
                sealer.start()
        await self._seal_ended()

    async def _seal_ended(self) -> None:
        if self._sealer._seal is not None:
            await asyncio.wait((self._sealer._seal,))

    async def _commit_between_appends(self) -> bool:
        """Freezes the memtables and commits while nothing can be appended.

        False when a seal is under way: it has frozen memtables and will set a floor before ours.
        """
        await self._seal_ended()
        async with self._sealer.between_appends:
            if self._sealer._stopped:
                raise NotPrimary("the epoch has ended; nothing was committed")
            if self._sealer.busy:
                return False
            await self._commit_held(self._replica.state.rotate())
            return True

    async def _find_replaced(self) -> None:
        """Looks in the segments that are there for ids of the load, without holding anything up."""
        for view in tuple(self._replica.state.segments.values()):
            finding = functools.partial(_replaced_rows, view.reader, self._loaded)
            found = await self._replica.ports.background.run(finding)
            self._replaced[view.entry.id] = found

    def _rows_replaced_in(self, view: SegmentView) -> RowNumbers:
        """What was found before; a segment that came since is small, or was merged of others."""
        found = self._replaced.get(view.entry.id)
        return _replaced_rows(view.reader, self._loaded) if found is None else found

    async def _commit_held(self, point: SealPoint) -> None:
        """Called between two appends, with the memtables frozen at the log's tail."""
        if self._load in self._sealer.manifest().loads:
            return
        sealer = self._sealer
        entry = await sealer.build_of_memory(point)
        reader = await sealer.open(entry)
        try:
            await sealer._when_possible(lambda: self._commit(point, entry, reader))
        finally:
            sealer.landed(entry)

    async def _commit(
        self, point: SealPoint, entry: SegmentEntry | None, reader: SegmentReader | None
    ) -> None:
        sealer = self._sealer
        removed = 0
        views = []
        for view in tuple(self._replica.state.segments.values()):
            replaced = self._rows_replaced_in(view)
            removed += _sum(view.reader, view.alive_among(replaced))
            killed = [memtable.killed_rows(view.entry.id) for memtable in point.memtables]
            views.append(await sealer._bury(view, np.unique(np.concatenate([*killed, replaced]))))
        if entry is not None and reader is not None:
            replaced = _replaced_rows(reader, self._loaded)
            removed += _sum(reader, replaced)
            views.append(await sealer._bury(open_view(entry, reader, BitMap()), replaced))
        views += [_numbered(*loaded, point.floor_seq) for loaded in self._loaded]
        added = [view.entry for view in views[-len(self._loaded) :]]
        parent = sealer.manifest()
        rows = sum(loaded.rows for loaded in added)
        child = replace(
            sealer.child(parent, views),
            floor_slot=point.floor_slot,
            floor_epoch=point.floor_epoch,
            floor_seq=Seq(point.floor_seq + rows),
            floor_put_id=point.floor_put_id,
            dedup=point.dedup,
            loads=(*parent.loads, self._load),
        )
        expected = (point.sum + sum(loaded.sum for loaded in added) - removed) % SUM_MODULUS
        if child.sum != expected:
            raise Corrupt(
                f"load {self._load} would make the rows sum to {child.sum:016x} where the log and "
                f"the loaded rows give {expected:016x} (L-2); nothing was committed"
            )
        # Until it is installed here others may show the load: strong reads wait for it.
        self._replica.load_settled.clear()
        try:
            await sealer._commit(parent, child, views)
        finally:
            self._replica.load_settled.set()
        _log.info(
            "load_committed",
            shard=self._replica.keys.shard,
            load=self._load,
            rows=rows,
            segments=len(added),
            manifest_version=child.version,
        )


def _numbered(entry: SegmentEntry, reader: SegmentReader, seq_base: int) -> SegmentView:
    """Returns a prepared segment with the sequence numbers its rows get."""
    numbered = reader.rebased(seq_base)
    entry = replace(
        entry,
        seq_base=seq_base,
        min_seq=Seq(entry.min_seq + seq_base),
        max_seq=Seq(entry.max_seq + seq_base),
        sum=int(numbered.row_hashes.sum(dtype=np.uint64)),
    )
    return open_view(entry, numbered, BitMap())


def _replaced_rows(reader: SegmentReader, loaded: Loaded) -> RowNumbers:
    """Returns the rows of a segment whose ids are in the load, ascending; dead ones too."""
    found = [new.rows_found_in(reader) for _, new in loaded]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)


def _sum(reader: SegmentReader, rows: RowNumbers) -> int:
    return int(reader.hashes_of(rows).sum(dtype=np.uint64))
