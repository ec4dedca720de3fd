"""ShardState and Memtable by themselves: records in, readable rows out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyroaring import BitMap

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.domain.ids import Epoch, ManifestVersion, SegmentId, Seq, Slot
from shoal_cluster.domain.point import NO_PROVENANCE, SUM_MODULUS, encode_tail, row_hash
from shoal_cluster.domain.schema import AttributeType
from shoal_cluster.manifest.manifest import Manifest, SegmentEntry
from shoal_cluster.segment.build import SegmentInput, build_segment
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard import rows
from shoal_cluster.shard.memtable import Memtable
from shoal_cluster.shard.state import SegmentView, ShardState, open_view
from shoal_cluster.wal.record import OperationBatch, RecordKind, RequestMark, WalRecord
from tests.unit.shard.nodes import DIMENSION, SCHEMA, colored, tail, vector

Operation = tuple[str, float | None]
"""A point and the number to write, or None to delete it."""


def batch(operations: Sequence[Operation], requests: Sequence[RequestMark] = ()) -> OperationBatch:
    written = [value for _, value in operations if value is not None]
    return OperationBatch(
        requests=tuple(requests),
        ids=[point.encode() for point, _ in operations],
        upserts=bytes(value is not None for _, value in operations),
        vectors=np.array([vector(value) for value in written], dtype=np.float32).reshape(
            -1, DIMENSION
        ),
        tails=[tail(size=int(value)) for value in written],
    )


def record_after(
    state: ShardState, operations: Sequence[Operation], *, start: int | None = None
) -> WalRecord:
    slot = Slot(state.slot + 1)
    return WalRecord(
        slot=slot,
        epoch=Epoch(max(1, state.epoch)),
        kind=RecordKind.DATA,
        put_id=slot.to_bytes(16, "big"),
        prev_put_id=state.last_put_id,
        first_seq=Seq(state.seq + 1),
        memtable_start=Slot(state.active.start_slot if start is None else start),
        batch=batch(operations),
    )


def write(state: ShardState, *operations: Operation, start: int | None = None) -> WalRecord:
    record = record_after(state, operations, start=start)
    state.apply(record)
    return record


def shown(state: ShardState) -> dict[str, float]:
    snapshot = state.snapshot()
    ids, places = rows.scroll(snapshot, b"", 1000, None)
    vectors = rows.vectors_of(snapshot, places, DIMENSION)
    return {point.decode(): float(found[0]) for point, found in zip(ids, vectors, strict=True)}


def true_sum(state: ShardState) -> int:
    """Computes the set checksum from what scroll shows."""
    snapshot = state.snapshot()
    ids, places = rows.scroll(snapshot, b"", 1000, None)
    vectors = rows.vectors_of(snapshot, places, DIMENSION)
    seqs, tails = rows.seqs_of(snapshot, places), rows.tails_of(snapshot, places)
    parts = zip(ids, seqs, vectors, tails, strict=True)
    return sum(row_hash(i, seq, v.tobytes(), t) for i, seq, v, t in parts) % SUM_MODULUS


def sealed(
    directory: Path, name: str, points: Sequence[tuple[str, int, float]]
) -> tuple[SegmentEntry, SegmentView]:
    """Returns a segment of (point, seq, number)."""
    directory.mkdir()
    points = sorted(points)
    built = build_segment(
        SegmentInput(
            ids=[point.encode() for point, _, _ in points],
            seqs=np.array([seq for _, seq, _ in points], dtype=np.uint64),
            vectors=np.array([vector(value) for _, _, value in points], dtype=np.float32),
            tails=[tail(size=int(value)) for _, _, value in points],
        ),
        SCHEMA,
        directory,
        seed=0,
    )
    entry = SegmentEntry(
        id=SegmentId(f"{1:020d}-{1:06d}-{name}"),
        files=(),
        rows=built.rows,
        min_seq=Seq(built.min_seq),
        max_seq=Seq(built.max_seq),
        tombstones=None,
        dead=0,
        sum=built.sum,
    )
    reader = SegmentReader.open(entry.id, {file.name: file.path for file in built.files}, SCHEMA)
    return entry, open_view(entry, reader, BitMap())


def manifest_at(state: ShardState, *entries: SegmentEntry, version: int = 1) -> Manifest:
    return Manifest(
        version=ManifestVersion(version),
        parent_put_id=bytes(16),
        put_id=bytes(16),
        epoch=Epoch(1),
        floor_slot=state.slot,
        floor_epoch=state.epoch,
        floor_seq=state.seq,
        floor_put_id=state.last_put_id,
        segments=entries,
        dedup=state.dedup.snapshot(),
        schema_version=1,
        sum=sum(entry.sum for entry in entries) % SUM_MODULUS,
    )


def test_the_last_operation_of_an_id_wins_within_and_across_batches():
    state = ShardState(SCHEMA)
    write(state, ("a", 1), ("b", 2), ("a", 3))
    write(state, ("b", None), ("c", 4), ("c", 5))
    assert shown(state) == {"a": 3, "c": 5}
    assert (state.live, state.seq, state.slot) == (2, 6, 2)
    assert state.sum == true_sum(state)


def test_a_deleted_point_can_be_written_again_in_the_same_batch():
    state = ShardState(SCHEMA)
    write(state, ("a", 1))
    write(state, ("a", None), ("a", 2))
    assert shown(state) == {"a": 2}
    write(state, ("a", 3), ("a", None))
    assert shown(state) == {}
    assert (state.sum, state.live) == (0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slot": Slot(3)},
        {"slot": Slot(1)},
        {"first_seq": Seq(9)},
        {"prev_put_id": bytes(15) + b"?"},
        {"epoch": Epoch(0)},
    ],
)
def test_a_record_that_does_not_follow_is_refused_and_changes_nothing(wrong):
    """R-1."""
    state = ShardState(SCHEMA)
    write(state, ("a", 1))
    before = (state.snapshot(), state.slot, state.seq)
    with pytest.raises(Corrupt, match="R-1"):
        state.apply(replace(record_after(state, [("b", 2)]), **wrong))
    assert (state.snapshot(), state.slot, state.seq) == before


def test_a_snapshot_is_not_disturbed_by_later_writes():
    state = ShardState(SCHEMA)
    write(state, ("a", 1), ("b", 2))
    snapshot = state.snapshot()
    write(state, ("a", 9), ("c", 3), ("b", None))
    write(state, *[(f"more-{i}", i) for i in range(600)])  # grows the arrays twice
    ids, places = rows.scroll(snapshot, b"", 10, None)
    assert ids == [b"a", b"b"]
    assert rows.vectors_of(snapshot, places, DIMENSION)[:, 0].tolist() == [1, 2]
    assert rows.count(snapshot, None) == 2
    assert rows.count(snapshot, colored("red")) == 2


def test_the_same_snapshot_is_returned_until_something_changes():
    state = ShardState(SCHEMA)
    write(state, ("a", 1))
    snapshot = state.snapshot()
    assert state.snapshot() is snapshot
    write(state, ("a", 2))
    assert state.snapshot() is not snapshot


def test_installing_a_manifest_of_the_present_position_changes_nothing_readable(tmp_path):
    """R-3, and R-2: the rows move from the memtable to the segment."""
    state = ShardState(SCHEMA)
    write(state, ("a", 1), ("b", 2))
    before = (shown(state), state.sum, state.live)
    entry, view = sealed(tmp_path / "one", "aa", [("a", 1, 1), ("b", 2, 2)])
    state.install(manifest_at(state, entry), [view])
    assert (shown(state), state.sum, state.live) == before
    assert state.unsealed_rows == 0
    assert state.sum == true_sum(state)


def test_operations_after_the_floor_survive_an_install_and_kill_in_the_new_segment(tmp_path):
    """R-2, R-4."""
    state = ShardState(SCHEMA)
    write(state, ("a", 1), ("b", 2), ("c", 3))
    manifest = manifest_at(state)
    point = state.rotate()
    assert (point.first_slot, point.floor_slot, point.sum) == (1, 1, state.sum)
    write(state, ("a", 7), ("b", None), start=2)
    entry, view = sealed(tmp_path / "one", "aa", [("a", 1, 1), ("b", 2, 2), ("c", 3, 3)])
    manifest = replace(manifest, segments=(entry,), sum=entry.sum)
    assert manifest.sum == point.sum
    state.install(manifest, [view])
    assert shown(state) == {"a": 7, "c": 3}
    assert (state.live, state.sum) == (2, true_sum(state))
    assert state.memtables[0].start_slot == manifest.floor_slot + 1
    # The view that was installed is not changed by what the memtable killed in it.
    assert view.live == 3


def test_a_manifest_that_would_change_the_rows_is_refused_and_changes_nothing(tmp_path):
    """R-3."""
    state = ShardState(SCHEMA)
    write(state, ("a", 1), ("b", 2))
    before = shown(state)
    entry, view = sealed(tmp_path / "one", "aa", [("a", 1, 1)])
    with pytest.raises(Corrupt, match="R-3"):
        state.install(manifest_at(state, entry), [view])
    assert shown(state) == before
    assert state.segments == {}
    assert state.sum == true_sum(state)


def test_a_manifest_ahead_of_the_state_replaces_it(tmp_path):
    ahead = ShardState(SCHEMA)
    write(ahead, ("a", 1), ("b", 2))
    write(ahead, ("b", None))
    entry, view = sealed(tmp_path / "one", "aa", [("a", 1, 1)])
    manifest = manifest_at(ahead, entry)
    state = ShardState(SCHEMA)
    write(state, ("zombie", 9))
    state.install(manifest, [view])
    assert shown(state) == {"a": 1}
    assert (state.slot, state.seq, state.last_put_id) == (2, 3, ahead.last_put_id)
    write(state, ("d", 4))
    assert shown(state) == {"a": 1, "d": 4}


def test_a_floor_inside_a_memtable_cannot_be_installed():
    state = ShardState(SCHEMA)
    write(state, ("a", 1))
    manifest = manifest_at(state)
    write(state, ("b", 2))
    assert not state.can_install(manifest)
    assert state.can_install(manifest_at(state))


def test_a_follower_cuts_its_memtables_where_the_primary_did():
    """R-4."""
    primary, follower = ShardState(SCHEMA), ShardState(SCHEMA)
    follower.apply(write(primary, ("a", 1)))
    primary.rotate()
    assert [table.start_slot for table in primary.memtables] == [1, 2]
    assert [table.start_slot for table in follower.memtables] == [1]
    follower.apply(write(primary, ("a", 2), start=2))
    assert [table.start_slot for table in follower.memtables] == [1, 2]
    assert shown(follower) == shown(primary) == {"a": 2}
    assert follower.sum == primary.sum


def test_a_record_with_unknown_attributes_can_be_applied_and_is_indexed_once_they_are_declared():
    state = ShardState(SCHEMA)
    record = record_after(state, [("a", 1)])
    attributes = {"color": "red", "shape": "round"}
    tails = [encode_tail(1.0, attributes, b"", NO_PROVENANCE)]
    state.apply(replace(record, batch=replace(record.batch, tails=tails)))
    shape = replace(colored("round"), attribute="shape")
    assert rows.count(state.snapshot(), shape) == 0
    added = {**SCHEMA.attributes, "shape": AttributeType.KEYWORD}
    state.alter(replace(SCHEMA, attributes=added, version=2))
    assert rows.count(state.snapshot(), shape) == 1
    assert rows.count(state.snapshot(), colored("red")) == 1


def test_at_most_one_row_of_an_id_lives_in_a_memtable():
    """T-1."""
    random = np.random.default_rng(5)
    state = ShardState(SCHEMA)
    model: dict[str, float] = {}
    for _ in range(200):
        operations: list[Operation] = []
        for _ in range(int(random.integers(1, 6))):
            point = f"p{random.integers(0, 6)}"
            value = None if random.random() < 0.3 else float(random.integers(0, 100))
            operations.append((point, value))
        if random.random() < 0.1:
            state.rotate()
        write(state, *operations)
        for point, value in operations:
            model.pop(point, None)
            if value is not None:
                model[point] = value
        assert shown(state) == model
        assert (state.live, state.sum) == (len(model), true_sum(state))
        living = [table.ids[row] for table in state.memtables for row in table.view().live_rows()]
        assert len(living) == len(set(living))
        assert state.live == sum(table.live for table in state.memtables)


def test_a_memtable_view_keeps_its_flags_when_rows_die():
    memtable = Memtable(SCHEMA, Slot(1))
    memtable.append([b"a", b"b"], np.zeros((2, DIMENSION), np.float32), [tail(), tail()], [1, 2])
    view = memtable.view()
    memtable.kill([0])
    assert view.live_rows().tolist() == [0, 1]
    assert memtable.view().live_rows().tolist() == [1]
    assert memtable.find(b"a") is None
    assert memtable.find(b"b") == 1
