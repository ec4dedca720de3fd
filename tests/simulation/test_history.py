"""Each promise broken by hand, and noticed; and a history that keeps them all."""

import pytest

from tests.simulation.history import (
    Change,
    Ending,
    History,
    Level,
    Position,
    Read,
    RestingReplica,
    Seen,
    ViolationKind,
    Write,
    WriteType,
    check,
)


def upsert(
    value: int,
    *,
    at: float,
    seq: int | None,
    point: str = "p",
    epoch: int = 1,
    ending: Ending = Ending.OK,
    client: str = "a",
) -> Write:
    return Write(
        client=client,
        request=value,
        type=WriteType.UPSERT,
        invoked_s=at,
        returned_s=at + 0.5,
        ending=ending,
        changes=(Change(0, point, value=value),),
        positions={} if seq is None else {0: Position(epoch, seq)},
        seqs=() if seq is None else (seq,),
        affected=1,
    )


def batch(first_value: int, points: str, *, at: float, first_seq: int | None) -> Write:
    """An upsert of several points of one shard; first_seq None: nobody knows what became of it."""
    last = None if first_seq is None else first_seq + len(points) - 1
    return Write(
        client="a",
        request=first_value,
        type=WriteType.UPSERT,
        invoked_s=at,
        returned_s=at + 0.5,
        ending=Ending.UNKNOWN if last is None else Ending.OK,
        changes=tuple(Change(0, p, value=first_value + i) for i, p in enumerate(points)),
        positions={} if last is None else {0: Position(1, last)},
        seqs=() if first_seq is None else tuple(range(first_seq, first_seq + len(points))),
        affected=len(points),
    )


def delete(*, at: float, seq: int | None, point: str = "p", ending: Ending = Ending.OK) -> Write:
    return Write(
        client="a",
        request=round(1000 * at),
        type=WriteType.DELETE,
        invoked_s=at,
        returned_s=at + 0.5,
        ending=ending,
        changes=(Change(0, point),),
        positions={} if seq is None else {0: Position(1, seq)},
        affected=1,
    )


def read(
    *rows: Seen,
    at: float,
    as_of: int,
    level: Level = Level.STRONG,
    token: int = 0,
    asked: str = "p",
    epoch: int = 1,
) -> Read:
    return Read(
        client="b",
        invoked_s=at,
        returned_s=at + 0.5,
        level=level,
        token={0: Position(epoch, token)},
        as_of={0: Position(epoch, as_of)},
        asked=tuple((0, point) for point in asked),
        rows=rows,
    )


def row(value: int, seq: int, *, point: str = "p", agrees: bool = True, group: str = "") -> Seen:
    return Seen(0, point, seq, value, None, group, agrees)


def kinds(history: History) -> set[ViolationKind]:
    return {violation.kind for violation in check(history)}


def test_history_that_keeps_every_promise_has_no_violation() -> None:
    history = History(
        writes=[
            upsert(1, at=0, seq=1),
            upsert(2, at=1, seq=2, ending=Ending.OK, client="b"),
            delete(at=2, seq=3),
            upsert(3, at=3, seq=None, ending=Ending.UNKNOWN),
            batch(10, "qr", at=5, first_seq=5),
        ],
        reads=[
            read(row(1, 1), at=0.6, as_of=1),
            read(row(1, 1), at=1.6, as_of=1, level=Level.EVENTUAL),
            read(row(2, 2), at=1.6, as_of=2),
            read(at=2.6, as_of=3),
            read(row(3, 4), at=4, as_of=4),
            read(
                row(3, 4), row(10, 5, point="q"), row(11, 6, point="r"), at=6, as_of=6, asked="pqr"
            ),
        ],
        resting=[
            RestingReplica(0, "s0", Position(1, 6), 3, 77),
            RestingReplica(0, "s1", Position(1, 6), 3, 77),
        ],
    )
    assert check(history) == []


