"""Writers with known last words: each owns its ids, notes what was acknowledged, deletes some."""

import threading

import numpy as np

import shoal

COLLECTION = "load"
DIMENSION = 32
BATCHES_MAX = 100_000
_JOIN_S = 60.0


class Upserts:
    """Runs writers from `start` to `stop`; `check` compares a collection with what they know."""

    def __init__(self, address: str, *, writers: int) -> None:
        self.acknowledged: dict[str, int] = {}
        self.deleted: set[str] = set()
        self.unknown: set[str] = set()
        self.unknown_deletes: set[str] = set()
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._address = address
        self._threads = [
            threading.Thread(target=self._write, args=(number,), daemon=True)
            for number in range(writers)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
            assert not thread.is_alive(), "a writer hangs"

    def _write(self, number: int) -> None:
        rng = np.random.default_rng(number)
        with shoal.Client(self._address, timeout_s=20.0) as client:
            collection = client.collection(COLLECTION)
            for batch in range(BATCHES_MAX):
                if self._stop.is_set():
                    return
                ids = [f"w{number}-{batch}-{i}" for i in range(10)]
                vectors = rng.standard_normal((10, DIMENSION)).astype(np.float32)
                try:
                    collection.upsert(ids=ids, vectors=vectors, payloads=[{"n": batch}] * 10)
                    self.acknowledged.update(dict.fromkeys(ids, batch))
                except shoal.ShoalError as error:
                    self.unknown.update(ids)
                    self.failures.append(str(error))
                    continue
                if batch % 3 == 0:
                    self._delete(collection, ids[:4])

    def _delete(self, collection: shoal.Collection, ids: list[str]) -> None:
        try:
            collection.delete(ids)
            self.deleted.update(ids)
        except shoal.ShoalError as error:
            self.unknown_deletes.update(ids)
            self.failures.append(str(error))

    def violations(self, collection: shoal.Collection) -> list[str]:
        """Reads everything strongly and returns what should not be, in words."""
        found = {point.id for point in collection.scroll(page_size=1000, consistency="strong")}
        must = set(self.acknowledged) - self.deleted - self.unknown_deletes
        allowed = must | self.unknown | self.unknown_deletes
        problems = []
        if must - found:
            problems.append(f"acknowledged rows were lost: {sorted(must - found)[:5]}")
        if self.deleted & found:
            problems.append(f"deleted rows came back: {sorted(self.deleted & found)[:5]}")
        if found - allowed:
            problems.append(f"rows that nobody wrote: {sorted(found - allowed)[:5]}")
        counted = collection.count(consistency="strong")
        if counted != len(found):
            problems.append(f"count says {counted}, scroll found {len(found)}")
        return problems
