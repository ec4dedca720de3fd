"""Mistakes in what goes on beside reads and writes: sealing, merging, collecting garbage."""

from dataclasses import replace
from typing import Any

import numpy as np

from shoal_cluster.domain.ids import Slot
from shoal_cluster.domain.point import SUM_MODULUS
from shoal_cluster.manifest.manifest import Manifest
from shoal_cluster.shard import garbage
from shoal_cluster.shard.garbage import GarbageCollector
from shoal_cluster.shard.sealing import Sealer
from shoal_cluster.shard.state import ShardState
from tests.simulation.mutants.registry import Patch, mutant


@mutant("a newer version does not replace the one in a segment")
def segments_keep_replaced_rows() -> list[Patch]:
    return [(ShardState, "_kill_in_segments", lambda self, ids, memtable: None)]


@mutant("a seal forgets which older rows died meanwhile")
def seal_forgets_tombstones() -> list[Patch]:
    bury = Sealer._bury

    async def broken(self: Sealer, view: Any, rows: Any) -> Any:
        return await bury(self, view, rows[:0])

    return [(Sealer, "_bury", broken)]


@mutant("a seal claims one slot more than it holds")
def floor_too_high() -> list[Patch]:
    rotate = ShardState.rotate

    def broken(self: ShardState) -> Any:
        point = rotate(self)
        return replace(point, floor_slot=Slot(point.floor_slot + 1))

    return [(ShardState, "rotate", broken)]


@mutant("garbage collection deletes fences")
def garbage_deletes_fences() -> list[Patch]:
    async def broken(self: GarbageCollector, key: str) -> None:
        self._fences[key] = False

    return [(GarbageCollector, "_learn", broken)]


@mutant("garbage collection deletes segments that are about to be committed")
def garbage_deletes_builds() -> list[Patch]:
    plan = garbage.plan_garbage

    def broken(**arguments: Any) -> Any:
        return plan(**{**arguments, "is_in_flight": lambda segment: False})

    return [(garbage, "plan_garbage", broken)]


@mutant("garbage collection deletes log data that no segment holds yet")
def garbage_deletes_unsealed_log() -> list[Patch]:
    plan = garbage.plan_garbage

    def broken(**arguments: Any) -> Any:
        manifest = arguments["manifest"]
        higher = replace(manifest, floor_slot=Slot(manifest.floor_slot + 2))
        return plan(**{**arguments, "manifest": higher, "is_fence": lambda key: False})

    return [(garbage, "plan_garbage", broken)]


@mutant("a merge forgets which rows died while it ran")
def merge_forgets_deaths() -> list[Patch]:
    bury = Sealer._bury
    commit = Sealer._commit_compaction

    async def broken(self: Sealer, sources: Any, entry: Any, reader: Any) -> None:
        async def keep(view: Any, rows: Any) -> Any:
            return await bury(self, view, rows[:0])

        self._bury = keep  # type: ignore[method-assign]
        try:
            await commit(self, sources, entry, reader)
        finally:
            del self._bury

    return [(Sealer, "_commit_compaction", broken)]


TOMBSTONE_AGE = 3
"""Manifests. Elasticsearch's 60 s are long too, until a copy is behind by more than that."""


@mutant("tombstones are dropped when they are old, whatever they still hide")
def tombstone_dropped_by_age() -> list[Patch]:
    commit = Sealer._commit

    async def broken(self: Sealer, parent: Manifest, child: Manifest, views: Any) -> None:
        seen: dict[str, int] = self.__dict__.setdefault("seen", {})
        entries = []
        for view in views:
            entry = view.entry
            if entry.tombstones is not None:
                born = seen.setdefault(entry.tombstones.key, child.version)
                if child.version - born >= TOMBSTONE_AGE:
                    total = int(view.reader.row_hashes.sum(dtype=np.uint64)) % SUM_MODULUS
                    entry = replace(entry, tombstones=None, dead=0, sum=total)
            entries.append(entry)
        total = sum(entry.sum for entry in entries) % SUM_MODULUS
        await commit(self, parent, replace(child, segments=tuple(entries), sum=total), views)

    return [(Sealer, "_commit", broken)]
