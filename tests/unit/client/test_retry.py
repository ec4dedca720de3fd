"""The retry decisions, as a table and as properties. Nothing here sleeps."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import (
    KINDS,
    Conflict,
    Indeterminate,
    InvalidRequest,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal.retry import Attempts, GiveUp, Retry, RetryPolicy


def attempts(*, is_write: bool, deadline_s: float = 10.0) -> Attempts:
    return Attempts(
        is_write=is_write, deadline_s=deadline_s, policy=RetryPolicy(), random=Random(1)
    )


@pytest.mark.parametrize("is_write", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_only_overload_unavailability_and_unknown_fates_are_retried(
    kind: str, is_write: bool
) -> None:
    verdict = attempts(is_write=is_write).failed(KINDS[kind]("x"), 0.0)
    retried = kind in ("overloaded", "unavailable", "not_primary", "indeterminate")
    assert isinstance(verdict, Retry) == retried


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [(Unavailable("x"), True), (Indeterminate("x"), True), (Overloaded("x"), False)],
)
def test_an_overloaded_server_is_waited_for_and_a_lost_one_is_left(
    error: ShoalError, elsewhere: bool
) -> None:
    verdict = attempts(is_write=True).failed(error, 0.0)
    assert isinstance(verdict, Retry) and verdict.elsewhere == elsewhere


def test_overloaded_waits_at_least_as_long_as_asked_and_not_much_longer() -> None:
    for _ in range(20):
        verdict = attempts(is_write=False).failed(Overloaded("x", retry_after_ms=400), 0.0)
        assert isinstance(verdict, Retry) and 0.4 <= verdict.wait_s <= 0.5


def test_overloaded_beyond_the_deadline_is_raised_without_waiting() -> None:
    error = Overloaded("x", retry_after_ms=60_000)
    verdict = attempts(is_write=True).failed(error, 0.0)
    assert verdict == GiveUp(error)
    assert error.outcome == "not_applied"


def test_backoff_doubles_up_to_its_cap() -> None:
    tries = attempts(is_write=False, deadline_s=1e9)
    waits = []
    for _ in range(40):
        verdict = tries.failed(Unavailable("x"), 0.0)
        assert isinstance(verdict, Retry)
        waits.append(verdict.wait_s)
    for n, wait_s in enumerate(waits):
        full_s = min(2.0, 0.02 * 2**n)
        assert full_s / 2 <= wait_s <= full_s


LOST = Indeterminate("lost", outcome="maybe_applied")


@pytest.mark.parametrize(
    ("is_write", "failures", "raised", "outcome"),
    [
        (False, [Unavailable("x"), Unavailable("y")], Unavailable, "not_applied"),
        (True, [Unavailable("x"), Unavailable("y")], Unavailable, "not_applied"),
        (True, [LOST, Unavailable("y")], Indeterminate, "maybe_applied"),
        (True, [LOST, Overloaded("y")], Indeterminate, "maybe_applied"),
        (True, [Unavailable("x"), LOST], Indeterminate, "maybe_applied"),
        (True, [Unavailable("x", outcome="maybe_applied")], Indeterminate, "maybe_applied"),
        (False, [LOST], Unavailable, "not_applied"),
    ],
)
def test_when_time_is_up_the_error_says_what_is_known(
    is_write: bool, failures: list[ShoalError], raised: type[ShoalError], outcome: str
) -> None:
    tries = attempts(is_write=is_write)
    for error in failures[:-1]:
        assert isinstance(tries.failed(error, 0.0), Retry)
    verdict = tries.failed(failures[-1], 9.9999)
    assert isinstance(verdict, GiveUp)
    assert type(verdict.error) is raised
    assert verdict.error.outcome == outcome
    assert verdict.error.attempts == len(failures)


def test_a_refusal_after_a_lost_attempt_admits_that_it_may_have_been_applied() -> None:
    tries = attempts(is_write=True)
    tries.failed(LOST, 0.0)
    verdict = tries.failed(Conflict("x"), 1.0)
    assert isinstance(verdict, GiveUp)
    assert isinstance(verdict.error, Conflict)
    assert verdict.error.outcome == "maybe_applied"
    assert "may have been applied" in str(verdict.error)


def test_a_request_that_was_forgotten_is_not_sent_again() -> None:
    forgotten = Indeterminate("x", outcome="maybe_applied", field="request_id.client_id")
    assert attempts(is_write=True).failed(forgotten, 0.0) == GiveUp(forgotten)


def test_one_hung_attempt_leaves_time_for_another() -> None:
    tries = attempts(is_write=False, deadline_s=30.0)
    assert tries.timeout_s(0.0) == 15.0
    assert tries.timeout_s(15.0) == 7.5
    assert tries.timeout_s(29.8) == pytest.approx(0.2)
    assert tries.timeout_s(31.0) == 0.0


def test_a_short_deadline_is_not_halved_below_the_floor() -> None:
    assert attempts(is_write=False, deadline_s=0.4).timeout_s(0.0) == pytest.approx(0.4)


@given(
    is_write=st.booleans(),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=12),
    lost=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_no_verdict_denies_an_attempt_that_may_have_been_applied(
    is_write: bool, kinds: list[str], lost: list[bool], seed: int
) -> None:
    tries = Attempts(is_write=is_write, deadline_s=1.0, policy=RetryPolicy(), random=Random(seed))
    now_s, maybe = 0.0, False
    for kind, is_lost in zip(kinds, lost, strict=False):
        maybe = maybe or is_lost
        outcome = "maybe_applied" if is_lost else "not_applied"
        verdict = tries.failed(KINDS[kind]("x", outcome=outcome), now_s)  # type: ignore[arg-type]
        if isinstance(verdict, GiveUp):
            assert (verdict.error.outcome == "maybe_applied") >= (is_write and maybe)
            return
        now_s += verdict.wait_s
        assert now_s < 1.0


def test_an_error_tells_everything_in_one_line() -> None:
    error = InvalidRequest(
        "vector has 383 values", field="points[3].vector", limit="384 values", attempts=1
    )
    assert str(error) == "vector has 383 values (field: points[3].vector; limit: 384 values)"
