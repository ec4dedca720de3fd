"""A load at a fixed pace over a fixed set of ids: upserts, deletes and searches, timed."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

import shoal

COLLECTION = "steady"
DIMENSION = 128
IDS = 20_000
"""Rows are replaced and deleted among these, so the collection's size settles."""

UPSERT_ROWS = 10
UPSERTS_PER_S = 20.0
DELETE_ROWS = 10
DELETES_PER_S = 2.0
SEARCHERS = 2
SEARCHES_PER_S = 20.0
"""Of each searcher. Two hundred rows a second fill a memtable of each shard every ten seconds."""

_TIMEOUT_S = 30.0
_JOIN_S = 60.0


@dataclass(slots=True)
class Timed:
    """answered: when each read was asked and answered, seconds of time.monotonic()."""

    answered: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class SteadyLoad:
    """Runs one writer and SEARCHERS searchers from `start` to `stop`.

    The one writer owns every id, so `live` is what must be there, but for `unknown`.
    """

    def __init__(self, address: str, seed: int) -> None:
        self.reads = Timed()
        self.live: set[str] = set()
        self.unknown: set[str] = set()
        self.rows_written = 0
        self.rows_deleted = 0
        self.write_failures: list[str] = []
        self.late_s = 0.0
        self._address = address
        self._seed = seed
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, daemon=True)]
        self._threads += [
            threading.Thread(target=self._search, args=(number,), daemon=True)
            for number in range(SEARCHERS)
        ]

    def fill(self, client: shoal.Client) -> None:
        """Writes every id once."""
        vectors = _vectors(np.random.default_rng(self._seed), IDS)
        names = [_id(number) for number in range(IDS)]
        client.collection(COLLECTION).bulk_upsert(ids=names, vectors=vectors)
        self.live.update(names)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
            assert not thread.is_alive(), "the load hangs"

    def violations(self, collection: shoal.Collection) -> list[str]:
        """Reads everything strongly and returns what should not be, in words."""
        found = {point.id for point in collection.scroll(page_size=1000, consistency="strong")}
        problems = []
        if lost := self.live - self.unknown - found:
            problems.append(f"{len(lost)} acknowledged rows were lost: {sorted(lost)[:5]}")
        if back := found - self.live - self.unknown:
            problems.append(f"{len(back)} deleted rows came back: {sorted(back)[:5]}")
        return problems

    def _write(self) -> None:
        rng = np.random.default_rng(self._seed + 1)
        deletes_every = round(UPSERTS_PER_S / DELETES_PER_S)
        with shoal.Client(self._address, timeout_s=_TIMEOUT_S) as client:
            collection = client.collection(COLLECTION)
            started_s = time.monotonic()
            turn = 0
            while not self._stop.is_set():
                names = [_id(n) for n in rng.choice(IDS, UPSERT_ROWS, replace=False)]
                try:
                    collection.upsert(ids=names, vectors=_vectors(rng, len(names)))
                    self.live.update(names)
                    self.unknown.difference_update(names)
                    self.rows_written += len(names)
                except shoal.ShoalError as error:
                    self.unknown.update(names)
                    self.write_failures.append(str(error))
                turn += 1
                if turn % deletes_every == 0:
                    self._delete(collection, [_id(n) for n in rng.choice(IDS, DELETE_ROWS)])
                self.late_s = self._pace(started_s + turn / UPSERTS_PER_S)

    def _delete(self, collection: shoal.Collection, names: list[str]) -> None:
        names = sorted(set(names))
        try:
            self.rows_deleted += collection.delete(names).deleted
            self.live.difference_update(names)
            self.unknown.difference_update(names)
        except shoal.ShoalError as error:
            self.unknown.update(names)
            self.write_failures.append(str(error))

    def _search(self, number: int) -> None:
        rng = np.random.default_rng(self._seed + 2 + number)
        with shoal.Client(self._address, timeout_s=_TIMEOUT_S) as client:
            collection = client.collection(COLLECTION)
            while not self._stop.is_set():
                query = rng.standard_normal(DIMENSION).astype(np.float32)
                began_s = time.monotonic()
                try:
                    collection.search(query, k=10)
                except shoal.ShoalError as error:
                    self.reads.failures.append(str(error))
                else:
                    self.reads.answered.append((began_s, time.monotonic()))
                # Not from a fixed schedule: after a stall a burst would time itself.
                self._pace(began_s + 1 / SEARCHES_PER_S)

    def _pace(self, due_s: float) -> float:
        """Waits until `due_s` or the end; returns how late it is already."""
        left_s = due_s - time.monotonic()
        if left_s > 0:
            self._stop.wait(left_s)
        return max(0.0, -left_s)


def _id(number: int) -> str:
    return f"row-{number:06d}"


def _vectors(rng: np.random.Generator, rows: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal((rows, DIMENSION)).astype(np.float32)
