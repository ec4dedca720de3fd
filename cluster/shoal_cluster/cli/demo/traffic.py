"""Queries at a steady rate from several clients, each call recorded.

Open loop: a query is due at a fixed time whatever happened to the one before, and its latency
counts from then. A stall is therefore felt by every query that fell into it, not by one.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from shoal import Client, ShoalError
from shoal_cluster.cli.demo.corpus import COLLECTION, MODEL, Floats
from shoal_cluster.domain.clock import Clock

CLIENTS = 4
RATE_PER_S = 80
"""Offered load: about a third of what two cores answer, so that a p99 shows the outage, not a queue
that is always there."""

ATTEMPTS_MAX = 100_000
"""Twenty minutes at the rate; the outage ends long before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One query. due_s, answered_s: of the traffic's clock. ids: its hits; error: "" when it
    succeeded."""

    query: int
    due_s: float
    answered_s: float
    ids: Sequence[str] = ()
    error: str = ""

    @property
    def latency_ms(self) -> float:
        return (self.answered_s - self.due_s) * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """p50_ms and p99_ms are 0 when there were no queries."""

    queries: int
    p50_ms: float
    p99_ms: float


def latency_of(attempts: Sequence[Attempt]) -> Latency:
    """Summarises the successful attempts."""
    took_ms = [attempt.latency_ms for attempt in attempts if not attempt.error]
    if not took_ms:
        return Latency(queries=0, p50_ms=0.0, p99_ms=0.0)
    p50_ms, p99_ms = np.percentile(took_ms, (50, 99))
    return Latency(queries=len(took_ms), p50_ms=float(p50_ms), p99_ms=float(p99_ms))


class Traffic:
    """Runs while its `with` block does.

    An answer of fewer than k hits counts as failed: without a filter there are always k.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        query_vectors: Floats,
        clock: Clock,
        *,
        k: int,
        clients: int = CLIENTS,
        rate_per_s: float = RATE_PER_S,
    ) -> None:
        self._connect = connect
        self._query_vectors = query_vectors
        self._clock = clock
        self._k = k
        self._clients = clients
        self._period_s = clients / rate_per_s
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._attempts: list[Attempt] = []
        self._pool = ThreadPoolExecutor(max_workers=clients, thread_name_prefix="shoal-demo")
        self._running: list[Future[None]] = []

    def __enter__(self) -> Self:
        first_s = self._clock.monotonic_s()
        self._running = [
            self._pool.submit(self._ask_steadily, number, first_s)
            for number in range(self._clients)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._pool.shutdown(wait=True)
        if error is None:
            for each in self._running:
                each.result()

    @property
    def attempts(self) -> list[Attempt]:
        """Returns what was answered so far, in no particular order."""
        with self._lock:
            return list(self._attempts)

    def _ask_steadily(self, number: int, first_s: float) -> None:
        with self._connect() as client:
            collection = client.collection(COLLECTION, model=MODEL)
            due_s = first_s + self._period_s * number / self._clients
            query = number
            while not self._stopping.wait(max(0.0, due_s - self._clock.monotonic_s())):
                query = (query + self._clients) % len(self._query_vectors)
                ids: Sequence[str] = ()
                failure = ""
                try:
                    found = collection.search(
                        self._query_vectors[query], k=self._k, with_payload=False
                    )
                    ids = found.ids
                    if len(ids) < self._k:
                        failure = f"{len(ids)} hits instead of {self._k}"
                except ShoalError as error:
                    failure = str(error)
                attempt = Attempt(
                    query=query,
                    due_s=due_s,
                    answered_s=self._clock.monotonic_s(),
                    ids=ids,
                    error=failure,
                )
                with self._lock:
                    self._attempts.append(attempt)
                    if len(self._attempts) >= ATTEMPTS_MAX:
                        return
                due_s += self._period_s
