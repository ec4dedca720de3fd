"""What lies in a shard's `load/`, and what of it may go: the collector's view of bulk loads.

A decided load that is committed here, or aborted, or has no rows here, is garbage, but for the
decision, which stays. What a load without decision has prepared is kept, and so are the segments
it names (G-3).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.ids import SegmentId
from shoal_cluster.domain.keys import LoadKeys, ShardKeys
from shoal_cluster.manifest.manifest import Manifest
from shoal_cluster.shard.load_objects import Decision, Prepared, read_decision, read_prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFound:
    """keys: of all its objects in this shard. prepared: by epoch's key."""

    load: str
    keys: tuple[str, ...]
    decision: Decision | None
    prepared: Mapping[str, Prepared]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """staged: segments to keep. garbage: objects that may go. The others are loads.

    undecided: with the number of their objects here.
    """

    staged: frozenset[SegmentId] = frozenset()
    garbage: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    undecided: Mapping[str, int] = field(default_factory=dict)


async def find_loads(store: Store, keys: ShardKeys) -> list[LoadFound]:
    """Reads what a shard's loads have prepared and what was decided of them.

    Raises: Corrupt naming an object; Unavailable.
    """
    objects: dict[str, list[str]] = {}
    for entry in await store.list(keys.loads):
        load = entry.key.removeprefix(keys.loads).split("/", 1)[0]
        objects.setdefault(load, []).append(entry.key)
    found = []
    for load, names in sorted(objects.items()):
        load_keys = LoadKeys(keys.collection, keys.shard, load)
        decision = await read_decision(store, load_keys)
        wanted = {key for key in names if key.startswith(load_keys.prepared)}
        if decision is not None and keys.shard in decision.epochs:
            # It may have come after the listing; it is gone only if this shard has committed.
            wanted.add(load_keys.prepared_by(decision.epochs[keys.shard]))
        prepared = {}
        for key in wanted:
            one = await read_prepared(store, load_keys, key)
            if one is not None:
                prepared[key] = one
        found.append(
            LoadFound(load=load, keys=tuple(sorted(names)), decision=decision, prepared=prepared)
        )
    return found


def plan_loads(found: Iterable[LoadFound], manifest: Manifest, keys: ShardKeys) -> LoadPlan:
    """Returns what may go and what must stay. `manifest` was read after `find_loads`. Pure."""
    staged: set[SegmentId] = set()
    garbage: list[str] = []
    ended, unfinished = [], []
    undecided = {}
    for one in found:
        if one.decision is None:
            undecided[one.load] = len(one.keys)
            for prepared in one.prepared.values():
                staged |= {entry.id for entry in prepared.segments}
            continue
        epoch = one.decision.epochs.get(keys.shard)
        if epoch is None or one.load in manifest.loads:
            # Aborted, without rows here, or committed.
            garbage += one.keys
            ended.append(one.load)
            continue
        load_keys = LoadKeys(keys.collection, keys.shard, one.load)
        chosen = one.prepared.get(load_keys.prepared_by(epoch))
        if chosen is not None:
            staged |= {entry.id for entry in chosen.segments}
        unfinished.append(one.load)
    return LoadPlan(
        staged=frozenset(staged),
        garbage=tuple(garbage),
        ended=tuple(ended),
        unfinished=tuple(unfinished),
        undecided=undecided,
    )
