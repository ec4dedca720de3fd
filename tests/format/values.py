"""The values that the files in v1/ hold, and the code that wrote them.

`python -m tests.format.values` writes the files that are missing. It never writes over one: what is
there was written by a released format, and a bucket somewhere looks the same.
"""

import asyncio
import tempfile
from pathlib import Path

import msgpack
import numpy as np
from pyroaring import BitMap

from shoal_cluster.bucket.envelope import EnvelopeKind, encode
from shoal_cluster.bucket.identity import encode_identity
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.control.catalog import Catalog, CollectionRecord
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.ids import (
    CollectionId,
    Epoch,
    ManifestVersion,
    SegmentId,
    Seq,
    ServerId,
    ShardNumber,
    Slot,
)
from shoal_cluster.domain.keys import LoadKeys, ShardKeys
from shoal_cluster.domain.point import Provenance, encode_tail
from shoal_cluster.domain.schema import (
    AttributeType,
    CollectionSchema,
    EmbeddingModel,
    Metric,
)
from shoal_cluster.index.families import CodeShape
from shoal_cluster.index.fast_scan import encode_codes, train_codes
from shoal_cluster.manifest.manifest import FileEntry, Manifest, SegmentEntry
from shoal_cluster.segment.build import SegmentInput, build_segment
from shoal_cluster.segment.deletes import encode_tombstones
from shoal_cluster.shard.deletions import Deletion, encode_deletion
from shoal_cluster.shard.load_objects import (
    Decision,
    Prepared,
    Receipt,
    StagedRows,
    decide,
    give_receipt,
    record_prepared,
    stage_rows,
)
from shoal_cluster.wal.record import (
    EMPTY_BATCH,
    FIRST_PUT_ID,
    OperationBatch,
    RecordKind,
    RequestMark,
    WalIdentity,
    WalRecord,
    encode_record,
)

FOLDER = Path(__file__).parent / "v1"

SCHEMA = CollectionSchema(
    id=CollectionId("0123456789abcdef0123456789abcdef"),
    name="articles",
    dimension=4,
    metric=Metric.COSINE,
    attributes={
        "section": AttributeType.KEYWORD,
        "tags": AttributeType.KEYWORD_LIST,
        "size": AttributeType.INT,
        "score": AttributeType.FLOAT,
        "draft": AttributeType.BOOL,
        "changed": AttributeType.TIMESTAMP,
    },
    partition_by="section",
    shards=4,
    replicas=2,
    recall_target=0.98,
    model=EmbeddingModel(name="minilm", version="6"),
    chunking_rule="paragraph",
    version=3,
)
KEYS = ShardKeys(SCHEMA.id, ShardNumber(2))
IDENTITY = WalIdentity(cluster_uuid=bytes(range(16)), collection=SCHEMA.id, shard=2)
DEAD = BitMap([1, 6])


def tail_of(row: int) -> bytes:
    """Rows differ in which attributes they have; odd ones have provenance."""
    attributes = {
        "section": f"s{row % 3}",
        "tags": ["a", f"t{row}"],
        "size": row - 3,
        "score": row / 2,
        "draft": row % 2 == 0,
        "changed": 1_700_000_000_000 + row,
    }
    del attributes[list(attributes)[row % 6]]
    origin = Provenance(source_id=f"doc-{row}", source_version="7", source_changed_at_ms=row)
    payload = b'{"row": %d}' % row
    return encode_tail(1.5, attributes, payload, origin if row % 2 else Provenance())


ROWS = SegmentInput(
    ids=[f"point-{row}é".encode() for row in range(8)],
    seqs=np.arange(100, 108, dtype=np.uint64),
    vectors=np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2, 3]],
    tails=[tail_of(row) for row in range(8)],
)

FENCE = WalRecord(
    slot=Slot(1),
    epoch=Epoch(1),
    kind=RecordKind.FENCE,
    put_id=b"fence-1 put id..",
    prev_put_id=FIRST_PUT_ID,
    first_seq=Seq(1),
    memtable_start=Slot(1),
    batch=EMPTY_BATCH,
)
RECORD = WalRecord(
    slot=Slot(2),
    epoch=Epoch(1),
    kind=RecordKind.DATA,
    put_id=b"record-2 put id.",
    prev_put_id=FENCE.put_id,
    first_seq=Seq(1),
    memtable_start=Slot(1),
    batch=OperationBatch(
        requests=(
            RequestMark("client-a", 1, 0, 2, 2, False),
            RequestMark("client-b", 9, 2, 1, 1, True),
        ),
        ids=[b"one", b"two", b"one"],
        upserts=b"\x01\x01\x00",
        vectors=np.array([[1, 0, 0, 0], [0, 0.5, -0.5, 0]], dtype=np.float32),
        tails=[tail_of(0), tail_of(1)],
    ),
)
SEGMENT_ID = SegmentId("00000000000000000001-000001-89abcdef")
MANIFEST = Manifest(
    version=ManifestVersion(2),
    parent_put_id=b"manifest-1 putid",
    put_id=b"manifest-2 putid",
    epoch=Epoch(1),
    floor_slot=Slot(2),
    floor_epoch=Epoch(1),
    floor_seq=Seq(107),
    floor_put_id=RECORD.put_id,
    segments=(
        SegmentEntry(
            id=SEGMENT_ID,
            files=(
                FileEntry(
                    name="vectors",
                    key=KEYS.segment(SEGMENT_ID) + "vectors",
                    size_bytes=192,
                    sha256="ab" * 32,
                ),
            ),
            rows=8,
            min_seq=Seq(100),
            max_seq=Seq(107),
            tombstones=FileEntry(
                name="tombstones-0011223344556677",
                key=KEYS.segment(SEGMENT_ID) + "tombstones-0011223344556677",
                size_bytes=60,
                sha256="cd" * 32,
            ),
            dead=2,
            sum=0xFEDCBA9876543210,
            seq_base=60,
        ),
    ),
    dedup=[
        5,
        [
            ["client-a", 1, 0, 0, 3, [[1, 1, 2, 1, 2, False, 3]]],
            ["client-b", 3, 5, 4, 7, [[9, 1, 3, 3, 1, True, 7]]],
        ],
    ],
    schema_version=3,
    sum=0xFEDCBA9876543210,
    loads=("load-1", "load-2"),
)
LOAD_KEYS = LoadKeys(SCHEMA.id, ShardNumber(2), "load-3")
PREPARED = Prepared(epoch=Epoch(1), rows=8, segments=MANIFEST.segments)
DECISION = Decision(commit=True, rows=8, epochs={ShardNumber(2): Epoch(1)})
CLUSTER_UUID = b"the cluster uuid"
CONFORMANCE = {"create_race": [1, 7], "list_lag_ms": 0.5, "store": "local"}
CATALOG_PUT_ID = b"catalog-5 put id"
CATALOG = Catalog(
    collections={
        SCHEMA.id: CollectionRecord(
            schema=SCHEMA,
            assignment=((ServerId("server-1"), ServerId("server-2")),) * SCHEMA.shards,
        )
    },
    dropped=(CollectionId("f" * 32),),
)

