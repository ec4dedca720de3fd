"""What goes into a segment comes out of it, byte for byte."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.domain.point import NO_PROVENANCE, SUM_MODULUS, encode_tail, row_hash
from shoal_cluster.domain.schema import Metric
from shoal_cluster.filtering.expression import Comparison, Exists, Operator, matches
from shoal_cluster.index.families import Family
from shoal_cluster.segment.build import SegmentInput, build_segment
from shoal_cluster.segment.reader import SegmentReader
from tests.unit.segment.rows import build_and_open, paths_of, random_rows, schema_of

IDS = st.one_of(
    st.text("aß\U0001f41f/", min_size=1, max_size=8), st.text(min_size=1, max_size=40)
).map(lambda text: text.encode("utf-8", "replace"))
ATTRIBUTES = st.fixed_dictionaries(
    {}, optional={"section": st.sampled_from(["net", "games", ""]), "size": st.integers(-5, 5)}
)


@st.composite
def segment_inputs(draw: st.DrawFn) -> tuple[SegmentInput, list[dict[str, object]]]:
    ids = draw(st.lists(IDS, min_size=1, max_size=60, unique=True))
    count, dimension = len(ids), draw(st.integers(2, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    attributes = draw(st.lists(ATTRIBUTES, min_size=count, max_size=count))
    # A repeated letter makes payloads that compress; some are larger than a block.
    payloads = [draw(st.sampled_from([b"", b"{}", b"x" * 900, b"y" * 40_000])) for _ in ids]
    seqs = draw(st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count, unique=True))
    rows = SegmentInput(
        ids=ids,
        seqs=np.array(seqs, dtype=np.uint64),
        vectors=np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32),
        tails=[
            encode_tail(1.5, held, payload, NO_PROVENANCE)
            for held, payload in zip(attributes, payloads, strict=True)
        ],
    )
    return rows, attributes


@given(segment_inputs())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_row_is_read_back_exactly(case: tuple[SegmentInput, list[dict[str, object]]]) -> None:
    """Invariant S-4 among others."""
    rows, attributes = case
    with tempfile.TemporaryDirectory() as directory:
        built, reader = build_and_open(rows, Path(directory), Metric.DOT)
        count = len(rows)

        assert built.rows == reader.rows == count
        assert (built.min_seq, built.max_seq) == (min(rows.seqs), max(rows.seqs))
        assert np.array_equal(reader.seqs, rows.seqs)
        assert np.array_equal(reader.vectors, rows.vectors)
        assert [reader.id_of(row) for row in range(count)] == rows.ids
        assert [reader.tail(row) for row in range(count)] == rows.tails
        backwards = np.arange(count)[::-1]
        assert reader.tails(backwards) == rows.tails[::-1]
        assert reader.ids_of(backwards) == rows.ids[::-1]
        assert reader.lookup(rows.ids).tolist() == list(range(count))
        assert [reader.lookup_one(one) for one in rows.ids] == list(range(count))
        hashes = [
            row_hash(rows.ids[i], int(rows.seqs[i]), rows.vectors[i].tobytes(), rows.tails[i])
            for i in range(count)
        ]
        assert reader.row_hashes.tolist() == hashes
        assert built.sum == sum(hashes) % SUM_MODULUS
        for wanted in (Comparison("section", Operator.EQ, "net"), Exists("size")):
            expected = [row for row in range(count) if matches(wanted, attributes[row])]
            assert list(reader.evaluate(wanted)) == expected


def test_ids_that_are_absent_are_not_found(tmp_path: Path) -> None:
    _, reader = build_and_open(random_rows(300, 4), tmp_path)

    wanted = [b"point-7", b"point-300", b"", b"point-", b"point-7x", b"point-299"]

    assert reader.lookup(wanted).tolist() == [7, -1, -1, -1, -1, 299]
    assert [reader.lookup_one(one) for one in wanted] == [7, -1, -1, -1, -1, 299]
    assert reader.lookup([]).tolist() == []


def test_ids_of_one_hash_are_told_apart_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64-bit hashes never collide in a test, so all are made equal."""
    monkeypatch.setattr("xxhash.xxh3_64_intdigest", lambda _: 7)
    _, reader = build_and_open(random_rows(40, 4), tmp_path)

    wanted = [b"point-39", b"point-0", b"absent", b"point-17"]

    assert reader.lookup(wanted).tolist() == [39, 0, -1, 17]
    assert [reader.lookup_one(one) for one in wanted] == [39, 0, -1, 17]


