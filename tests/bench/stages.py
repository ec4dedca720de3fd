"""Takes a query through gRPC apart: milliseconds per stage, which add up to the whole.

The client times itself around the SDK's three steps; coordinator and shard report their own stages
through `explain`. What neither accounts for lies between them: gRPC between client and coordinator,
the link between coordinator and shard.
"""

import time
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from shoal.calls import Calls
from shoal.connection import Connection
from shoal.retry import DEFAULT_RETRIES
from shoal_protos.v1 import search_pb2
from tests.bench.corpus import Floats, K
from tests.bench.paths import TIMEOUT_S, Setup

STAGES: Final = (
    ("sdk encode", "SDK: the request message, from the caller's vector"),
    ("transport", "lane or gRPC, both ends: protobuf bytes, sockets, hand-overs between threads"),
    ("decode", "coordinator: message to request"),
    ("plan", "coordinator: checks, unit length, which shards"),
    ("link", "coordinator to shard and back: choice of replica, frames, sockets, both loops"),
    ("wait", "shard: until the replica is fresh enough"),
    ("queue", "shard: until a worker is free"),
    ("search", "shard: FAISS in every segment, rescoring, merging; handing over to a thread"),
    ("fetch", "shard: payloads and vectors of the hits"),
    ("merge", "coordinator: global top k"),
    ("encode", "coordinator: result to message"),
    ("sdk decode", "SDK: reply message to hits"),
)
"""In the order of the path."""

_COORDINATOR: Final = ("decode", "plan", "scatter", "merge", "encode")
_SHARD: Final = ("wait", "queue", "search", "fetch")


class StagedSearch:
    """Asks as the SDK's client does (shoal/connection.py), with a clock between its steps."""

    def __init__(self, setup: Setup, transport: Literal["auto", "grpc"] = "auto") -> None:
        self._calls = Calls()
        self._connection = Connection(
            setup.grpc_address, timeout_s=TIMEOUT_S, retries=DEFAULT_RETRIES, transport=transport
        )
        self._route = self._connection._route()
        self._collection = setup.collection
        self._target = setup.recall_target

    def ask(self, query: Floats) -> dict[str, float]:
        """Returns milliseconds of every stage, and "end to end"."""
        started_s = time.perf_counter()
        call = self._calls.search(
            self._collection,
            vector=query[0],
            k=K,
            condition=None,
            model=None,
            with_payload=False,
            recall_target=self._target,
            explain=True,
        )
        encoded_s = time.perf_counter()
        response = self._route.ask(call, TIMEOUT_S)
        answered_s = time.perf_counter()
        found = call.decode(response)[0]
        assert len(found.ids) == K, f"{len(found.ids)} hits"
        decoded_s = time.perf_counter()
        spent = _stages_ms(response.explain)
        spent["sdk encode"] = (encoded_s - started_s) * 1e3
        spent["sdk decode"] = (decoded_s - answered_s) * 1e3
        in_coordinator = sum(spent[name] for name in _COORDINATOR)
        spent["transport"] = (answered_s - encoded_s) * 1e3 - in_coordinator
        spent["link"] = spent.pop("scatter") - sum(spent[name] for name in _SHARD)
        spent["end to end"] = (decoded_s - started_s) * 1e3
        return spent

    def close(self) -> None:
        self._connection.close()


def _stages_ms(explain: search_pb2.Explain) -> dict[str, float]:
    """Returns the reported stages; the one shard's beside the coordinator's."""
    (shard,) = explain.shards
    reported = [*explain.stages, *shard.stages]
    spent = {timing.stage: timing.duration_us / 1e3 for timing in reported}
    missing = [name for name in (*_COORDINATOR, *_SHARD) if name not in spent]
    assert not missing, f"explain reports no {missing}"
    return spent


def typical_ms(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of every stage over the middle half of the queries, by end-to-end time.

    Medians of parts do not add up to the median of the whole; the parts of typical queries do.
    """
    ordered = sorted(samples, key=lambda sample: sample["end to end"])
    middle = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
    return {name: float(np.mean([sample[name] for sample in middle])) for name in middle[0]}
