"""What a manifest says: the sealed state of one shard at one version. Pure values.

Invariants are in manifest/README.md and manifest/invariants.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal_cluster.domain.ids import Epoch, ManifestVersion, SegmentId, Seq, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One immutable object of a segment.

    name: `vectors`, `codes`, …. key: its place in the bucket. sha256: lower-case hexadecimal.
    """

    name: str
    key: str
    size_bytes: int
    sha256: str

    def to_wire(self) -> list[Any]:
        return [self.name, self.key, self.size_bytes, self.sha256]

    @staticmethod
    def from_wire(fields: list[Any]) -> "FileEntry":
        return FileEntry(name=fields[0], key=fields[1], size_bytes=fields[2], sha256=fields[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentEntry:
    """One segment as the manifest lists it.

    rows: rows in the files, dead ones included. dead: rows that `tombstones` marks dead; 0 and None
    go together. sum: set checksum (domain/point.py row_hash) of the live rows. seq_base: what is
    added to the sequence numbers in the files: those of a bulk load are made before it is known
    what they will be, of all others 0.
    """

    id: SegmentId
    files: tuple[FileEntry, ...]
    rows: int
    min_seq: Seq
    max_seq: Seq
    tombstones: FileEntry | None
    dead: int
    sum: int
    seq_base: int = 0

    @property
    def live(self) -> int:
        return self.rows - self.dead

    def to_wire(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "files": [file.to_wire() for file in self.files],
            "rows": self.rows,
            "min_seq": self.min_seq,
            "max_seq": self.max_seq,
            "tombstones": None if self.tombstones is None else self.tombstones.to_wire(),
            "dead": self.dead,
            "sum": self.sum,
            "seq_base": self.seq_base,
        }

    @staticmethod
    def from_wire(fields: Mapping[str, Any]) -> "SegmentEntry":
        tombstones = fields["tombstones"]
        return SegmentEntry(
            id=fields["id"],
            files=tuple(FileEntry.from_wire(file) for file in fields["files"]),
            rows=fields["rows"],
            min_seq=fields["min_seq"],
            max_seq=fields["max_seq"],
            tombstones=None if tombstones is None else FileEntry.from_wire(tombstones),
            dead=fields["dead"],
            sum=fields["sum"],
            seq_base=fields["seq_base"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The sealed state of a shard: everything up to and including `floor_slot` is in `segments`.

    parent_put_id chains versions; put_id is this version's own. floor_seq: the last sequence number
    at or before floor_slot; floor_epoch, floor_put_id: of the record in floor_slot, so that the
    chain goes on from here. dedup: answered requests as of floor_slot (shard/dedup.py).
    schema_version: the collection schema the segments were built with. sum: set checksum of all
    live rows, equal to the sum of the segments' sums modulo 2**64. loads: ids of the bulk loads
    committed last, newest at the end.
    """

    version: ManifestVersion
    parent_put_id: bytes
    put_id: bytes
    epoch: Epoch
    floor_slot: Slot
    floor_epoch: Epoch
    floor_seq: Seq
    floor_put_id: bytes
    segments: tuple[SegmentEntry, ...]
    dedup: Any
    schema_version: int
    sum: int
    loads: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Returns the version's contents; its number and put id travel in the object's header."""
        return {
            "parent_put_id": self.parent_put_id,
            "epoch": self.epoch,
            "floor_slot": self.floor_slot,
            "floor_epoch": self.floor_epoch,
            "floor_seq": self.floor_seq,
            "floor_put_id": self.floor_put_id,
            "segments": [segment.to_wire() for segment in self.segments],
            "dedup": self.dedup,
            "schema_version": self.schema_version,
            "sum": self.sum,
            "loads": list(self.loads),
        }

    @staticmethod
    def from_wire(number: int, put_id: bytes, fields: Mapping[str, Any]) -> "Manifest":
        """Reverses `to_wire`. Raises KeyError, ValueError or TypeError for anything else."""
        return Manifest(
            version=ManifestVersion(number),
            parent_put_id=fields["parent_put_id"],
            put_id=put_id,
            epoch=fields["epoch"],
            floor_slot=fields["floor_slot"],
            floor_epoch=fields["floor_epoch"],
            floor_seq=fields["floor_seq"],
            floor_put_id=fields["floor_put_id"],
            segments=tuple(SegmentEntry.from_wire(entry) for entry in fields["segments"]),
            dedup=fields["dedup"],
            schema_version=fields["schema_version"],
            sum=fields["sum"],
            loads=tuple(fields["loads"]),
        )
