"""Composition: requests meet the order here."""

from dataclasses import replace

import numpy as np
import pytest

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Conflict, InvalidRequest, Unavailable
from shoal_cluster.domain.ids import Epoch, Seq, Slot
from shoal_cluster.domain.point import NO_PROVENANCE, decode_tail, encode_tail
from shoal_cluster.shard.composition import Composition
from shoal_cluster.shard.state import ShardState
from shoal_cluster.wal.record import RecordKind, WalRecord
from tests.unit.shard.nodes import (
    DIMENSION,
    SCHEMA,
    colored,
    delete,
    delete_where,
    patch,
    tail,
    upsert,
)

EPOCH = Epoch(1)


def commit(state: ShardState, composition: Composition) -> None:
    """Applies the batch as if it had been appended."""
    slot = Slot(state.slot + 1)
    state.apply(
        WalRecord(
            slot=slot,
            epoch=EPOCH,
            kind=RecordKind.DATA,
            put_id=slot.to_bytes(16, "big"),
            prev_put_id=state.last_put_id,
            first_seq=Seq(state.seq + 1),
            memtable_start=state.active.start_slot,
            batch=composition.batch(),
        )
    )


def state_with(points: dict[str, float], color: str = "red") -> ShardState:
    state = ShardState(SCHEMA)
    composition = Composition(state, EPOCH)
    composition.add(upsert(1, points, client="setup", color=color))
    commit(state, composition)
    return state


def seq_of(state: ShardState, point: str) -> int:
    place = state.locate(point.encode())
    return 0 if place is None else place.seq


def test_the_answer_names_the_positions_the_operations_get():
    state = state_with({"a": 1, "b": 2})
    composition = Composition(state, EPOCH)
    first = composition.add(upsert(2, {"c": 3, "d": 4}))
    second = composition.add(delete(3, "a"))
    assert (first.first_seq, first.last_seq, first.affected) == (3, 4, 2)
    assert (second.first_seq, second.last_seq, second.affected) == (5, 5, 1)
    commit(state, composition)
    assert state.seq == 5
    assert [seq_of(state, point) for point in "abcd"] == [0, 2, 3, 4]


def test_the_remembered_answer_equals_the_given_one():
    state = state_with({"a": 1})
    composition = Composition(state, EPOCH)
    calls = [upsert(2, {"b": 1, "c": 2}), delete(3, "nobody"), delete(4, "a", "b")]
    answers = [composition.add(call) for call in calls]
    commit(state, composition)
    again = Composition(state, EPOCH)
    assert [again.add(call) for call in calls] == answers
    assert again.requests == again.operations == 0


def test_a_request_that_is_twice_in_one_batch_is_carried_out_once():
    state = state_with({})
    composition = Composition(state, EPOCH)
    assert composition.add(upsert(2, {"a": 1})) == composition.add(upsert(2, {"a": 1}))
    assert (composition.requests, composition.operations) == (1, 1)


def test_a_request_that_changes_nothing_still_becomes_part_of_the_batch():
    """P-2: so that its answer is confirmed by an append."""
    composition = Composition(state_with({}), EPOCH)
    assert composition.add(delete(2, "nobody")).affected == 0
    assert (composition.requests, composition.operations) == (1, 0)


def test_patch_sets_and_removes_attributes_and_keeps_the_rest():
    state = state_with({"a": 7})
    composition = Composition(state, EPOCH)
    patches = {"a": {"color": None, "size": 99}, "nobody": {"size": 1}}
    assert composition.add(patch(2, patches)).affected == 1
    commit(state, composition)
    place = state.locate(b"a")
    assert place is not None
    assert decode_tail(place.tail)[1] == {"size": 99}
    assert place.vector.tolist() == [7.0] * DIMENSION


def test_patch_sees_what_the_batch_has_done_before_it():
    state = state_with({"a": 1, "b": 2})
    composition = Composition(state, EPOCH)
    composition.add(upsert(2, {"a": 5}, color="green"))
    composition.add(delete(3, "b"))
    patches = {"a": {"size": 6}, "b": {"size": 6}}
    assert composition.add(patch(4, patches)).affected == 1
    commit(state, composition)
    place = state.locate(b"a")
    assert place is not None
    assert decode_tail(place.tail)[1] == {"color": "green", "size": 6}
    assert place.vector.tolist() == [5.0] * DIMENSION
    assert state.locate(b"b") is None


