"""Takes one engine through the whole bench: start, load, sweep, and the figures at each target."""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from tests.bench.corpus import BenchCorpus, K, Truth
from tests.bench.peers.known import needs_own_network
from tests.bench.peers.peer import Clients, Condition, PeerFailed, Setting
from tests.bench.peers.processes import Worker, closing, ending_orphans
from tests.bench.peers.sweep import Chosen, Tried, choose, sweep
from tests.bench.peers.worker import COLUMNS, ENGINE, QUERIES, VECTORS

TARGETS: Final = (0.95, 0.99)
SELECTIVITIES: Final = (0.10, 0.01)

WARM_UP_S: Final = 0.2
START_S: Final = 240.0
CALL_S: Final = 120.0
"""Beyond the time that a worker is told to ask for: opening a table, restarting a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything.

    clients: how many ask at once, measured one after the other. seconds: of one measurement.
    sweep_seconds: at most for one setting. sweeps_seconds: at most for all settings under one
    condition; the first is always tried.
    """

    rows: int
    clients: Sequence[int]
    seconds: float
    sweep_seconds: float
    sweeps_seconds: float
    load_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A condition with its exact answers. selectivity: share of the rows, 1 without condition."""

    condition: Condition | None
    selectivity: float
    truth: Truth

    @property
    def order(self) -> dict[str, str] | None:
        return None if self.condition is None else asdict(self.condition)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What every engine is asked. directory: where workers read it."""

    corpus: BenchCorpus
    asked: Sequence[Asked]
    directory: Path
    size: Size


def make_workload(corpus: BenchCorpus, size: Size, directory: Path) -> Workload:
    """Writes rows and queries for the workers and finds exact answers under every condition.

    The conditions are real attributes: of all values the one whose share of the rows is nearest to
    each of SELECTIVITIES.
    """
    np.save(directory / VECTORS, corpus.vectors)
    np.save(directory / QUERIES, corpus.queries)
    columns = {
        name: {"values": list(column.values), "codes": column.codes.tolist()}
        for name, column in corpus.columns.items()
    }
    (directory / COLUMNS).write_text(json.dumps(columns))
    asked = [Asked(condition=None, selectivity=1.0, truth=corpus.truth)]
    for share in SELECTIVITIES:
        near = {name: column.nearest_to(share) for name, column in corpus.columns.items()}
        shares = {
            name: float(corpus.columns[name].matches(value).mean()) for name, value in near.items()
        }
        name = min(shares, key=lambda each: abs(shares[each] - share))
        asked.append(
            Asked(
                condition=Condition(column=name, value=near[name]),
                selectivity=shares[name],
                truth=corpus.truth_where(name, near[name]),
            )
        )
    return Workload(corpus=corpus, asked=asked, directory=directory, size=size)


