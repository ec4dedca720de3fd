"""Objects of format version 1 stay readable, and are still written the same."""

import asyncio
import contextlib
from pathlib import Path

import msgpack
import numpy as np
import pytest

from shoal_cluster.bucket.envelope import EnvelopeKind, decode
from shoal_cluster.bucket.identity import open_identity
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.control.catalog import Catalog
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import SystemIdGenerator
from shoal_cluster.domain.keys import CLUSTER_KEY
from shoal_cluster.domain.point import SUM_MODULUS, decode_tail, row_hash
from shoal_cluster.domain.schema import Metric
from shoal_cluster.filtering.expression import AnyOf, Comparison, Exists, Operator, matches
from shoal_cluster.index.families import CodeShape, Effort
from shoal_cluster.index.fast_scan import decode_codes
from shoal_cluster.manifest.commit import decode_manifest
from shoal_cluster.manifest.version_log import Version
from shoal_cluster.segment.deletes import decode_tombstones
from shoal_cluster.segment.format import REQUIRED_FILES
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.deletions import decode_deletion
from shoal_cluster.shard.load_objects import (
    read_decision,
    read_prepared,
    read_receipt,
    read_rows,
)
from shoal_cluster.wal.record import WalRecord, decode_record
from tests.format import values

NAMES = sorted(path.stem for path in values.FOLDER.glob("*.hex"))
NOT_REPEATABLE = {"segment-payload", "segment-codes"}
"""Compressed or trained by a library: other versions of it may write other bytes."""
SEGMENT_FILES = ("vectors", "ids", "payload", "attributes", "meta")


def kinds_of(name: str) -> list[EnvelopeKind]:
    kinds = []
    for kind in EnvelopeKind:
        with contextlib.suppress(Corrupt):
            decode(values.stored(name), kind, key=name)
            kinds.append(kind)
    return kinds


def test_every_kind_of_object_is_here():
    enveloped = {kind for name in NAMES for kind in kinds_of(name)}
    # A probe's objects are read by the process that wrote them, at once, and by nobody else.
    assert enveloped == set(EnvelopeKind) - {EnvelopeKind.PROBE}
    assert set(SEGMENT_FILES) == set(REQUIRED_FILES)
    assert set(NAMES) == {
        *("wal-fence", "wal-data", "manifest", "manifest-floor", "catalog", "catalog-floor"),
        *("cluster", "tombstones", "deletion"),
        *("load-rows", "load-receipt", "load-prepared", "load-decision"),
        *(f"segment-{name}" for name in (*SEGMENT_FILES, "codes")),
    }


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_REPEATABLE])
def test_the_same_values_give_the_same_bytes(name):
    assert values.encoded()[name] == values.stored(name)


def decoded(name: str, slot: int) -> WalRecord:
    key = f"{values.KEYS.wal}{slot:020d}"
    return decode_record(values.stored(name), values.IDENTITY, key=key)


def test_the_fence_reads_as_it_was_written():
    fence = decoded("wal-fence", 1)
    assert (fence.slot, fence.epoch, fence.kind) == (1, 1, values.FENCE.kind)
    assert (fence.put_id, fence.prev_put_id) == (values.FENCE.put_id, bytes(16))
    assert (fence.first_seq, fence.memtable_start, len(fence.batch)) == (1, 1, 0)


def test_the_data_record_reads_as_it_was_written():
    record, expected = decoded("wal-data", 2), values.RECORD
    assert (record.slot, record.epoch, record.first_seq) == (2, 1, 1)
    assert (record.put_id, record.prev_put_id) == (expected.put_id, expected.prev_put_id)
    assert record.batch.requests == expected.batch.requests
    assert list(record.batch.ids) == list(expected.batch.ids)
    assert record.batch.upserts == expected.batch.upserts
    assert record.batch.vectors.tolist() == expected.batch.vectors.tolist()
    norm, attributes, payload, provenance = decode_tail(record.batch.tails[1])
    assert (norm, payload) == (1.5, b'{"row": 1}')
    assert attributes == {
        "section": "s1",
        "size": -2,
        "score": 0.5,
        "draft": False,
        "changed": 1_700_000_000_001,
    }
    assert (provenance.source_id, provenance.source_version) == ("doc-1", "7")


def test_the_manifest_reads_as_it_was_written():
    envelope = decode(values.stored("manifest"), EnvelopeKind.MANIFEST, key="manifest")
    version = Version(
        number=envelope.header["version"],
        put_id=envelope.header["put_id"],
        fields=msgpack.unpackb(envelope.payload),
    )
    assert decode_manifest(version, key="manifest") == values.MANIFEST


def test_the_journal_of_deletions_reads_as_it_was_written():
    body = values.stored("deletion")
    assert decode_deletion(body, values.KEYS, key="deletion") == values.DELETION


