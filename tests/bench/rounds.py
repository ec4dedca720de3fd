"""Measures the paths in turns: raw, paced, link, SDK, raw, …, so all meet the same disturbance."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import psutil

from chaos.cluster import processes_of
from shoal_cluster.bootstrap import RunningCluster
from tests.bench.corpus import BenchCorpus, K
from tests.bench.machine import processor_seconds, title_of
from tests.bench.processes import CallerProcess
from tests.bench.stages import typical_ms

PATHS: Final = (
    "raw",
    "raw_paced",
    "raw_segments",
    "link",
    "sdk",
    "grpc",
    "grpc_stream",
    "sdk_payload",
    "raw_cores",
    "raw_batch",
    "sdk_batch",
)
PATHS_OF_MANY: Final = ("raw", "link", "sdk", "grpc", "grpc_stream")
WARM_UP_S: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class PathFigures:
    """One path. p50_ms, queries_per_s: median of the rounds; p99_ms: of all queries together.

    p50_ratio and queries_ratio: against raw with as many clients. recall: of the distinct
    queries that the first client asked.
    """

    path: str
    clients: int
    p50_ms: float
    p99_ms: float
    queries_per_s: float
    queries: int
    recall: float
    p50_ratio: float
    queries_ratio: float


class _Rounds:
    """Collects what the rounds of one path measured."""

    def __init__(self) -> None:
        self.p50_us: list[float] = []
        self.rates: list[float] = []
        self.latencies_us: list[float] = []

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        latencies = [each for answer in answers for each in answer["latencies_us"]]
        self.p50_us.append(float(np.percentile(latencies, 50)))
        self.rates.append(sum(len(a["latencies_us"]) / a["seconds"] for a in answers))
        self.latencies_us += latencies


def measure_paths(
    callers: Sequence[CallerProcess],
    corpus: BenchCorpus,
    *,
    rounds: int,
    seconds: float,
    progress: Callable[[str], None],
) -> list[PathFigures]:
    """Returns the figures of every path with one client, or of PATHS_OF_MANY with several."""
    clients = len(callers)
    paths = PATHS if clients == 1 else PATHS_OF_MANY
    for path in paths:
        ask_all(callers, {"path": path, "seconds": WARM_UP_S})
    collected = {path: _Rounds() for path in paths}
    gap_s = 0.0
    for number in range(rounds):
        progress(f"{clients} client{'s' * (clients > 1)}: round {number + 1} of {rounds}")
        for path in paths:
            pace = {"gap_s": gap_s} if path == "raw_paced" else {}
            collected[path].add(ask_all(callers, {"path": path, "seconds": seconds, **pace}))
        # As long as a client of the SDK leaves the index idle between two searches.
        gap_s = max(0.0, _median(collected["sdk"].p50_us) - _median(collected["raw"].p50_us)) / 1e6
    raw = collected["raw"]
    return [
        PathFigures(
            path=path,
            clients=clients,
            p50_ms=round(_median(found.p50_us) / 1e3, 3),
            p99_ms=round(float(np.percentile(found.latencies_us, 99)) / 1e3, 3),
            queries_per_s=round(_median(found.rates), 1),
            queries=len(found.latencies_us),
            recall=round(_recall(callers[0], path, corpus), 4),
            p50_ratio=round(_median(found.p50_us) / _median(raw.p50_us), 2),
            queries_ratio=round(_median(found.rates) / _median(raw.rates), 3),
        )
        for path, found in collected.items()
    ]


def measure_stages(
    caller: CallerProcess, path: str, *, rounds: int, seconds: float
) -> tuple[dict[str, float], int]:
    """Returns milliseconds per stage of a typical query, and of how many queries."""
    caller.ask({"path": path, "seconds": WARM_UP_S})
    samples = []
    for _ in range(rounds):
        samples += caller.ask({"path": path, "seconds": seconds})["stages"]
    spent = {stage: round(each, 4) for stage, each in typical_ms(samples).items()}
    spent["end to end p50"] = round(float(np.median([s["end to end"] for s in samples])), 4)
    return spent, len(samples)


def measure_processor_time(
    caller: CallerProcess, cluster: RunningCluster, path: str, *, seconds: float
) -> dict[str, float]:
    """Returns milliseconds of processor time that one query along the path takes, by process.

    Unlike latency it does not grow with what else runs on the machine, caches aside.
    """
    processes = [*processes_of(cluster), psutil.Process(caller.pid)]
    roles = {process.pid: _role(process, caller) for process in processes}
    before_s = processor_seconds(processes)
    queries = len(caller.ask({"path": path, "seconds": seconds})["latencies_us"])
    after_s = processor_seconds(processes)
    spent_ms = dict.fromkeys(("client", "coordinator", "shard server", "everything else"), 0.0)
    for pid in before_s.keys() & after_s.keys():
        spent_ms[roles[pid]] += (after_s[pid] - before_s[pid]) / queries * 1e3
    return {role: round(each, 3) for role, each in spent_ms.items()}


def _role(process: psutil.Process, caller: CallerProcess) -> str:
    if process.pid == caller.pid:
        return "client"
    title = title_of(process)
    if "Coordinator" in title:
        return "coordinator"
    return "shard server" if "ShardServer" in title else "everything else"


def as_dicts(figures: Sequence[PathFigures]) -> list[dict[str, Any]]:
    return [asdict(each) for each in figures]


def ask_all(callers: Sequence[CallerProcess], order: dict[str, Any]) -> list[dict[str, Any]]:
    for caller in callers:
        caller.send(order)
    return [caller.receive() for caller in callers]


def _recall(caller: CallerProcess, path: str, corpus: BenchCorpus) -> float:
    # raw_cores keeps no answers: they are raw's.
    answered = caller.ask({"found": "raw" if path == "raw_cores" else path})["found"]
    numbers = [int(query) for query in answered]
    found = np.array(list(answered.values()), dtype=np.int64).reshape(-1, K)
    return corpus.recall(found, np.array(numbers))


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
