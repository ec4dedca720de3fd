"""Vectors by memory tier and storage: the same answers from wherever they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.schema import CollectionSchema, MemoryTier, Metric, VectorStorage
from shoal_cluster.domain.vectors import as_stored
from shoal_cluster.segment import format as layout
from shoal_cluster.segment.build import SegmentInput, build_segment
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.segment.residence import ASKED_ROWS_MAX
from shoal_cluster.segment.salvage import read_rows
from tests.unit.segment.rows import paths_of, random_rows, schema_of

ROWS, DIMENSION = 2_000, 300


class Built:
    """One segment's files and the schema they were built with."""

    def __init__(self, directory: Path, storage: VectorStorage, metric: Metric) -> None:
        rows = random_rows(ROWS, DIMENSION)
        vectors = as_stored(rows.vectors, storage, field=str)
        self.rows: SegmentInput = replace(rows, vectors=vectors)
        self.schema: CollectionSchema = replace(schema_of(DIMENSION, metric), storage=storage)
        self.paths = paths_of(build_segment(self.rows, self.schema, directory, seed=7))

    def open(self, tier: MemoryTier) -> SegmentReader:
        return SegmentReader.open("one", self.paths, replace(self.schema, tier=tier))


@pytest.fixture(scope="module", params=VectorStorage)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("segment"), request.param, Metric.COSINE)


QUERIES = random_rows(20, DIMENSION, seed=3).vectors


@pytest.mark.parametrize("tier", MemoryTier)
def test_every_tier_gives_the_same_hits(built: Built, tier: MemoryTier) -> None:
    expected, reader = built.open(MemoryTier.COMPACT), built.open(tier)

    for restriction in ({}, {"exact": True}, {"matching": BitMap(range(0, ROWS, 40))}):
        one, other = (r.search(QUERIES, 10, **restriction) for r in (expected, reader))
        assert np.array_equal(one.keys, other.keys) and np.array_equal(one.rows, other.rows)
    assert reader.tier is tier
    assert np.array_equal(reader.vector(7), built.rows.vectors[7])
    assert np.array_equal(reader.export(np.array([3, 9])).vectors, built.rows.vectors[[3, 9]])


def test_the_full_tier_alone_holds_the_vectors(built: Built) -> None:
    full, compact, disk = (built.open(tier).memory_bytes() for tier in MemoryTier)

    vectors_bytes = ROWS * DIMENSION * built.schema.storage.value_bytes
    assert full.resident_bytes - compact.resident_bytes == vectors_bytes
    assert disk.resident_bytes == compact.resident_bytes < vectors_bytes
    assert disk.mapped_bytes == compact.mapped_bytes > vectors_bytes


def test_a_reader_moves_to_another_tier_and_the_one_before_goes_on(built: Built) -> None:
    compact = built.open(MemoryTier.COMPACT)
    expected = compact.search(QUERIES, 10).rows

    for tier in (MemoryTier.FULL, MemoryTier.DISK, MemoryTier.COMPACT):
        moved = compact.moved_to(tier)
        assert moved.tier is tier
        assert np.array_equal(moved.search(QUERIES, 10).rows, expected)
    assert np.array_equal(compact.search(QUERIES, 10).rows, expected)


def test_a_curve_measured_again_holds_in_every_tier_and_is_never_less_careful(
    built: Built,
) -> None:
    reader = built.open(MemoryTier.COMPACT)
    moved, before, factor = reader.moved_to(MemoryTier.DISK), reader.recall_curve, 0
    for queries in (built.rows.vectors[:40], random_rows(40, DIMENSION, seed=4).vectors):
        for piece in reader.measure_again(np.ascontiguousarray(queries, np.float32), 16):
            assert reader.recall_curve is moved.recall_curve, "not before all were measured"
            piece()
        assert moved.factor(0.98) == reader.factor(0.98) >= factor
        factor = reader.factor(0.98)
    after = {(point.k, point.factor): point.lower for point in moved.recall_curve.points}
    assert [(point.k, point.factor) for point in before.points] == list(after)
    assert all(after[point.k, point.factor] <= point.lower for point in before.points)
    assert moved.recall_curve.queries == before.queries + 80
    assert reader.meta.recall_curve == before


