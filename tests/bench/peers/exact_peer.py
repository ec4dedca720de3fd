"""Every row compared with numpy, in process: what any recall costs without an index.

Its one setting has recall 1; a test spoils it with `drop` to see the bench notice.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.bench.peers.peer import Address, Clients, Condition, Floats, Loaded, Peer, Rows, Setting


class Adapter(Peer):
    distributions = ("numpy",)
    networked = False
    clients = Clients.THREADS
    builds = ({},)

    def __init__(self) -> None:
        self._engine: _Table | None = None

    def start(self, directory: Path) -> Address:
        return {}

    def load(self, rows: Rows, build: Setting) -> Loaded:
        started_s = time.perf_counter()
        self._engine = _Table(rows)
        return Loaded(seconds={"copy": time.perf_counter() - started_s}, settings={})

    def connect(self, address: Address) -> "_Table":
        assert self._engine is not None, "load comes first"
        return self._engine

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        return [[{"drop": 9}, {"drop": 0}]]

    def stop(self) -> None:
        self._engine = None


class _Table:
    def __init__(self, rows: Rows) -> None:
        self._vectors = np.array(rows.vectors)
        self._columns = {name: np.array(values) for name, values in rows.columns.items()}

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        """drop: how many of the nearest are left out."""
        similarity = self._vectors @ query
        if condition is not None:
            similarity[self._columns[condition.column] != condition.value] = -np.inf
        nearest: npt.NDArray[Any] = np.argsort(-similarity, kind="stable")[: k - setting["drop"]]
        ids: list[int] = nearest.tolist()
        return ids

    def close(self) -> None:
        return None
