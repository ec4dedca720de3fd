"""What the bench asks of an engine: start, load, connect, search, stop, and which settings to try.

An adapter is imported in the engine's own environment: here are numpy and the standard library
alone. One module an engine, one class `Adapter` in it, listed in known.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

Setting = Mapping[str, Any]
"""What a search is tuned with, by the engine's own names: {"ef_search": 40}. JSON."""

Address = Mapping[str, Any]
"""What a client needs to reach the engine. JSON."""


class Clients(StrEnum):
    """How several clients ask at once."""

    PROCESSES = "processes"
    THREADS = "threads"
    """Of the process that loaded: an engine in process that no second process may open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Rows whose keyword attribute `column` equals `value`."""

    column: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """vectors: (rows, dimension) float32 of unit length, mapped. Row i has the id i.

    columns: of each keyword attribute the value row by row.
    """

    vectors: Floats
    columns: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """How a load went.

    seconds: of each step by name, in order; together until every row is indexed. settings: what
    the table and its index were made with. note: what a reader must know to compare.
    """

    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    note: str = ""


class Session(Protocol):
    """One client's connection. Used by one thread."""

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        """Returns the ids of the k nearest rows that satisfy the condition. query: (dimension,)."""
        ...

    def close(self) -> None: ...


class Peer(Protocol):
    """One engine. Everything it writes goes below `directory`; it listens on loopback only.

    distributions: whose versions are reported. networked: answers over a socket, even to itself.
    needs_own_network: listens on every address of the machine, so it is given a network of its own.
    builds: parameters of the index to compare; the first is what a run uses unless all are asked
    for. They must be chosen before the load, so they are not part of the sweep.
    """

    distributions: Sequence[str]
    networked: bool
    clients: Clients
    builds: Sequence[Setting]
    needs_own_network: bool = False

    def start(self, directory: Path) -> Address:
        """Starts the engine, empty; returns how clients reach it."""
        ...

    def load(self, rows: Rows, build: Setting) -> Loaded:
        """Loads the rows as the makers advise; returns when all are indexed. build: of `builds`."""
        ...

    def connect(self, address: Address) -> Session:
        """Called in a client's process; with THREADS in the one that loaded, once a thread."""
        ...

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        """Returns chains of settings; within a chain recall and cost grow."""
        ...

    def tune(self, setting: Setting) -> None:
        """Called where the engine was started, before clients ask with another setting.

        For engines whose setting belongs to the server; clients stay connected.
        """
        return None

    def stop(self) -> None:
        """Ends what `start` started. Also called when start or load failed half way."""
        ...


class PeerFailed(Exception):
    """The engine could not be installed, started, loaded or asked; the message says why."""


EF_LADDER: Final = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
"""Candidates an HNSW search keeps: each a third or half more than the one before."""

HNSW_BUILDS: Final = (
    {"m": 16, "ef_construction": 128},
    {"m": 32, "ef_construction": 200},
)
"""The first builds in half the time; the second needs fewer candidates for the same recall."""
