import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import shoal
from shoal_cluster.cli.demo.traffic import Attempt, Traffic, latency_of
from shoal_cluster.domain.clock import SystemClock

DEADLINE_S = 10.0


class Answers:
    """A client whose searches return what `answer` returns; counts them."""

    def __init__(self, answer: Callable[[int], list[str]], enough: int) -> None:
        self._answer = answer
        self._enough = enough
        self._lock = threading.Lock()
        self.asked = 0
        self.had_enough = threading.Event()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def collection(self, name: str, **_: Any) -> "Answers":
        return self

    def search(self, vector: Any, **_: Any) -> Any:
        with self._lock:
            self.asked += 1
            number = self.asked
        if number >= self._enough:
            self.had_enough.set()
        return type("Found", (), {"ids": self._answer(number)})


def run_traffic(answer: Callable[[int], list[str]], enough: int = 8) -> list[Attempt]:
    answers = Answers(answer, enough)
    vectors = np.zeros((3, 2), dtype=np.float32)
    with Traffic(
        lambda: answers,  # type: ignore[arg-type, return-value]
        vectors,
        SystemClock(),
        k=1,
        clients=2,
        rate_per_s=200,
    ) as traffic:
        assert answers.had_enough.wait(DEADLINE_S)
    return traffic.attempts


def test_every_query_is_recorded_with_its_answer() -> None:
    attempts = run_traffic(lambda number: ["p"])
    assert len(attempts) >= 8
    assert all(attempt.ids == ["p"] and not attempt.error for attempt in attempts)
    assert {attempt.query for attempt in attempts} == {0, 1, 2}
    assert all(attempt.answered_s >= attempt.due_s for attempt in attempts)


def test_failed_query_is_recorded_and_the_traffic_goes_on() -> None:
    def answer(number: int) -> list[str]:
        if number == 3:
            raise shoal.Unavailable("gone")
        return ["p"]

    failed = [attempt for attempt in run_traffic(answer) if attempt.error]
    assert [attempt.error for attempt in failed] == ["gone"]


def test_short_answer_counts_as_failed() -> None:
    attempts = run_traffic(lambda number: [])
    assert all(attempt.error == "0 hits instead of 1" for attempt in attempts)


def test_bug_in_a_client_thread_is_not_lost() -> None:
    def answer(number: int) -> list[str]:
        if number == 8:
            raise ZeroDivisionError
        return ["p"]

    with pytest.raises(ZeroDivisionError):
        run_traffic(answer)


def test_stalled_query_is_felt_by_those_that_were_due_meanwhile() -> None:
    """One answer is held back; with one client a dozen queries are due until it comes."""
    release = threading.Event()
    timer = threading.Timer(0.2, release.set)

    def answer(number: int) -> list[str]:
        if number == 1:
            timer.start()
            release.wait(DEADLINE_S)
        return ["p"]

    answers = Answers(answer, enough=20)
    with Traffic(
        lambda: answers,  # type: ignore[arg-type, return-value]
        np.zeros((1, 2), dtype=np.float32),
        SystemClock(),
        k=1,
        clients=1,
        rate_per_s=100,
    ) as traffic:
        assert answers.had_enough.wait(DEADLINE_S)
    slow = [attempt for attempt in traffic.attempts if attempt.latency_ms > 50]
    assert len(slow) > 5


def test_latency_leaves_failed_queries_out_and_survives_none() -> None:
    def took(latency_ms: float, error: str = "") -> Attempt:
        return Attempt(query=0, due_s=0.0, answered_s=latency_ms / 1000, error=error)

    summary = latency_of([took(1), took(2), took(3), took(9000, "gone")])
    assert summary.queries == 3
    assert summary.p50_ms == pytest.approx(2.0)
    assert latency_of([]).p99_ms == 0.0
