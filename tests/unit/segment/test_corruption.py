"""Damaged files are found and named; none crashes the process."""

from pathlib import Path

import numpy as np
import pytest

from shoal_cluster.domain.errors import Conflict, Corrupt
from shoal_cluster.domain.schema import Metric
from shoal_cluster.segment.build import BuiltSegment, build_segment
from shoal_cluster.segment.meta import decode_meta, encode_meta
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.segment.verification import verify_files
from tests.unit.segment.rows import entries_of, paths_of, random_rows, schema_of

NAMES = ["vectors", "codes", "ids", "payload", "attributes", "meta"]
SCHEMA = schema_of(48)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> BuiltSegment:
    # 12,001 × 48 is just past the flat limit, so that there are codes.
    return build_segment(random_rows(12_001, 48), SCHEMA, tmp_path_factory.mktemp("one"), seed=7)


def copied(built: BuiltSegment, directory: Path) -> dict[str, Path]:
    paths = {}
    for name, path in paths_of(built).items():
        paths[name] = directory / name
        paths[name].write_bytes(path.read_bytes())
    return paths


def sampled_positions(size: int) -> list[int]:
    spread = np.random.default_rng(3).integers(0, size, 6).tolist()
    return sorted({0, 8, min(63, size - 1), size // 2, size - 1, *spread})


def test_an_untouched_segment_verifies(pristine: BuiltSegment) -> None:
    assert sorted(paths_of(pristine)) == sorted(NAMES)

    verify_files(paths_of(pristine), entries_of(pristine))


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_anywhere_is_found_and_the_file_named(
    pristine: BuiltSegment, tmp_path: Path, name: str
) -> None:
    """Invariant S-5."""
    paths = copied(pristine, tmp_path)
    body = bytearray(paths[name].read_bytes())
    for position in sampled_positions(len(body)):
        body[position] ^= 0x10
        paths[name].write_bytes(body)

        with pytest.raises(Corrupt, match=f"segments/one/{name} has sha256"):
            verify_files(paths, entries_of(pristine))

        body[position] ^= 0x10


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_or_of_another_length_is_named(
    pristine: BuiltSegment, tmp_path: Path, name: str
) -> None:
    paths = copied(pristine, tmp_path)
    body = paths[name].read_bytes()
    for contents in (b"", body[:-1], body + b"x"):
        paths[name].write_bytes(contents)
        with pytest.raises(Corrupt, match=f"segments/one/{name} has {len(contents)} bytes"):
            verify_files(paths, entries_of(pristine))

    paths[name].unlink()
    with pytest.raises(Corrupt, match=f"segments/one/{name} cannot be read"):
        verify_files(paths, entries_of(pristine))
    del paths[name]
    with pytest.raises(Corrupt, match=f"segments/one/{name} is missing"):
        verify_files(paths, entries_of(pristine))


@pytest.mark.parametrize("name", NAMES)
def test_opening_a_cut_file_fails_cleanly(
    pristine: BuiltSegment, tmp_path: Path, name: str
) -> None:
    """Opening reads no checksums of large files, but never reads past an end."""
    paths = copied(pristine, tmp_path)
    body = paths[name].read_bytes()
    for length in (0, 1, 63, 64, len(body) // 2, len(body) - 1):
        paths[name].write_bytes(body[:length])

        with pytest.raises(Corrupt):
            SegmentReader.open("one", paths, SCHEMA)


@pytest.mark.parametrize("name", NAMES)
def test_opening_without_a_file_fails_cleanly(pristine: BuiltSegment, name: str) -> None:
    paths = paths_of(pristine)
    del paths[name]

    with pytest.raises(Corrupt, match=name):
        SegmentReader.open("one", paths, SCHEMA)


@pytest.mark.parametrize("name", ["vectors", "ids", "payload", "codes", "attributes", "meta"])
def test_a_file_of_another_segment_is_refused(
    pristine: BuiltSegment, tmp_path: Path, name: str
) -> None:
    """Invariant S-3."""
    other = build_segment(random_rows(12_002, 48), SCHEMA, tmp_path, seed=7)
    paths = paths_of(pristine) | {name: paths_of(other)[name]}

    with pytest.raises(Corrupt):
        SegmentReader.open("one", paths, SCHEMA)


def test_a_collection_of_another_shape_is_refused(pristine: BuiltSegment) -> None:
    for schema in (schema_of(49), schema_of(48, Metric.L2)):
        with pytest.raises(Corrupt, match="collection tests"):
            SegmentReader.open("one", paths_of(pristine), schema)


def test_a_damaged_payload_block_is_refused_when_read(
    pristine: BuiltSegment, tmp_path: Path
) -> None:
    paths = copied(pristine, tmp_path)
    body = bytearray(paths["payload"].read_bytes())
    body[200] ^= 1  # inside the first block
    paths["payload"].write_bytes(body)
    reader = SegmentReader.open("one", paths, SCHEMA)

    with pytest.raises(Corrupt, match="payload block 0"):
        reader.tail(0)
    assert reader.tail(12_000) == random_rows(12_001, 48).tails[12_000]


def test_a_newer_format_is_told_from_damage(
    pristine: BuiltSegment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = copied(pristine, tmp_path)
    monkeypatch.setattr("shoal_cluster.segment.meta.FORMAT_VERSION", 2)
    meta = decode_meta(paths["meta"].read_bytes(), key="one/meta")
    paths["meta"].write_bytes(encode_meta(meta))
    monkeypatch.undo()

    with pytest.raises(Conflict, match="upgrade the server"):
        SegmentReader.open("one", paths, SCHEMA)


@pytest.mark.parametrize("name", ["vectors", "ids", "payload"])
def test_a_newer_format_of_one_file_is_told_from_damage(
    pristine: BuiltSegment, tmp_path: Path, name: str
) -> None:
    paths = copied(pristine, tmp_path)
    body = bytearray(paths[name].read_bytes())
    body[8:12] = (2).to_bytes(4, "little")
    paths[name].write_bytes(body)

    with pytest.raises(Conflict, match="format 2, this server reads up to 1; upgrade the server"):
        SegmentReader.open("one", paths, SCHEMA)