BROKEN = {
    "the last strong read lacks an acknowledged row": (
        ViolationKind.ACKED_WRITE_LOST,
        History(writes=[upsert(1, at=0, seq=1)], reads=[read(at=1, as_of=1)]),
    ),
    "a strong read is older than what was acknowledged before": (
        ViolationKind.STALE_STRONG_READ,
        History(
            writes=[upsert(1, at=0, seq=1), upsert(2, at=1, seq=2)],
            reads=[read(row(1, 1), at=2, as_of=1)],
        ),
    ),
    "a strong read claims the newest state and shows an older row": (
        ViolationKind.STALE_STRONG_READ,
        History(
            writes=[upsert(1, at=0, seq=1), upsert(2, at=1, seq=2)],
            reads=[read(row(1, 1), at=2, as_of=2)],
        ),
    ),
    "a session read is older than its token": (
        ViolationKind.READ_YOUR_WRITES,
        History(
            writes=[upsert(1, at=0, seq=1)],
            reads=[read(at=1, as_of=0, level=Level.SESSION, token=1)],
        ),
    ),
    "a session read is of an older epoch than its token": (
        ViolationKind.READ_YOUR_WRITES,
        History(
            reads=[
                Read(
                    client="b",
                    invoked_s=1,
                    returned_s=2,
                    level=Level.SESSION,
                    token={0: Position(3, 5)},
                    as_of={0: Position(2, 9)},
                )
            ]
        ),
    ),
    "an eventual read shows less than the position it claims": (
        ViolationKind.AS_OF_UNTRUE,
        History(
            writes=[upsert(1, at=0, seq=1), upsert(2, at=1, seq=2)],
            reads=[read(row(1, 1), at=2, as_of=2, level=Level.EVENTUAL)],
        ),
    ),
    "a row is newer than the position the read claims": (
        ViolationKind.AS_OF_UNTRUE,
        History(
            writes=[upsert(1, at=0, seq=1)],
            reads=[read(row(1, 1), at=1, as_of=0, level=Level.EVENTUAL)],
        ),
    ),
    "a failed write is seen": (
        ViolationKind.DIRTY_READ,
        History(
            writes=[upsert(1, at=0, seq=None, ending=Ending.FAIL)],
            reads=[read(row(1, 1), at=1, as_of=1)],
        ),
    ),
    "a value nobody wrote is seen": (
        ViolationKind.DIRTY_READ,
        History(reads=[read(row(9, 1), at=1, as_of=1)]),
    ),
    "a value is seen before it was written": (
        ViolationKind.DIRTY_READ,
        History(
            writes=[upsert(1, at=5, seq=1)],
            reads=[read(row(1, 1), at=1, as_of=1)],
        ),
    ),
    "an unknown write is seen, and then gone": (
        ViolationKind.DIRTY_READ,
        History(
            writes=[upsert(1, at=0, seq=None, ending=Ending.UNKNOWN)],
            reads=[read(row(1, 1), at=1, as_of=1), read(at=2, as_of=1)],
        ),
    ),
    "a deleted point is back": (
        ViolationKind.DELETED_POINT_BACK,
        History(
            writes=[upsert(1, at=0, seq=1), delete(at=1, seq=2)],
            reads=[read(row(1, 1), at=2, as_of=2)],
        ),
    ),
    "a point removed by filter is back": (
        ViolationKind.DELETED_POINT_BACK,
        History(
            writes=[
                upsert(1, at=0, seq=1),
                Write(
                    client="a",
                    request=2,
                    type=WriteType.DELETE_WHERE,
                    invoked_s=1,
                    returned_s=1.5,
                    ending=Ending.OK,
                    group="red",
                    shards=(0,),
                    positions={0: Position(1, 2)},
                    affected=1,
                ),
            ],
            reads=[read(row(1, 1, group="red"), at=2, as_of=2)],
        ),
    ),
    "half of a batch is shown": (
        ViolationKind.TORN_BATCH,
        History(
            writes=[batch(10, "pq", at=0, first_seq=None)],
            reads=[read(row(10, 1), at=1, as_of=2, asked="pq")],
        ),
    ),
    "half of a batch is shown over an older row": (
        ViolationKind.TORN_BATCH,
        History(
            writes=[
                upsert(1, at=0, seq=1, point="q"),
                batch(10, "pq", at=1, first_seq=None),
            ],
            reads=[read(row(10, 2), row(1, 1, point="q"), at=2, as_of=3, asked="pq")],
        ),
    ),
    "one value is seen at two positions": (
        ViolationKind.DOUBLE_APPLY,
        History(
            writes=[upsert(1, at=0, seq=None, ending=Ending.UNKNOWN)],
            reads=[read(row(1, 1), at=1, as_of=1), read(row(1, 2), at=2, as_of=2)],
        ),
    ),
    "a row is not where its write was acknowledged": (
        ViolationKind.DOUBLE_APPLY,
        History(
            writes=[upsert(1, at=0, seq=1)],
            reads=[read(row(1, 3), at=1, as_of=3)],
        ),
    ),
    "a retried request is acknowledged elsewhere": (
        ViolationKind.DOUBLE_APPLY,
        History(
            writes=[
                Write(
                    client="a",
                    request=1,
                    type=WriteType.UPSERT,
                    invoked_s=0,
                    returned_s=1,
                    ending=Ending.OK,
                    changes=(Change(0, "p", value=1),),
                    positions={0: Position(1, 1)},
                    seqs=(1,),
                    affected=1,
                    answers=({0: Position(1, 2)},),
                )
            ]
        ),
    ),
    "two writes are acknowledged at one position": (
        ViolationKind.TWO_ACKS_ONE_POSITION,
        History(
            writes=[upsert(1, at=0, seq=1), upsert(2, at=0, seq=1, epoch=2, point="q")],
        ),
    ),
    "the epoch goes back along the order": (
        ViolationKind.TWO_ACKS_ONE_POSITION,
        History(writes=[upsert(1, at=0, seq=1, epoch=2), upsert(2, at=0.1, seq=2, epoch=1)]),
    ),
    "a later write gets an earlier position": (
        ViolationKind.ORDER_AGAINST_TIME,
        History(writes=[upsert(1, at=0, seq=5), upsert(2, at=2, seq=4)]),
    ),
    "replicas differ in content": (
        ViolationKind.REPLICAS_DISAGREE,
        History(
            resting=[
                RestingReplica(0, "s0", Position(1, 6), 3, 77),
                RestingReplica(0, "s1", Position(1, 6), 3, 78),
            ]
        ),
    ),
    "replicas differ in position": (
        ViolationKind.REPLICAS_DISAGREE,
        History(
            resting=[
                RestingReplica(0, "s0", Position(1, 6), 3, 77),
                RestingReplica(0, "s1", Position(1, 5), 3, 77),
            ]
        ),
    ),
    "vector and payload of a row differ": (
        ViolationKind.INDEX_AND_PAYLOAD,
        History(
            writes=[upsert(1, at=0, seq=1)],
            reads=[read(row(1, 1, agrees=False), at=1, as_of=1)],
        ),
    ),
    "a row carries another point's value": (
        ViolationKind.INDEX_AND_PAYLOAD,
        History(
            writes=[upsert(1, at=0, seq=1), upsert(2, at=0, seq=2, point="q")],
            reads=[read(row(2, 1), at=1, as_of=2)],
        ),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_promise_is_noticed(name: str) -> None:
    kind, history = BROKEN[name]
    assert kind in kinds(history), check(history)


def test_unknown_delete_excuses_a_missing_row() -> None:
    history = History(
        writes=[upsert(1, at=0, seq=1), delete(at=1, seq=None, ending=Ending.UNKNOWN)],
        reads=[read(at=2, as_of=2)],
    )
    assert check(history) == []


def test_failed_delete_excuses_nothing() -> None:
    history = History(
        writes=[upsert(1, at=0, seq=1), delete(at=1, seq=None, ending=Ending.FAIL)],
        reads=[read(at=2, as_of=2)],
    )
    assert kinds(history) == {ViolationKind.ACKED_WRITE_LOST}


def test_row_that_replaced_an_unknown_write_is_no_violation() -> None:
    history = History(
        writes=[
            upsert(1, at=0, seq=None, ending=Ending.UNKNOWN),
            upsert(2, at=1, seq=2),
        ],
        reads=[
            read(row(1, 1), at=0.2, as_of=1, level=Level.EVENTUAL),
            read(row(2, 2), at=2, as_of=2),
        ],
    )
    assert check(history) == []
