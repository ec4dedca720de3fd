"""Builds small segments for the tests of this folder."""

from pathlib import Path

import numpy as np

from shoal_cluster.domain.ids import CollectionId
from shoal_cluster.domain.point import NO_PROVENANCE, encode_tail
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.manifest.manifest import FileEntry
from shoal_cluster.segment.build import BuiltSegment, SegmentInput, build_segment
from shoal_cluster.segment.reader import SegmentReader

ATTRIBUTES = {"section": AttributeType.KEYWORD, "size": AttributeType.INT}


def schema_of(dimension: int, metric: Metric = Metric.COSINE) -> CollectionSchema:
    return CollectionSchema(
        id=CollectionId("0" * 32),
        name="tests",
        dimension=dimension,
        metric=metric,
        attributes=ATTRIBUTES,
    )


def random_rows(count: int, dimension: int, seed: int = 1) -> SegmentInput:
    """Unit vectors around 40 centres; row i has section `s{i % 10}` and size i."""
    centres = np.random.default_rng(0).standard_normal((40, dimension))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, 40, count)] + 0.7 * random.standard_normal(
        (count, dimension)
    )
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    tails = [
        encode_tail(1.0, {"section": f"s{i % 10}", "size": i}, b'{"row": %d}' % i, NO_PROVENANCE)
        for i in range(count)
    ]
    return SegmentInput(
        ids=[b"point-%d" % i for i in range(count)],
        seqs=np.arange(count, dtype=np.uint64) + 1000,
        vectors=vectors,
        tails=tails,
    )


def paths_of(built: BuiltSegment) -> dict[str, Path]:
    return {file.name: file.path for file in built.files}


def entries_of(built: BuiltSegment) -> list[FileEntry]:
    return [
        FileEntry(
            name=file.name,
            key=f"segments/one/{file.name}",
            size_bytes=file.size_bytes,
            sha256=file.sha256,
        )
        for file in built.files
    ]


def build_and_open(
    rows: SegmentInput, directory: Path, metric: Metric = Metric.COSINE
) -> tuple[BuiltSegment, SegmentReader]:
    schema = schema_of(rows.vectors.shape[1], metric)
    built = build_segment(rows, schema, directory, seed=7)
    return built, SegmentReader.open("one", paths_of(built), schema)
