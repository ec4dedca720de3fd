"""The protocol survives every schedule tried, and each broken variant is caught."""

from collections.abc import Callable
from random import Random

import pytest

from tests.model.bucket import FAULTLESS, Bucket, Steps, T, recover
from tests.model.history import StrongRead, Violation, ViolationKind, find_violation
from tests.model.protocol_model import (
    BROKEN_VARIANTS,
    Chances,
    Shard,
    Term,
    Variant,
    run_schedule,
)

CORRECT_SCHEDULES = 1500

# Where `make simulate` found the first violations of each variant; the rare ones start shortly
# before it. Seeds replay exactly, so a window is a bound on the work and not a gamble.
CAUGHT_WITHIN = {
    Variant.FENCES_COLLECTED: range(0, 60),
    Variant.NO_VALIDATION: range(0, 60),
    Variant.NO_FLOOR_CHECK: range(100, 160),
    Variant.NO_MANIFEST_PROBE: range(0, 20),
    Variant.MANIFEST_PROBED_BY_GET: range(0, 20),
    Variant.MANIFEST_PROBED_FIRST: range(600, 660),
    Variant.AMBIGUOUS_PUT_SKIPPED: range(0, 20),
    Variant.EXISTS_TAKEN_AS_SUCCESS: range(0, 20),
    Variant.FENCE_TAKEN_ON_TRUST: range(580, 640),
    Variant.CLAIM_OUTLIVED: range(0, 40),
    Variant.OWN_APPEND_TAKEN_FOR_TAIL: range(800, 860),
    Variant.OWN_SLOT_TAKEN_FOR_FREE: range(60, 100),
}


def test_the_protocol_survives_random_schedules():
    outcomes = [run_schedule(seed) for seed in range(CORRECT_SCHEDULES)]
    assert [outcome for outcome in outcomes if outcome.violation] == []
    # The schedules were worth something: on average four takeovers and six acknowledged rows.
    assert sum(outcome.takeovers for outcome in outcomes) > 3 * CORRECT_SCHEDULES
    assert sum(outcome.acks for outcome in outcomes) > 5 * CORRECT_SCHEDULES
    assert sum(outcome.flushes for outcome in outcomes) > 5 * CORRECT_SCHEDULES
    assert sum(outcome.strong_reads for outcome in outcomes) > 9 * CORRECT_SCHEDULES


@pytest.mark.parametrize("variant", CAUGHT_WITHIN, ids=lambda variant: variant.value)
def test_a_broken_variant_is_caught_where_the_protocol_is_not(variant):
    seeds = CAUGHT_WITHIN[variant]
    caught = next((seed for seed in seeds if run_schedule(seed, variant).violation), None)
    assert caught is not None, f"{variant.value} survived seeds {seeds.start} to {seeds.stop - 1}"
    assert run_schedule(caught).violation is None


def test_every_broken_variant_has_a_test():
    assert set(CAUGHT_WITHIN) == set(BROKEN_VARIANTS)


def test_a_seed_replays_the_same_schedule():
    assert run_schedule(45, Variant.NO_VALIDATION) == run_schedule(45, Variant.NO_VALIDATION)


# --------------------------------------------------------------- one schedule, written out by hand


def advance(steps: Steps[T], until: Callable[[], bool]) -> bool:
    """Runs an actor step by step until something holds, and leaves it stalled there.

    Returns True when the actor ended before that.
    """
    while not until():
        try:
            next(steps)
        except StopIteration:
            return True
    return False


