"""Where everything lies in a bucket. Fixed by format version 1.

    cluster                                     create-once: cluster uuid, conformance result
    catalog/v/{version}    catalog/floor/{version}
    c/{collection}/s/{shard}/wal/{slot}         data or fence; slots contiguous from 1
                            /man/{version}      manifests, contiguous from 0
                            /floor/{version}    markers: versions at or below are being deleted
                            /seg/{segment}/{file}
                            /gc/{epoch}-{number}   what garbage collection deleted, and why
                            /load/{load}/...       a bulk load on its way (docs/design/bulk-load.md)
    c/{collection}/load/{load}                     what was decided of a bulk load

Numbers are zero-padded to 20 digits. Nothing depends on the order of a listing.
"""

from dataclasses import dataclass

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import CollectionId, Epoch, SegmentId, ShardNumber, Slot

CLUSTER_KEY = "cluster"
CATALOG_PREFIX = "catalog/"
COLLECTIONS_PREFIX = "c/"
_DIGITS = 20


def padded(number: int) -> str:
    """Returns the number as every key writes it."""
    return f"{number:0{_DIGITS}d}"


def number_of(key: str) -> int:
    """Returns the number that ends a key written with `padded`.

    Raises: Corrupt naming the key when it ends in anything else: it is not ours.
    """
    text = key.rsplit("/", 1)[1]
    if len(text) != _DIGITS or not (text.isascii() and text.isdigit()):
        raise Corrupt(f"object {key} does not belong here: its name is no number of 20 digits")
    return int(text)


def segment_id(epoch: Epoch, counter: int, unique: str) -> SegmentId:
    """Returns a segment's name; `unique` is 8 random hex digits, so names are never reused."""
    return SegmentId(f"{padded(epoch)}-{counter:06d}-{unique}")


def epoch_of_segment(segment: str) -> Epoch:
    """Returns the epoch that created a segment, which its name carries.

    Raises: Corrupt when the name is not one that `segment_id` makes.
    """
    epoch = segment.split("-", 1)[0]
    if not (epoch.isascii() and epoch.isdigit()):
        raise Corrupt(f"segment name {segment[:80]!r} carries no epoch")
    return Epoch(int(epoch))


@dataclass(frozen=True, slots=True)
class LoadKeys:
    """The keys of one bulk load in one shard; chunks are names of their own."""

    collection: CollectionId
    shard: ShardNumber
    load: str

    @property
    def decision(self) -> str:
        """One for all shards."""
        return f"{COLLECTIONS_PREFIX}{self.collection}/load/{self.load}"

    @property
    def prefix(self) -> str:
        return f"{COLLECTIONS_PREFIX}{self.collection}/s/{self.shard:04d}/load/{self.load}/"

    @property
    def receipts(self) -> str:
        return f"{self.prefix}receipt/"

    @property
    def prepared(self) -> str:
        return f"{self.prefix}prepared/"

    def rows(self, chunk: str) -> str:
        return f"{self.prefix}rows/{chunk}"

    def receipt(self, chunk: str) -> str:
        return f"{self.receipts}{chunk}"

    def prepared_by(self, epoch: Epoch) -> str:
        return f"{self.prepared}{padded(epoch)}"


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The keys of one shard."""

    collection: CollectionId
    shard: ShardNumber

    @property
    def prefix(self) -> str:
        return f"{COLLECTIONS_PREFIX}{self.collection}/s/{self.shard:04d}/"

    @property
    def wal(self) -> str:
        return f"{self.prefix}wal/"

    @property
    def manifests(self) -> str:
        return f"{self.prefix}man/"

    @property
    def floors(self) -> str:
        return f"{self.prefix}floor/"

    @property
    def segments(self) -> str:
        return f"{self.prefix}seg/"

    @property
    def deletions(self) -> str:
        return f"{self.prefix}gc/"

    @property
    def loads(self) -> str:
        return f"{self.prefix}load/"

    def slot(self, slot: Slot) -> str:
        return f"{self.wal}{padded(slot)}"

    def segment(self, segment: SegmentId) -> str:
        return f"{self.segments}{segment}/"
