"""Checks a whole bucket offline: every byte against a checksum, every invariant that can be seen.

Reads only, needs no cluster, and goes on after a problem: each is named with the object that has
it, and what could not be checked because of it is not blamed on others. Objects that nothing lists
are notes, not problems: builds that died, manifests and log data that wait to be collected.

Order: the cluster object, the catalog, then shard by shard the manifests, the files they list, the
segments, the log from the floor on, and at last the readable state they give together.
"""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal_cluster.bucket.envelope import EnvelopeKind, decode
from shoal_cluster.bucket.store import ObjectEntry, Store
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import CollectionId, ManifestVersion, Seq, ShardNumber, Slot
from shoal_cluster.domain.keys import (
    CATALOG_PREFIX,
    CLUSTER_KEY,
    COLLECTIONS_PREFIX,
    LoadKeys,
    ShardKeys,
    number_of,
)
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.manifest.commit import decode_manifest
from shoal_cluster.manifest.invariants import step_violations
from shoal_cluster.manifest.manifest import FileEntry, Manifest, SegmentEntry
from shoal_cluster.manifest.version_log import Version, VersionLog
from shoal_cluster.shard.compute import InlineCompute
from shoal_cluster.shard.deletions import decode_deletion
from shoal_cluster.shard.load_objects import (
    decode_decision,
    read_prepared,
    read_receipt,
    read_rows,
)
from shoal_cluster.shard.segment_checking import (
    Problem,
    check_segment,
    live_ids,
    open_for_check,
)
from shoal_cluster.shard.segment_files import FETCH_PIECE_BYTES, SegmentFiles
from shoal_cluster.shard.state import SegmentView, ShardState
from shoal_cluster.wal.log import Wal, check_follows
from shoal_cluster.wal.record import RecordKind, WalRecord

Progress = Callable[[int, int | None], None]
"""Called with objects done and, when known, in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """problems: by key. notes: what is left over, for people. rows: all that live."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    objects: int
    bytes: int
    collections: int
    shards: int
    rows: int


async def check_bucket(store: Store, *, deep: bool, progress: Progress) -> CheckReport:
    """Checks everything in a bucket; `deep` also recomputes every row's hash and index entries.

    Memory: one shard's unsealed rows and, when deep, one segment's attributes. Fetched segments
    need room in the temporary directory.

    Raises: Conflict when a newer Shoal wrote the bucket; Unavailable when it does not answer.
    """
    entries = await store.list("")
    with tempfile.TemporaryDirectory(prefix="shoal-check-") as folder:
        check = _Check(store, entries, Path(folder), deep, progress)
        await check.run()
    return CheckReport(
        problems=tuple(sorted(check.problems, key=lambda problem: problem.key)),
        notes=tuple(check.notes),
        objects=len(entries),
        bytes=sum(entry.size_bytes for entry in entries),
        collections=check.collections,
        shards=check.shards,
        rows=check.rows,
    )


