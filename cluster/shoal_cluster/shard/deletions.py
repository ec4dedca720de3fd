"""The journal of deletions: which objects a shard's garbage collection deleted, when and why.

One object for each round that deletes, put before the first deletion, so that the bucket itself
can tell what became of an object that is gone: docs/design/segments-and-manifests.md. Nothing
depends on it, and the oldest entries go when there are more than ENTRIES_KEPT.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import structlog

from shoal_cluster.bucket.create import create
from shoal_cluster.bucket.envelope import EnvelopeKind, decode, encode, put_id_of
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Corrupt, Unavailable
from shoal_cluster.domain.ids import Epoch, IdGenerator
from shoal_cluster.domain.keys import ShardKeys, padded

_log = structlog.get_logger()

ENTRIES_KEPT = 500
"""A shard that always has garbage writes one each 10 s: more than an hour; a quiet one, weeks."""

NOT_LISTED = "no manifest lists it, and whoever made it will not commit it any more"
SEALED = "its slot is at or below the manifest's floor, and it is no fence"
SUPERSEDED = "a newer manifest has replaced it"
LOAD_ENDED = "its bulk load is committed here, or aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What one round deleted, and by which manifest. wall_ms: of the primary's clock, for people.

    segment_objects: keys below the shard's prefix, of bulk loads too. slots, versions: first and
    last of each run of log slots and of manifest versions.
    """

    epoch: Epoch
    manifest_version: int
    manifest_put_id: bytes
    floor_slot: int
    wall_ms: int
    segment_objects: tuple[str, ...] = ()
    slots: tuple[tuple[int, int], ...] = ()
    versions: tuple[tuple[int, int], ...] = ()

    def reason_of(self, keys: ShardKeys, key: str) -> str | None:
        """Returns why `key` was deleted by this round, or None when it was not."""
        name = key.removeprefix(keys.prefix)
        if name in self.segment_objects:
            return _reason_of(keys, name)
        number = key.rsplit("/", 1)[-1]
        if number.isdigit():
            for prefix, found, reason in (
                (keys.wal, self.slots, SEALED),
                (keys.manifests, self.versions, SUPERSEDED),
            ):
                if key.startswith(prefix) and _holds(found, int(number)):
                    return reason
        return None

    def lines(self, keys: ShardKeys) -> list[tuple[str, str]]:
        """Returns (objects, reason) for people, runs of numbers as such."""
        return [
            *((f"{keys.prefix}{name}", _reason_of(keys, name)) for name in self.segment_objects),
            *((_run(keys.wal, run), SEALED) for run in self.slots),
            *((_run(keys.manifests, run), SUPERSEDED) for run in self.versions),
        ]


def runs(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Returns first and last of each run of consecutive numbers. numbers: ascending."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def encode_deletion(deletion: Deletion, keys: ShardKeys, put_id: bytes) -> bytes:
    header = {
        "put_id": put_id,
        "collection": keys.collection,
        "shard": keys.shard,
        "epoch": deletion.epoch,
        "manifest": deletion.manifest_version,
        "manifest_put_id": deletion.manifest_put_id,
        "floor": deletion.floor_slot,
        "wall_ms": deletion.wall_ms,
    }
    fields = {
        "segment_objects": deletion.segment_objects,
        "slots": deletion.slots,
        "versions": deletion.versions,
    }
    return encode(EnvelopeKind.DELETION, header, msgpack.packb(fields))


def decode_deletion(body: bytes, keys: ShardKeys, *, key: str) -> Deletion:
    """Raises: Corrupt naming `key`; Conflict when a newer Shoal wrote it."""
    envelope = decode(body, EnvelopeKind.DELETION, key=key)
    header: Mapping[str, Any] = envelope.header
    try:
        if (header["collection"], header["shard"]) != (keys.collection, keys.shard):
            raise Corrupt(f"object {key} is of another shard; it was copied or misplaced")
        fields = msgpack.unpackb(envelope.payload)
        return Deletion(
            epoch=Epoch(header["epoch"]),
            manifest_version=header["manifest"],
            manifest_put_id=header["manifest_put_id"],
            floor_slot=header["floor"],
            wall_ms=header["wall_ms"],
            segment_objects=tuple(fields["segment_objects"]),
            slots=tuple((first, last) for first, last in fields["slots"]),
            versions=tuple((first, last) for first, last in fields["versions"]),
        )
    except (KeyError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise Corrupt(f"object {key} lacks or contradicts itself in {error}") from error


class DeletionJournal:
    """Writes the entries of one epoch. Entries have names of their own: nobody else writes them."""

    def __init__(
        self, store: Store, keys: ShardKeys, epoch: Epoch, clock: Clock, ids: IdGenerator
    ) -> None:
        self._store = store
        self._keys = keys
        self._epoch = epoch
        self._clock = clock
        self._ids = ids
        self._written = 0
        self._kept: deque[str] | None = None

    async def write(self, deletion: Deletion) -> bool:
        """Puts an entry; False when the bucket refused it for certain: a full disk, or an outage.

        A full disk must not keep garbage from being deleted, or it would stay full.
        """
        self._written += 1
        key = f"{self._keys.deletions}{padded(self._epoch)}-{padded(self._written)}"
        put_id = self._ids.put_id()
        try:
            await create(
                self._store,
                key,
                encode_deletion(deletion, self._keys, put_id),
                put_id=put_id,
                read_put_id=put_id_of,
                clock=self._clock,
                deadline_s=None,
            )
        except Unavailable as error:
            _log.warning("deletion_not_journaled", shard=self._keys.shard, reason=error.message)
            return False
        await self._forget_oldest(key)
        return True

    async def _forget_oldest(self, key: str) -> None:
        if self._kept is None:
            found = await self._store.list(self._keys.deletions)
            self._kept = deque(sorted(entry.key for entry in found if entry.key != key))
        self._kept.append(key)
        while len(self._kept) > ENTRIES_KEPT:
            await self._store.delete(self._kept[0])
            self._kept.popleft()


async def read_deletions(store: Store, keys: ShardKeys) -> list[Deletion]:
    """Returns a shard's journal, oldest first. Raises: Corrupt naming an entry; Unavailable."""
    found: Sequence[str] = sorted(entry.key for entry in await store.list(keys.deletions))
    deletions = []
    for key in found:
        body = await store.get(key)
        if body is not None:  # else it was the oldest just now
            deletions.append(decode_deletion(body, keys, key=key))
    return deletions


def _reason_of(keys: ShardKeys, name: str) -> str:
    return LOAD_ENDED if f"{keys.prefix}{name}".startswith(keys.loads) else NOT_LISTED


def _holds(found: Iterable[tuple[int, int]], number: int) -> bool:
    return any(first <= number <= last for first, last in found)


def _run(prefix: str, run: tuple[int, int]) -> str:
    first, last = run
    return f"{prefix}{padded(first)}" + ("" if first == last else f" to {padded(last)}")