def finish(steps: Steps[T]) -> T:
    """Runs a part of an actor to its end and returns what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def late_fence(variant: Variant) -> Violation | None:
    """Plays a claimant that wakes up late and fences a slot whose data was collected.

    slot:  1 fence of the first primary   2 row a   3 fence of the successor   4 row b
    The sleeper claimed its epoch before row a was appended, so its log begins at slot 2. When it
    wakes, row a is sealed and its slot collected; the fence it puts there is not refused by the
    bucket. It dies at validation, but its fence stays, and a replica that had read slot 1 now finds
    slots 2, 3 and 4 filled, one after the other.
    """
    random = Random(0)
    bucket = Bucket(random, FAULTLESS)
    shard = Shard(bucket, random, Chances(lag_steps_max=0), variant)
    history = shard.history

    first = finish(shard.take_over())
    assert isinstance(first, Term)
    assert finish(shard.flush(first))
    replica = shard.replica()
    advance(replica, lambda: len(history.strong_reads) == 1)

    sleeper = shard.take_over()
    advance(sleeper, lambda: max(bucket.manifests.objects) == first.version + 1)
    next(sleeper)  # lists the floor markers: its claim stands; it falls asleep before slot 2
    assert finish(shard.append_row(first))

    successor = finish(shard.take_over())
    assert isinstance(successor, Term)
    assert finish(shard.flush(successor))
    assert finish(shard.append_row(successor))
    finish(shard.collect())
    assert sorted(bucket.wal.objects) == [1, 3, 4]

    assert finish(sleeper) is None
    assert bucket.wal.objects[2].is_fence

    stuck = advance(replica, lambda: len(history.strong_reads) == 2)
    assert stuck == bool(history.broken_slots)
    return find_violation(history, recover(bucket))


def outlived_claim(variant: Variant) -> Violation | None:
    """Plays a claimant that meets a fence, learns of a higher epoch, and must not go on.

    slot:  1 fence of the first primary   2 row a   3 fence of the successor
    The sleeper claimed its epoch before anything was sealed, so its log begins at slot 1. When it
    wakes, everything up to slot 3 is sealed. Were it to jump to that floor, it would find slot 4
    absent, and put a fence of its lower epoch at the very tail.
    """
    random = Random(0)
    bucket = Bucket(random, FAULTLESS)
    shard = Shard(bucket, random, Chances(lag_steps_max=0), variant)

    first = finish(shard.take_over())
    assert isinstance(first, Term)
    sleeper = shard.take_over()
    advance(sleeper, lambda: max(bucket.manifests.objects) == first.version + 1)
    next(sleeper)
    assert finish(shard.append_row(first))
    successor = finish(shard.take_over())
    assert isinstance(successor, Term)
    assert finish(shard.flush(successor))

    assert finish(sleeper) is None
    finish(shard.take_over())
    return find_violation(shard.history, recover(bucket))


def late_reply(variant: Variant, *, collected: bool) -> Violation | None:
    """Plays a primary whose put landed, whose reply is late, and that answers a strong read.

    slot:  1 fence of the first primary   2 row a   3 fence of the successor   4 row b
    Row a is durable, but the first primary does not know it yet; row b is acknowledged before the
    read begins. collected: everything is sealed by then, and slot 2 looks as if it were free.
    """
    random = Random(0)
    bucket = Bucket(random, FAULTLESS)
    shard = Shard(bucket, random, Chances(lag_steps_max=0), variant)

    first = finish(shard.take_over())
    assert isinstance(first, Term)
    appending = shard.append_row(first)
    next(appending)
    successor = finish(shard.take_over())
    assert isinstance(successor, Term)
    assert finish(shard.append_row(successor))
    if collected:
        assert finish(shard.flush(successor))
        finish(shard.collect())
        assert sorted(bucket.wal.objects) == [1, 3]

    reading = shard.primary_reads(first)
    for _ in range(4):  # longer than its requests take: now it waits for the put, if it ever does
        if next(reading, None) is None or shard.history.strong_reads:
            break
    assert finish(appending)
    advance(reading, lambda: bool(shard.history.strong_reads))
    return find_violation(shard.history, recover(bucket))


@pytest.mark.parametrize("collected", [False, True])
def test_a_primary_whose_reply_is_late_answers_no_stale_read(collected):
    assert late_reply(Variant.CORRECT, collected=collected) is None


@pytest.mark.parametrize(
    ("variant", "collected"),
    [(Variant.OWN_APPEND_TAKEN_FOR_TAIL, False), (Variant.OWN_SLOT_TAKEN_FOR_FREE, True)],
)
def test_a_primary_whose_reply_is_late_answers_a_stale_read_where_a_rule_is_broken(
    variant, collected
):
    violation = late_reply(variant, collected=collected)
    assert violation is not None
    assert violation.kind is ViolationKind.STALE_STRONG_READ


@pytest.mark.parametrize("scenario", [late_fence, outlived_claim])
def test_a_claimant_that_wakes_up_late_does_no_harm(scenario):
    assert scenario(Variant.CORRECT) is None


@pytest.mark.parametrize(
    ("scenario", "variant", "kind"),
    [
        (late_fence, Variant.FENCE_TAKEN_ON_TRUST, ViolationKind.STALE_SESSION_READ),
        (outlived_claim, Variant.CLAIM_OUTLIVED, ViolationKind.LOG_BROKEN),
    ],
)
def test_a_claimant_that_wakes_up_late_does_harm_where_a_rule_is_broken(scenario, variant, kind):
    violation = scenario(variant)
    assert violation is not None
    assert violation.kind is kind


# ------------------------------------------------------------------------- the checker can say no


def history_of_one_ack():
    shard = Shard(Bucket(Random(0), FAULTLESS), Random(0), Chances(), Variant.CORRECT)
    shard.history.acked_at[7] = 10
    return shard.history


@pytest.mark.parametrize(
    ("reads", "recovered", "kind"),
    [
        ([], frozenset(), ViolationKind.ACKED_ROW_LOST),  # H-1
        ([(11, 12, frozenset())], frozenset({7}), ViolationKind.STALE_STRONG_READ),  # H-2
        (
            [(1, 2, frozenset({7})), (3, 4, frozenset())],
            frozenset({7}),
            ViolationKind.STRONG_READS_WENT_BACK,  # H-3
        ),
        ([(1, 2, frozenset({7, 8}))], frozenset({7}), ViolationKind.DIRTY_READ),  # H-4
    ],
)
def test_the_checker_finds_each_violation(reads, recovered, kind):
    history = history_of_one_ack()
    history.strong_reads += [
        StrongRead(began=began, ended=ended, rows=rows) for began, ended, rows in reads
    ]
    violation = find_violation(history, recovered)
    assert violation is not None
    assert violation.kind is kind


def test_the_checker_finds_a_stale_session_read():  # H-5
    history = history_of_one_ack()
    history.stale_session_rows.add(7)
    violation = find_violation(history, frozenset({7}))
    assert violation is not None
    assert violation.kind is ViolationKind.STALE_SESSION_READ


def test_the_checker_finds_a_broken_log():  # H-6
    history = history_of_one_ack()
    history.broken_slots.add(3)
    violation = find_violation(history, frozenset({7}))
    assert violation is not None
    assert violation.kind is ViolationKind.LOG_BROKEN


def test_the_checker_accepts_a_read_that_began_before_the_acknowledgement():
    history = history_of_one_ack()
    history.strong_reads.append(StrongRead(began=9, ended=12, rows=frozenset()))
    assert find_violation(history, frozenset({7})) is None
