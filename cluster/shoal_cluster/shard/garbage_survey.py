"""What garbage collection would delete in a bucket, and what it has deleted. Reads only.

The same planning as the collector's, without a primary: what the newest epoch of a shard made and
no manifest lists may be under construction there, so it counts as kept.
"""

from dataclasses import dataclass

from shoal_cluster.bucket.envelope import EnvelopeKind, decode
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Corrupt, NotFound
from shoal_cluster.domain.ids import CollectionId, ShardNumber, Slot
from shoal_cluster.domain.keys import (
    CLUSTER_KEY,
    COLLECTIONS_PREFIX,
    ShardKeys,
    epoch_of_segment,
    number_of,
)
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.shard.deletions import Deletion, read_deletions, runs
from shoal_cluster.shard.garbage import may_be_fences, plan_garbage, superseded
from shoal_cluster.shard.load_garbage import find_loads, plan_loads
from shoal_cluster.wal.log import Wal
from shoal_cluster.wal.record import RecordKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardGarbage:
    """due: what may be deleted now, told as a deletion that has not happened; None without any.

    deleted: the journal, oldest first. unreadable: objects that are kept because of what they hold.
    """

    keys: ShardKeys
    due: Deletion | None
    deleted: tuple[Deletion, ...]
    unreadable: tuple[str, ...]


async def survey_garbage(store: Store, clock: Clock) -> list[ShardGarbage]:
    """Returns the garbage of every shard that has a manifest, by key.

    Raises: NotFound when the place is no bucket; Corrupt naming the object without which a shard's
    garbage cannot be told; Unavailable.
    """
    body = await store.get(CLUSTER_KEY)
    if body is None:
        raise NotFound(f"the place holds no {CLUSTER_KEY!r} object: it is no bucket")
    uuid = decode(body, EnvelopeKind.CLUSTER, key=CLUSTER_KEY).header["cluster_uuid"]
    shards = set()
    for entry in await store.list(COLLECTIONS_PREFIX):
        parts = entry.key.split("/")
        if len(parts) > 5 and parts[2] == "s" and parts[3].isdigit():
            shards.add(ShardKeys(CollectionId(parts[1]), ShardNumber(int(parts[3]))))
    return [
        await _survey(store, keys, uuid, clock)
        for keys in sorted(shards, key=lambda keys: keys.prefix)
    ]


async def _survey(store: Store, keys: ShardKeys, uuid: bytes, clock: Clock) -> ShardGarbage:
    manifests = Manifests(store, keys, clock)
    # In this order, as the collector does: what is listed was there before the manifest was read.
    segments, wal = await store.list(keys.segments), await store.list(keys.wal)
    found_loads = await find_loads(store, keys)
    manifest = await manifests.newest()
    deleted = tuple(await read_deletions(store, keys))
    if manifest is None:
        return ShardGarbage(keys=keys, due=None, deleted=deleted, unreadable=())
    log = Wal(store, keys, uuid, clock)
    fences: set[str] = set()
    unreadable = []
    for key in may_be_fences(wal, manifest):
        try:
            record = await log.read(Slot(number_of(key)))
        except Corrupt:
            unreadable.append(key)
            continue
        if record is not None and record.kind is RecordKind.FENCE:
            fences.add(key)
    found = plan_garbage(
        keys=keys,
        manifest=manifest,
        epoch=manifest.epoch,
        segments=segments,
        wal=wal,
        loads=plan_loads(found_loads, manifest, keys),
        is_in_flight=lambda segment: epoch_of_segment(segment) == manifest.epoch,
        is_fence=lambda key: key in fences or key in unreadable,
    )
    due = Deletion(
        epoch=manifest.epoch,
        manifest_version=manifest.version,
        manifest_put_id=manifest.put_id,
        floor_slot=manifest.floor_slot,
        wall_ms=0,
        segment_objects=tuple(
            key.removeprefix(keys.prefix) for key in (*found.segment_keys, *found.load_keys)
        ),
        slots=runs(map(number_of, found.wal_keys)),
        versions=runs(superseded(await manifests.versions.numbers(), manifest.version)),
    )
    empty = not (due.segment_objects or due.slots or due.versions)
    return ShardGarbage(
        keys=keys, due=None if empty else due, deleted=deleted, unreadable=tuple(unreadable)
    )