DELETION = Deletion(
    epoch=Epoch(2),
    manifest_version=9,
    manifest_put_id=b"manifest 9 put..",
    floor_slot=7,
    wall_ms=1_700_000_000_000,
    segment_objects=("seg/gone/ids", "seg/gone/vectors"),
    slots=((1, 3), (5, 7)),
    versions=((0, 1),),
)


CODED = np.random.default_rng(1).standard_normal((640, 6), dtype=np.float32)


def codes() -> bytes:
    """Returns a codes file over CODED in two lists.

    Trained, so another version of FAISS may make others; what is kept must still be read.
    """
    trained = train_codes(CODED, Metric.L2, CodeShape(values_a_code=1, lists=2), seed=1)
    return b"".join(part.tobytes() for part in encode_codes(trained, CODED.shape[1]))


def encoded() -> dict[str, bytes]:
    """Returns name → bytes, as this version of the code writes them."""

    manifest_header = {"version": MANIFEST.version, "put_id": MANIFEST.put_id}
    catalog_header = {"version": 5, "put_id": CATALOG_PUT_ID}
    floor_header = {"floor": 1, "put_id": b"floor-1 put id.."}
    found = {
        "wal-fence": encode_record(FENCE, IDENTITY),
        "wal-data": encode_record(RECORD, IDENTITY),
        "manifest": encode(
            EnvelopeKind.MANIFEST, manifest_header, msgpack.packb(MANIFEST.to_wire())
        ),
        "manifest-floor": encode(EnvelopeKind.MANIFEST_FLOOR, floor_header),
        "catalog": encode(EnvelopeKind.CATALOG, catalog_header, msgpack.packb(CATALOG.to_wire())),
        "catalog-floor": encode(EnvelopeKind.CATALOG_FLOOR, floor_header),
        "cluster": encode_identity(b"cluster put id..", CLUSTER_UUID, CONFORMANCE),
        "tombstones": encode_tombstones(8, DEAD),
        "deletion": encode_deletion(DELETION, KEYS, b"deletion put id."),
    }
    found |= asyncio.run(_load_objects())
    with tempfile.TemporaryDirectory() as folder:
        built = build_segment(ROWS, SCHEMA, Path(folder), seed=0)
        for file in built.files:
            found[f"segment-{file.name}"] = file.path.read_bytes()
    return found


async def _load_objects() -> dict[str, bytes]:
    """Returns the four objects of a bulk load, as their functions put them."""
    objects: dict[str, bytes] = {}
    store, clock = MemoryStore(objects), SystemClock()
    rows = StagedRows(ids=ROWS.ids, vectors=ROWS.vectors, tails=ROWS.tails)
    put_id = await stage_rows(store, clock, LOAD_KEYS, "0-0", rows)
    receipt = Receipt(digest=7, schema_version=3, rows={ShardNumber(2): 8})
    await give_receipt(store, clock, LOAD_KEYS, "0-0", receipt, put_id)
    await record_prepared(store, clock, LOAD_KEYS, PREPARED, b"prepared put id.")
    await decide(store, clock, LOAD_KEYS, DECISION, b"decision put id.")
    return {
        "load-rows": objects[LOAD_KEYS.rows("0-0")],
        "load-receipt": objects[LOAD_KEYS.receipt("0-0")],
        "load-prepared": objects[LOAD_KEYS.prepared_by(PREPARED.epoch)],
        "load-decision": objects[LOAD_KEYS.decision],
    }


def stored(name: str) -> bytes:
    """Returns the bytes of a file in v1/."""
    return bytes.fromhex((FOLDER / f"{name}.hex").read_text())


def main() -> None:
    for name, body in {**encoded(), "segment-codes": codes()}.items():
        path = FOLDER / f"{name}.hex"
        if not path.exists():
            lines = [body[start : start + 48].hex() for start in range(0, len(body), 48)]
            path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