def test_an_exported_selection_builds_an_equal_segment(tmp_path: Path) -> None:
    rows = random_rows(500, 8)
    _, reader = build_and_open(rows, tmp_path)
    chosen = np.arange(0, 500, 3, dtype=np.uint32)

    exported = reader.export(chosen)

    assert exported.ids == [rows.ids[i] for i in chosen]
    assert exported.tails == [rows.tails[i] for i in chosen]
    assert np.array_equal(exported.seqs, rows.seqs[chosen])
    assert np.array_equal(exported.vectors, rows.vectors[chosen])
    (tmp_path / "merged").mkdir()
    built, merged = build_and_open(exported, tmp_path / "merged")
    assert np.array_equal(merged.row_hashes, reader.row_hashes[chosen])
    assert built.sum == int(reader.row_hashes[chosen].sum(dtype=np.uint64))


def test_the_same_rows_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    """Invariant S-1, on any number of threads."""
    rows, schema = random_rows(2000, 300), schema_of(300)
    checksums = []
    for threads, name in ((1, "first"), (1, "second"), (2, "third")):
        (tmp_path / name).mkdir()
        built = build_segment(rows, schema, tmp_path / name, seed=7, threads=threads)
        checksums.append([(file.name, file.sha256) for file in built.files])

    assert checksums[0] == checksums[1] == checksums[2]
    assert "codes" in dict(checksums[0])


def test_a_segment_keeps_its_family_and_curve(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    built, small = build_and_open(random_rows(200, 8), tmp_path / "small")
    _, large = build_and_open(random_rows(2000, 300), tmp_path / "large")

    assert small.family is Family.FLAT and small.recall_curve.points == ()
    assert "codes" not in paths_of(built)
    assert large.family is Family.FAST_SCAN and large.recall_curve.queries == 600
    assert small.statistics["size"].maximum == 199
    assert large.memory_bytes().mapped_bytes > 2000 * 300 * 4
    assert 2000 * 38 < large.memory_bytes().resident_bytes < 2000 * 300


def test_files_may_be_deleted_while_the_segment_is_read(tmp_path: Path) -> None:
    rows = random_rows(100, 8)
    built, reader = build_and_open(rows, tmp_path)

    for file in built.files:
        file.path.unlink()

    assert reader.tail(99) == rows.tails[99]
    assert reader.search(rows.vectors[:1], 1).rows[0, 0] == 0


def test_a_build_never_overwrites_a_file(tmp_path: Path) -> None:
    build_segment(random_rows(10, 4), schema_of(4), tmp_path, seed=1)

    with pytest.raises(Unavailable, match="vectors"):
        build_segment(random_rows(10, 4), schema_of(4), tmp_path, seed=1)


def test_repeated_ids_are_a_programmer_error(tmp_path: Path) -> None:
    """Invariant S-2."""
    rows = random_rows(3, 4)
    twice = SegmentInput(
        ids=[b"a", b"b", b"a"], seqs=rows.seqs, vectors=rows.vectors, tails=rows.tails
    )

    with pytest.raises(AssertionError, match="S-2"):
        build_segment(twice, schema_of(4), tmp_path, seed=1)


def test_an_attribute_declared_later_is_missing_everywhere(tmp_path: Path) -> None:
    built, _ = build_and_open(random_rows(10, 4), tmp_path)

    reader = SegmentReader.open("one", paths_of(built), schema_of(4))

    assert list(reader.evaluate(Exists("declared_later"))) == []