def test_the_objects_of_a_bulk_load_read_as_they_were_written():
    keys = values.LOAD_KEYS
    prepared_key = keys.prepared_by(values.PREPARED.epoch)
    store = MemoryStore(
        {
            keys.rows("0-0"): values.stored("load-rows"),
            keys.receipt("0-0"): values.stored("load-receipt"),
            prepared_key: values.stored("load-prepared"),
            keys.decision: values.stored("load-decision"),
        }
    )
    rows = asyncio.run(read_rows(store, keys, "0-0"))
    assert (list(rows.ids), list(rows.tails)) == (values.ROWS.ids, values.ROWS.tails)
    assert rows.vectors.tolist() == values.ROWS.vectors.tolist()
    receipt = asyncio.run(read_receipt(store, keys, "0-0"))
    assert (receipt.digest, receipt.schema_version, receipt.rows) == (7, 3, {2: 8})
    assert asyncio.run(read_prepared(store, keys, prepared_key)) == values.PREPARED
    assert asyncio.run(read_decision(store, keys)) == values.DECISION


def test_the_floor_markers_and_the_catalog_read_as_they_were_written():
    marker = decode(values.stored("manifest-floor"), EnvelopeKind.MANIFEST_FLOOR, key="floor")
    assert marker.header["floor"] == 1
    marker = decode(values.stored("catalog-floor"), EnvelopeKind.CATALOG_FLOOR, key="floor")
    assert marker.header["floor"] == 1
    envelope = decode(values.stored("catalog"), EnvelopeKind.CATALOG, key="catalog")
    assert (envelope.header["version"], envelope.header["put_id"]) == (5, values.CATALOG_PUT_ID)
    assert Catalog.from_wire(msgpack.unpackb(envelope.payload)) == values.CATALOG


def test_the_clusters_identity_reads_as_it_was_written():
    store = MemoryStore({CLUSTER_KEY: values.stored("cluster")})
    opening = open_identity(store, store, clock=SystemClock(), ids=SystemIdGenerator())
    identity = asyncio.run(opening)
    assert identity.cluster_uuid == values.CLUSTER_UUID
    assert identity.conformance == values.CONFORMANCE


def test_the_tombstones_read_as_they_were_written():
    assert decode_tombstones(values.stored("tombstones"), 8, key="tombstones") == values.DEAD


@pytest.fixture
def segment(tmp_path: Path) -> SegmentReader:
    paths = {name: tmp_path / name for name in SEGMENT_FILES}
    for name, path in paths.items():
        path.write_bytes(values.stored(f"segment-{name}"))
    return SegmentReader.open("golden", paths, values.SCHEMA)


def test_the_segment_reads_as_it_was_written(segment):
    rows = values.ROWS
    numbers = np.arange(8)
    assert segment.ids_of(numbers) == rows.ids
    assert segment.seqs.tolist() == rows.seqs.tolist()
    assert segment.vectors.tolist() == rows.vectors.tolist()
    assert segment.tails(numbers) == rows.tails
    assert segment.lookup(rows.ids).tolist() == numbers.tolist()
    hashes = [
        row_hash(rows.ids[row], int(rows.seqs[row]), rows.vectors[row].tobytes(), rows.tails[row])
        for row in range(8)
    ]
    assert segment.row_hashes.tolist() == hashes
    assert segment.meta.sum == sum(hashes) % SUM_MODULUS
    assert (segment.meta.min_seq, segment.meta.max_seq) == (100, 107)
    assert segment.meta.schema_version == values.SCHEMA.version


@pytest.mark.parametrize(
    "expression",
    [
        *(Exists(name) for name in values.SCHEMA.attributes),
        Comparison("section", Operator.EQ, "s1"),
        AnyOf("tags", ("t3", "t5")),
        Comparison("size", Operator.GE, 1),
        Comparison("score", Operator.LT, 1.5),
        Comparison("draft", Operator.EQ, True),
        Comparison("changed", Operator.GT, 1_700_000_000_004),
    ],
)
def test_the_segments_filters_answer_as_the_payloads_do(segment, expression):
    expected = [
        row
        for row, tail in enumerate(values.ROWS.tails)
        if matches(expression, decode_tail(tail)[1])
    ]
    assert list(segment.evaluate(expression)) == expected


def test_codes_in_lists_are_read_and_rank_rows_first_by_themselves():
    index = decode_codes(
        np.frombuffer(values.stored("segment-codes"), dtype=np.uint8),
        rows=len(values.CODED),
        dimension=values.CODED.shape[1],
        metric=Metric.L2,
    )

    assert index.shape == CodeShape(values_a_code=1, lists=2)
    found = index.candidates(values.CODED[:50], Effort(depth=5, probes=2))
    assert (found == np.arange(50)[:, np.newaxis]).any(axis=1).mean() > 0.9


def test_a_search_of_the_segment_finds_its_rows(segment):
    hits = segment.search(values.ROWS.vectors[2:3], 2, exact=True)
    assert hits.rows.tolist() == [[2, 6]]
