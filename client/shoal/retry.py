"""Whether a failed request is sent again, and when. Pure: no sockets, no clock, no sleeping.

    failure                    read                     write
    Overloaded                 wait as told, again      wait as told, again, same request id
    Unavailable                again, elsewhere         again, elsewhere, same request id
    Indeterminate              again, elsewhere         again, elsewhere, same request id
    anything else              raised at once           raised at once

An Indeterminate that names a `field` is the shard's own word that it has forgotten the request, and
raised at once. Once an attempt of a write may have been applied, the next one says so
(RequestId.again), so that a shard which has forgotten it does not take it for a first one.

When the deadline comes first, a read raises its last failure; a write raises Indeterminate if any
attempt may have been applied, and its last failure otherwise. A write that fails for good after an
attempt that may have been applied says so in its outcome.
"""

from dataclasses import dataclass
from random import Random

from shoal.errors import Indeterminate, Overloaded, ShoalError, Unavailable

ATTEMPT_SHARE = 0.5
"""Share of the remaining time one attempt may take: a hung server leaves time for another."""

ATTEMPT_FLOOR_S = 0.5
"""An attempt gets at least this, or what is left: halving for ever would starve a slow server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with jitter: half to all of first x 2^(n-1), at most `backoff_max_s`.

    By design, not by measurement: a lost link is to be back within 20 ms or so, a shard whose
    primary died within a few times 2 s.
    """

    backoff_first_s: float = 0.02
    backoff_max_s: float = 2.0


DEFAULT_RETRIES = RetryPolicy()


class Retries:
    """A client's policy with its source of jitter, the only randomness of the SDK.

    random: a seeded one in tests; the default is seeded by the operating system.
    """

    def __init__(self, policy: RetryPolicy = DEFAULT_RETRIES, random: Random | None = None) -> None:
        self._policy = policy
        self._random = Random() if random is None else random

    def attempts(
        self, *, is_write: bool, deadline_s: float, maybe_applied: bool = False
    ) -> "Attempts":
        """Returns a fresh count of attempts; deadline_s is a time of the caller's clock.

        maybe_applied: the write was sent before, and its result is unknown.
        """
        return Attempts(
            is_write=is_write,
            deadline_s=deadline_s,
            policy=self._policy,
            random=self._random,
            maybe_applied=maybe_applied,
        )


@dataclass(frozen=True, slots=True)
class Retry:
    """Send the same request again after `wait_s`; elsewhere: to the next address."""

    wait_s: float
    elsewhere: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Raise `error`."""

    error: ShoalError


class Attempts:
    """The attempts at one request. Times are seconds of any one monotonic clock.

    Invariant: once an attempt may have been applied, no later verdict says that nothing was.
    """

    def __init__(
        self,
        *,
        is_write: bool,
        deadline_s: float,
        policy: RetryPolicy,
        random: Random,
        maybe_applied: bool = False,
    ) -> None:
        self._is_write = is_write
        self._deadline_s = deadline_s
        self._policy = policy
        self._random = random
        self._failures = 0
        self.maybe_applied = maybe_applied

    def timeout_s(self, now_s: float) -> float:
        """Returns how long the next attempt may take; never negative."""
        remaining_s = max(0.0, self._deadline_s - now_s)
        return min(remaining_s, max(ATTEMPT_FLOOR_S, remaining_s * ATTEMPT_SHARE))

    def failed(self, error: ShoalError, now_s: float) -> Retry | GiveUp:
        """Takes the failure of an attempt and says what to do."""
        self._failures += 1
        if self._is_write and error.outcome == "maybe_applied":
            self.maybe_applied = True
        forgotten = isinstance(error, Indeterminate) and error.field is not None
        if forgotten or not isinstance(error, Overloaded | Unavailable | Indeterminate):
            return GiveUp(self._final(error))
        wait_s = self._wait_s(error)
        if now_s + wait_s >= self._deadline_s:
            return GiveUp(self._out_of_time(error))
        return Retry(wait_s=wait_s, elsewhere=not isinstance(error, Overloaded))

    def _wait_s(self, error: ShoalError) -> float:
        # 2 ** 30 is far past any cap; the bound keeps the power from growing without end.
        doublings = min(self._failures - 1, 30)
        backoff_s = min(
            self._policy.backoff_max_s, self._policy.backoff_first_s * float(2**doublings)
        )
        jittered_s = backoff_s * self._random.uniform(0.5, 1.0)
        if error.retry_after_ms is None:
            return jittered_s
        # Never earlier than asked; up to a quarter later, so that callers do not come back as one.
        asked_s = error.retry_after_ms / 1000 * self._random.uniform(1.0, 1.25)
        return max(jittered_s, asked_s)

    def _final(self, error: ShoalError) -> ShoalError:
        error.attempts = self._failures
        if self.maybe_applied:
            error.outcome = "maybe_applied"
        return error

    def _out_of_time(self, error: ShoalError) -> ShoalError:
        if not self._is_write and isinstance(error, Indeterminate):
            # The server ended it at its deadline, and cannot know that it is a read.
            return self._final(Unavailable(error.message))
        if not self.maybe_applied or isinstance(error, Indeterminate):
            return self._final(error)
        return Indeterminate(
            "nothing confirmed the write in time; it may or may not have been applied: read it "
            f"back, or repeat it if that is harmless; the last failure was: {error.message}",
            outcome="maybe_applied",
            field=error.field,
            retry_after_ms=error.retry_after_ms,
            attempts=self._failures,
        )