def test_the_disk_is_asked_for_the_pages_of_the_rows_that_are_compared(built: Built) -> None:
    """Rows that share pages, or follow each other, are one call; padding is none."""
    reader = built.open(MemoryTier.DISK)
    residence = reader._residence
    asked: list[tuple[int, int]] = []

    class Mapping:
        def madvise(self, option: int, start: int, length: int) -> None:
            asked.append((start, length))

    object.__setattr__(residence._unordered, "mapping", Mapping())
    row_bytes = DIMENSION * built.schema.storage.value_bytes

    residence.ask_for(np.array([[900, -1], [901, 5]]))

    assert len(asked) == 2
    for (start, length), first, last in zip(asked, (5, 900), (5, 901), strict=True):
        begins, ends = 64 + first * row_bytes, 64 + (last + 1) * row_bytes
        assert start <= begins < start + 4096 and start + length - 4096 < ends <= start + length
    asked.clear()
    residence.ask_for(np.full((2, 3), -1))
    assert asked == []
    residence.ask_for(np.arange(-1, ROWS + ASKED_ROWS_MAX)[: ROWS + 1])
    assert len(asked) == 1


def test_other_tiers_ask_for_nothing(built: Built) -> None:
    for tier in (MemoryTier.FULL, MemoryTier.COMPACT):
        residence = built.open(tier)._residence
        object.__setattr__(residence._unordered, "mapping", None)
        residence.ask_for(np.array([1, 2]))


def test_half_precision_halves_the_file_and_keeps_rows_and_hashes(tmp_path: Path) -> None:
    sizes = {}
    for storage in VectorStorage:
        (tmp_path / storage.value).mkdir()
        built = Built(tmp_path / storage.value, storage, Metric.L2)
        sizes[storage] = built.paths[layout.VECTORS].stat().st_size
        found = read_rows("one", built.paths)
        assert found.vectors.dtype == np.float32
        assert np.array_equal(found.vectors, built.rows.vectors)
    assert sizes[VectorStorage.FLOAT16] - 64 == (sizes[VectorStorage.FLOAT32] - 64) / 2


@pytest.mark.parametrize("metric", Metric)
def test_keys_of_half_precision_rows_are_those_of_the_same_values(
    tmp_path: Path, metric: Metric
) -> None:
    narrow = Built(tmp_path, VectorStorage.FLOAT16, metric)
    reader = narrow.open(MemoryTier.COMPACT)

    hits = reader.search(QUERIES, 10, recall_target=0.98)

    wide = narrow.rows.vectors.astype(np.float64)[hits.rows]
    asked = QUERIES.astype(np.float64)[:, np.newaxis]
    expected = ((asked - wide) ** 2).sum(2) if metric is Metric.L2 else -(asked * wide).sum(2)
    assert np.allclose(hits.keys, expected, atol=1e-5)
    exact = reader.search(QUERIES, 10, exact=True)
    same = hits.rows == exact.rows
    assert same.mean() > 0.9 and np.array_equal(hits.keys[same], exact.keys[same])


def test_a_vectors_file_of_another_storage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "narrow").mkdir()
    (tmp_path / "wide").mkdir()
    narrow = Built(tmp_path / "narrow", VectorStorage.FLOAT16, Metric.L2)
    wide = Built(tmp_path / "wide", VectorStorage.FLOAT32, Metric.L2)
    mixed = {**narrow.paths, layout.VECTORS: wide.paths[layout.VECTORS]}

    with pytest.raises(Corrupt, match="bytes a value"):
        SegmentReader.open("one", mixed, narrow.schema)