def test_delete_by_filter_judges_by_the_batch_so_far():
    state = state_with({"stays": 1, "goes": 2, "was-red": 3}, color="red")
    composition = Composition(state, EPOCH)
    composition.add(upsert(2, {"was-red": 3}, color="blue"))
    composition.add(upsert(3, {"new": 4}, color="red"))
    composition.add(delete(4, "goes"))
    answer = composition.add(delete_where(5, colored("red")))
    assert (answer.affected, answer.more) == (2, False)
    commit(state, composition)
    assert [seq_of(state, point) > 0 for point in ("stays", "goes", "was-red", "new")] == [
        False,
        False,
        True,
        False,
    ]


def test_delete_by_filter_stops_at_its_limit_and_says_that_more_is_left(monkeypatch):
    monkeypatch.setattr(limits, "DELETE_BY_FILTER_MAX", 3)
    state = state_with({f"p{i}": i for i in range(5)})
    for request_no, expected in ((2, (3, True)), (3, (2, False)), (4, (0, False))):
        composition = Composition(state, EPOCH)
        answer = composition.add(delete_where(request_no, colored("red")))
        assert (answer.affected, answer.more) == expected
        commit(state, composition)


@pytest.mark.parametrize(
    ("conditions", "refused"),
    [
        ({"if_absent": True}, True),
        ({"if_seqs": [1]}, False),
        ({"if_seqs": [2]}, True),
        ({"if_seqs": [0]}, True),
    ],
)
def test_conditions_are_judged_against_the_stored_row(conditions, refused):
    composition = Composition(state_with({"a": 1}), EPOCH)
    for call in (upsert(2, {"a": 2}, **conditions), delete(3, "a", **conditions)):
        fresh = Composition(composition._state, EPOCH)
        if refused:
            with pytest.raises(Conflict, match="'a' should be"):
                fresh.add(call)
            assert (fresh.requests, fresh.operations) == (0, 0)
        else:
            assert fresh.add(call).affected == 1


def test_conditions_are_judged_against_the_batch_so_far():
    state = state_with({"a": 1})
    composition = Composition(state, EPOCH)
    first = composition.add(upsert(2, {"b": 1}, if_absent=True))
    with pytest.raises(Conflict) as refused:
        composition.add(upsert(3, {"b": 2}, if_absent=True))
    assert refused.value.field == "if_absent"
    composition.add(upsert(4, {"b": 3}, if_seqs=[first.last_seq]))
    composition.add(delete(5, "a"))
    composition.add(upsert(6, {"a": 3}, if_absent=True))
    assert composition.operations == 4


def test_one_failing_condition_refuses_the_whole_request():
    composition = Composition(state_with({"a": 1}), EPOCH)
    with pytest.raises(Conflict) as refused:
        composition.add(upsert(2, {"x": 1, "a": 2}, if_seqs=[0, 5]))
    assert refused.value.field == "points[1].if_seq"
    assert composition.operations == 0


@pytest.mark.parametrize(
    "call",
    [
        replace(upsert(2, {"a": 1}), body=b"\0" * 15),
        replace(upsert(2, {"a": 1}), tails=[]),
        replace(upsert(2, {"a": 1}), tails=[b"\xc1"]),
        replace(upsert(2, {"a": 1}), if_seqs=[1, 2]),
        replace(patch(2, {"a": {"size": 1}}), patches=[]),
        replace(delete_where(2, colored("red")), filter=["?"]),
    ],
)
def test_what_could_not_be_replayed_is_refused_before_it_is_in_the_batch(call):
    composition = Composition(state_with({"a": 1}), EPOCH)
    with pytest.raises(InvalidRequest):
        composition.add(call)
    assert (composition.requests, composition.operations) == (0, 0)


def test_an_attribute_that_is_not_declared_here_yet_is_refused_as_unavailable():
    composition = Composition(state_with({"a": 1}), EPOCH)
    tails = [encode_tail(1.0, {"shape": "round"}, b"", NO_PROVENANCE)]
    for call in (replace(upsert(2, {"a": 1}), tails=tails), patch(3, {"a": {"shape": "round"}})):
        with pytest.raises(Unavailable, match="shape"):
            composition.add(call)


def test_vectors_are_copied_out_of_an_unaligned_body():
    state = state_with({})
    call = upsert(2, {"a": 1, "b": 2})
    frame = bytearray(b"?" + bytes(call.body))
    composition = Composition(state, EPOCH)
    composition.add(replace(call, body=memoryview(frame)[1:]))
    batch = composition.batch()
    frame[:] = b"\xff" * len(frame)
    assert batch.vectors.flags.aligned and batch.vectors.flags.c_contiguous
    assert batch.vectors.tolist() == np.array([[1] * DIMENSION, [2] * DIMENSION]).tolist()
    assert batch.tails == [tail(size=1), tail(size=2)]