class _Check:
    """One walk over one bucket."""

    def __init__(
        self,
        store: Store,
        entries: list[ObjectEntry],
        scratch: Path,
        deep: bool,
        progress: Progress,
    ) -> None:
        self._store = store
        self._sizes = {entry.key: entry.size_bytes for entry in entries}
        self._files = SegmentFiles(store, scratch, InlineCompute())
        self._deep = deep
        self._progress = progress
        self._done = 0
        self._cluster_uuid: bytes | None = None
        self._unsound: set[str] = set()
        self._unfinished: set[CollectionId] = set()
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.collections = self.shards = self.rows = 0

    async def run(self) -> None:
        await self._check_cluster()
        schemas = await self._check_catalog()
        await self._check_decisions()
        shards = self._shards_present()
        for keys, found in sorted(shards.items(), key=lambda item: item[0].prefix):
            schema = None if schemas is None else schemas.get(keys.collection)
            if schemas is not None and schema is None:
                self.notes.append(
                    f"{keys.prefix} belongs to no collection of the catalog: {len(found)} objects "
                    "that are being deleted"
                )
            await self._check_shard(
                keys, found, schema, known=schemas is None or schema is not None
            )
        for collection, schema in (schemas or {}).items():
            self.collections += 1
            if collection in self._unfinished:
                self.notes.append(
                    f"{COLLECTIONS_PREFIX}{collection}/ is being created: the catalog lists it "
                    "without an assignment, and whoever serves the bucket next finishes it"
                )
                continue
            for number in range(schema.shards):
                keys = ShardKeys(collection, ShardNumber(number))
                if not any(key.startswith(keys.manifests) for key in shards.get(keys, ())):
                    self._report(f"{keys.manifests}", "M-5", f"shard {number} has no manifest")
        for key in self._sizes:
            if key != CLUSTER_KEY and not key.startswith((CATALOG_PREFIX, COLLECTIONS_PREFIX)):
                self.notes.append(f"{key} is no object of ours")
                self._count()

    def _report(self, key: str, invariant: str, message: str) -> None:
        self._unsound.add(key)
        self.problems.append(Problem(key=key, invariant=invariant, message=message))

    def _count(self) -> None:
        self._done += 1
        self._progress(self._done, len(self._sizes))

    async def _body(self, key: str) -> bytes | None:
        """Returns a small object; reports one that vanished while we looked."""
        body = await self._store.get(key)
        self._count()
        if body is None:
            self.notes.append(f"{key} was deleted while the bucket was being checked")
        return body

    async def _check_cluster(self) -> None:
        if CLUSTER_KEY not in self._sizes:
            self._report(CLUSTER_KEY, "B-4", "the bucket has no cluster object: is it one of ours?")
            return
        body = await self._body(CLUSTER_KEY)
        try:
            header = (
                {} if body is None else decode(body, EnvelopeKind.CLUSTER, key=CLUSTER_KEY).header
            )
            self._cluster_uuid = header.get("cluster_uuid")
        except Corrupt as error:
            self._report(CLUSTER_KEY, "B-4", error.message)

    async def _check_catalog(self) -> dict[CollectionId, CollectionSchema] | None:
        """Returns the schemas of the newest catalog, None when it cannot be read."""
        versions = await self._versions(
            f"{CATALOG_PREFIX}v/",
            EnvelopeKind.CATALOG,
            f"{CATALOG_PREFIX}floor/",
            EnvelopeKind.CATALOG_FLOOR,
        )
        if not versions:
            return {} if not any(key.startswith(CATALOG_PREFIX) for key in self._sizes) else None
        newest = versions[max(versions)]
        if newest is None:
            return None
        key = f"{CATALOG_PREFIX}v/{max(versions):020d}"
        try:
            records = [
                (CollectionSchema.from_wire(entry["schema"]), entry["assignment"])
                for entry in newest.fields["collections"]
            ]
        except (KeyError, ValueError, TypeError) as error:
            self._report(key, "B-4", f"the catalog lacks or contradicts itself in {error}")
            return None
        self._unfinished = {schema.id for schema, assignment in records if not assignment}
        return {schema.id: schema for schema, _ in records}

    async def _versions(
        self, versions: str, kind: EnvelopeKind, floors: str, floor_kind: EnvelopeKind
    ) -> dict[int, Version | None]:
        """Reads all versions and floor markers; None stands for one that is damaged."""
        log = VersionLog(
            self._store,
            versions=versions,
            floors=floors,
            kind=kind,
            floor_kind=floor_kind,
            clock=SystemClock(),
        )
        found: dict[int, Version | None] = {}
        for key in sorted(key for key in self._sizes if key.startswith((versions, floors))):
            body = await self._body(key)
            if body is None:
                continue
            try:
                number = number_of(key)
                if key.startswith(floors):
                    if decode(body, floor_kind, key=key).header.get("floor") != number:
                        raise Corrupt(f"object {key} is the marker of another version")
                    continue
                found[number] = None
                found[number] = log.decode(number, body)
            except Corrupt as error:
                self._report(key, "B-4", error.message)
        return found

    def _shards_present(self) -> dict[ShardKeys, list[str]]:
        """Groups the keys under `c/` by shard; reports those that belong to none."""
        shards: dict[ShardKeys, list[str]] = {}
        for key in self._sizes:
            if not key.startswith(COLLECTIONS_PREFIX):
                continue
            parts = key.split("/")
            if len(parts) == 4 and parts[2] == "load":
                continue
            if len(parts) < 6 or parts[2] != "s" or not parts[3].isdigit():
                self.notes.append(f"{key} is no object of ours")
                self._count()
                continue
            keys = ShardKeys(CollectionId(parts[1]), ShardNumber(int(parts[3])))
            shards.setdefault(keys, []).append(key)
        return shards

    async def _check_shard(
        self, keys: ShardKeys, found: list[str], schema: CollectionSchema | None, *, known: bool
    ) -> None:
        """known: the shard belongs to a collection, or the catalog cannot tell."""
        self.shards += known
        manifests = await self._check_manifests(keys)
        newest = manifests[max(manifests)] if manifests else None
        await self._check_files(keys, found, manifests, newest if known else None)
        views = None
        if newest is not None and schema is not None and known:
            views = await self._check_segments(newest, schema)
        await self._check_deletions(keys, found)
        await self._check_loads(keys, found)
        log = await self._check_log(keys, found, newest if known else None)
        if newest is None or not known:
            return
        if views is None or log is None or schema is None:
            self.rows += sum(entry.live for entry in newest.segments)
            return
        self.rows += self._check_state(keys, newest, schema, views, log)

    async def _check_manifests(self, keys: ShardKeys) -> dict[int, Manifest | None]:
        versions = await self._versions(
            keys.manifests, EnvelopeKind.MANIFEST, keys.floors, EnvelopeKind.MANIFEST_FLOOR
        )
        manifests: dict[int, Manifest | None] = {}
        for number, version in sorted(versions.items()):
            key = f"{keys.manifests}{number:020d}"
            manifests[number] = None
            if version is None:
                continue
            try:
                manifest = manifests[number] = decode_manifest(version, key=key)
            except Corrupt as error:
                self._report(key, "M-1", error.message)
                continue
            parent = manifests.get(ManifestVersion(number - 1))
            for broken in step_violations(parent, manifest) if parent is not None else ():
                self._report(key, "M-5", broken)
        if len(manifests) > 1:
            self.notes.append(f"{keys.manifests} keeps {len(manifests) - 1} older manifests")
        return manifests

    async def _check_files(
        self,
        keys: ShardKeys,
        found: list[str],
        manifests: dict[int, Manifest | None],
        newest: Manifest | None,
    ) -> None:
        """Compares every segment object that any manifest lists with its size and sha256."""
        listed = {file.key: file for manifest in manifests.values() for file in _closure(manifest)}
        for file in _closure(newest):
            if file.key not in self._sizes:
                assert newest is not None
                self._report(file.key, "G-1", f"missing, but manifest {newest.version} lists it")
        loose: dict[str, int] = {}
        for key in sorted(key for key in found if key.startswith(keys.segments)):
            if key in listed:
                await self._check_file(listed[key])
            else:
                segment = key.removeprefix(keys.segments).split("/")[0]
                loose[segment] = loose.get(segment, 0) + 1
            self._count()
        for segment, count in loose.items():
            self.notes.append(f"{keys.segments}{segment}/ has {count} objects that nothing lists")

    async def _check_deletions(self, keys: ShardKeys, found: list[str]) -> None:
        for key in sorted(key for key in found if key.startswith(keys.deletions)):
            body = await self._body(key)
            try:
                if body is not None:
                    decode_deletion(body, keys, key=key)
            except Corrupt as error:
                self._report(key, "B-4", error.message)

    async def _check_loads(self, keys: ShardKeys, found: list[str]) -> None:
        """Reads what bulk loads have staged and prepared; what is decided is checked apart."""
        loads: dict[str, int] = {}
        for key in sorted(key for key in found if key.startswith(keys.loads)):
            load, part, name = key.removeprefix(keys.loads).split("/", 2)
            load_keys = LoadKeys(keys.collection, keys.shard, load)
            loads[load] = loads.get(load, 0) + 1
            self._count()
            try:
                if part == "rows":
                    await read_rows(self._store, load_keys, name)
                elif part == "receipt":
                    await read_receipt(self._store, load_keys, name)
                else:
                    await read_prepared(self._store, load_keys, key)
            except Corrupt as error:
                self._report(key, "B-4", error.message)
        for load, count in loads.items():
            self.notes.append(f"{keys.loads}{load}/ has {count} objects of a bulk load on its way")

    async def _check_decisions(self) -> None:
        for key in sorted(self._sizes):
            parts = key.split("/")
            if key.startswith(COLLECTIONS_PREFIX) and len(parts) == 4 and parts[2] == "load":
                body = await self._body(key)
                try:
                    if body is not None:
                        decode_decision(body, key=key)
                except Corrupt as error:
                    self._report(key, "B-4", error.message)

    async def _check_file(self, file: FileEntry) -> None:
        digest = hashlib.sha256()
        size_bytes = 0
        while True:
            piece = await self._store.get_range(file.key, size_bytes, FETCH_PIECE_BYTES)
            if piece is None:
                self.notes.append(f"{file.key} was deleted while the bucket was being checked")
                return
            digest.update(piece)
            size_bytes += len(piece)
            if len(piece) < FETCH_PIECE_BYTES:
                break
        if (size_bytes, digest.hexdigest()) != (file.size_bytes, file.sha256):
            self._report(
                file.key,
                "S-5",
                f"has {size_bytes} bytes with sha256 {digest.hexdigest()}; the manifest lists "
                f"{file.size_bytes} with {file.sha256}",
            )

    async def _check_segments(
        self, manifest: Manifest, schema: CollectionSchema
    ) -> list[SegmentView] | None:
        """Opens and checks the segments of a manifest; None unless all could be opened."""
        views: list[SegmentView] = []
        owner: dict[bytes, str] = {}
        for entry in manifest.segments:
            if any(file.key in self._unsound for file in _closure_of_segments((entry,))):
                continue
            view = await open_for_check(self._files, entry, schema)
            if isinstance(view, Problem):
                self._report(view.key, view.invariant, view.message)
                continue
            for problem in check_segment(view, deep=self._deep):
                self._report(problem.key, problem.invariant, problem.message)
            views.append(view)
            for point_id in live_ids(view) if self._deep else ():
                if point_id in owner:
                    self._report(
                        entry.files[0].key,
                        "R-2",
                        f"point {point_id.decode(errors='replace')!r} also lives in segment "
                        f"{owner[point_id]}",
                    )
                owner[point_id] = entry.id
        return views if len(views) == len(manifest.segments) else None

    async def _check_log(
        self, keys: ShardKeys, found: list[str], newest: Manifest | None
    ) -> list[WalRecord] | None:
        """Checks all records, and the chain from the floor on; None when it is broken."""
        log: list[WalRecord] = []
        whole = newest is not None
        below = 0
        blind = newest is None  # whether the record before is unknown
        previous: WalRecord | None = None if newest is None else _floor_record(newest)
        for key in sorted(key for key in found if key.startswith(keys.wal)):
            record = await self._record(keys, key)
            if newest is not None and number_of(key) <= newest.floor_slot:
                below += 1
                if record is not None and record.slot == newest.floor_slot:
                    whole &= self._check_floor(key, record, newest)
                continue
            if record is None:
                whole, blind = False, True
                continue
            if newest is not None and record.epoch > newest.epoch:
                self._report(key, "W-3", f"is of epoch {record.epoch}, which no manifest claims")
            try:
                if not blind:
                    check_follows(previous, record)
            except Corrupt as error:
                self._report(key, error.message.split("(")[1].split(":")[0], error.message)
                whole = False
            log.append(record)
            previous, blind = record, False
        if below:
            self.notes.append(f"{keys.wal} keeps {below} records at or below the floor")
        return log if whole else None

    def _check_floor(self, key: str, record: WalRecord, newest: Manifest) -> bool:
        """Compares the record in the floor's slot, if it is still there, with the manifest."""
        if record.kind is RecordKind.FENCE and record.put_id != newest.floor_put_id:
            return True  # put into a collected slot by a claimant that slept; it never led
        if (record.put_id, record.epoch) != (newest.floor_put_id, newest.floor_epoch):
            self._report(key, "W-4", f"manifest {newest.version} names another record as its floor")
            return False
        return True

    async def _record(self, keys: ShardKeys, key: str) -> WalRecord | None:
        body = await self._body(key)
        if body is None:
            return None
        try:
            uuid = self._cluster_uuid
            if uuid is None:  # reported already; here only the record itself is in question
                uuid = decode(body, EnvelopeKind.WAL, key=key).header.get("cluster", b"")
            return Wal(self._store, keys, uuid, SystemClock()).decode(Slot(number_of(key)), body)
        except Corrupt as error:
            self._report(key, "B-4", error.message)
            return None

    def _check_state(
        self,
        keys: ShardKeys,
        manifest: Manifest,
        schema: CollectionSchema,
        views: list[SegmentView],
        log: list[WalRecord],
    ) -> int:
        """Applies the log to the segments as a replica does; returns the living rows."""
        state = ShardState(schema)
        try:
            state.install(manifest, views)
            for record in log:
                state.apply(record)
        except Corrupt as error:
            self._report(f"{keys.manifests}{manifest.version:020d}", "R-1", error.message)
        return state.live


def _closure(manifest: Manifest | None) -> list[FileEntry]:
    """Returns every object that a manifest lists."""
    return [] if manifest is None else _closure_of_segments(manifest.segments)


def _closure_of_segments(segments: Sequence[SegmentEntry]) -> list[FileEntry]:
    files = [file for entry in segments for file in entry.files]
    return files + [entry.tombstones for entry in segments if entry.tombstones is not None]


def _floor_record(manifest: Manifest) -> WalRecord | None:
    """Returns what the first record behind the floor must follow, None at the log's start."""
    if manifest.floor_slot == 0:
        return None
    return WalRecord(
        slot=manifest.floor_slot,
        epoch=manifest.floor_epoch,
        kind=RecordKind.FENCE,
        put_id=manifest.floor_put_id,
        prev_put_id=bytes(16),
        first_seq=Seq(manifest.floor_seq + 1),
        memtable_start=manifest.floor_slot,
    )