def measure_engine(
    name: str, build: int, workload: Workload, log: IO[bytes], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Returns every figure of one engine, or what it failed at and why.

    build: which of its builds, by position.
    """
    figures: dict[str, Any] = {"engine": name}
    try:
        with ending_orphans():
            _Engine(name, build, workload, log, tell).run(figures)
    except PeerFailed as failure:
        figures["failed"] = {"at": figures.pop("step", "install"), "error": str(failure)}
        tell(f"failed at {figures['failed']['at']}: {failure}")
    finally:
        shutil.rmtree(workload.directory / ENGINE, ignore_errors=True)
    figures.pop("step", None)
    return figures


_Clients = tuple[list[Worker], int]
"""The workers that ask, and how many threads each asks with."""


class _Engine:
    def __init__(
        self,
        name: str,
        build: int,
        workload: Workload,
        log: IO[bytes],
        tell: Callable[[str], None],
    ) -> None:
        self._name = name
        self._build = build
        self._workload = workload
        self._size = workload.size
        self._log = log
        self._tell = tell
        self._address: Mapping[str, Any] = {}

    def run(self, figures: dict[str, Any]) -> None:
        host = Worker(
            self._name,
            self._workload.directory,
            self._log,
            own_network=needs_own_network(self._name),
        )
        with closing([host]):
            host.wait_ready()
            described = host.ask("describe", CALL_S)
            build = described.pop("builds")[self._build]
            figures |= described | {"build": build}
            figures["step"] = "start"
            self._tell("starting")
            self._address = host.ask("start", START_S)["address"]
            figures["step"] = "load"
            self._tell(f"loading {self._size.rows:,} rows")
            figures["load"] = host.ask("load", self._size.load_seconds, build=build)
            seconds = sum(figures["load"]["seconds"].values())
            figures["load"]["rows_per_s"] = round(self._size.rows / max(seconds, 1e-9))
            figures["memory_mib"] = host.memory_mib()
            threads = described["clients"] == Clients.THREADS
            figures["step"] = "search"
            figures["sweep"], figures["measured"] = [], []
            with self._clients(host, 1, threads) as one:
                chosen = self._sweep(host, one, figures["sweep"])
                self._measure(host, one, 1, chosen, figures["measured"])
            for count in self._size.clients:
                if count > 1:
                    with self._clients(host, count, threads) as many:
                        self._measure(host, many, count, chosen, figures["measured"])

    @contextlib.contextmanager
    def _clients(self, host: Worker, count: int, threads: bool) -> Iterator[_Clients]:
        if threads:
            host.ask("connect", CALL_S, address=self._address, sessions=count)
            yield [host], count
            return
        network = host if needs_own_network(self._name) else None
        with closing([]) as clients:
            for _ in range(count):
                client = Worker(self._name, self._workload.directory, self._log, network_of=network)
                clients.append(client)
            for client in clients:
                client.wait_ready()
                client.ask("connect", CALL_S, address=self._address, sessions=1)
            yield clients, 1

    def _sweep(
        self, host: Worker, clients: _Clients, swept: list[dict[str, Any]]
    ) -> list[tuple[Asked, Chosen]]:
        """Tries settings under every condition; returns what to measure for every target."""
        chosen = []
        for asked in self._workload.asked:
            self._tell(f"trying settings, {_named(asked)}")
            order = {"condition": asked.order, "rows": self._size.rows}
            found = sweep(
                host.ask("settings", CALL_S, **order)["chains"],
                TARGETS,
                functools.partial(self._try, host, clients, asked),
                _until(time.monotonic() + self._size.sweeps_seconds),
            )
            swept.append({"condition": asked.order, **asdict(found)})
            chosen += [(asked, choose(found.tried, target)) for target in TARGETS]
        return chosen

    def _try(self, host: Worker, clients: _Clients, asked: Asked, setting: Setting) -> Tried:
        host.ask("tune", CALL_S, setting=dict(setting))
        self._ask(clients, asked, setting, WARM_UP_S, once=False)
        answers = self._ask(clients, asked, setting, self._size.sweep_seconds, once=True)
        latencies_us = answers[0]["latencies_us"]
        return Tried(
            setting=setting,
            recall=round(self._recall(answers, asked), 4),
            mean_ms=round(float(np.mean(latencies_us)) / 1e3, 3),
            p50_ms=round(float(np.median(latencies_us)) / 1e3, 3),
            queries=len(latencies_us),
        )

    def _measure(
        self,
        host: Worker,
        clients: _Clients,
        count: int,
        chosen: Sequence[tuple[Asked, Chosen]],
        measured: list[dict[str, Any]],
    ) -> None:
        self._tell(f"measuring with {count} client{'s' * (count > 1)}")
        for asked, choice in chosen:
            setting = choice.tried.setting
            host.ask("tune", CALL_S, setting=dict(setting))
            self._ask(clients, asked, setting, self._size.seconds / 4, once=False)
            answers = self._ask(clients, asked, setting, self._size.seconds, once=False)
            latencies_us = [each for answer in answers for each in answer["latencies_us"]]
            p50_us, p99_us = np.percentile(latencies_us, [50, 99])
            rate = sum(len(answer["latencies_us"]) / answer["seconds"] for answer in answers)
            measured.append(
                {
                    "condition": asked.order,
                    "selectivity": round(asked.selectivity, 4),
                    "target": choice.target,
                    "reached": choice.reached,
                    "setting": dict(setting),
                    "clients": count,
                    "queries_per_s": round(rate, 1),
                    "p50_ms": round(p50_us / 1e3, 3),
                    "p99_ms": round(p99_us / 1e3, 3),
                    "recall": round(self._recall(answers, asked), 4),
                    "queries": len(latencies_us),
                }
            )

    def _ask(
        self,
        clients: _Clients,
        asked: Asked,
        setting: Setting,
        seconds: float,
        *,
        once: bool,
    ) -> list[dict[str, Any]]:
        """Lets all clients ask at once, each beginning at another query."""
        workers, threads = clients
        step = len(self._workload.corpus.queries) // len(workers)
        for number, worker in enumerate(workers):
            worker.send(
                "ask",
                setting=dict(setting),
                condition=asked.order,
                k=K,
                seconds=seconds,
                first=number * step,
                threads=threads,
                once=once,
            )
        return [worker.receive(seconds + CALL_S) for worker in workers]

    def _recall(self, answers: Sequence[Mapping[str, Any]], asked: Asked) -> float:
        """Returns the recall over all distinct queries that were asked."""
        found: dict[str, list[int]] = {}
        for answer in answers:
            found |= answer["found"]
        padded = np.full((len(found), K), -1, dtype=np.int64)
        for place, rows in enumerate(found.values()):
            padded[place, : len(rows[:K])] = rows[:K]
        numbers = np.array([int(query) for query in found])
        return self._workload.corpus.recall(padded, numbers, asked.truth)


def _until(end_s: float) -> Callable[[], bool]:
    return lambda: time.monotonic() < end_s


def _named(asked: Asked) -> str:
    if asked.condition is None:
        return "no filter"
    share = f"{asked.selectivity:.1%} of the rows"
    return f"{asked.condition.column} = {asked.condition.value} ({share})"
