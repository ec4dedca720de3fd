"""`python -m tests.bench.coordinator_cost`: what the coordinator's own code costs a search.

From the serialised request, as a lane's handler gets it, to the serialised response, with a shard
that answers at once. Warm: in a tight loop. Cold: with the caches swept between the steps, as a
shard's scan on the same cores does.
"""

import asyncio
import time
from typing import Any, Final

import grpc.aio
import msgpack
import numpy as np
import uvloop

from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.ids import Epoch, Seq, SystemIdGenerator
from shoal_cluster.domain.session import Position
from shoal_cluster.edge.admission import Admission
from shoal_cluster.edge.fast_lane import lane_handlers
from shoal_cluster.edge.guard import Guard
from shoal_cluster.edge.search import SearchService
from shoal_cluster.links.messages import Request
from shoal_cluster.query.execute import Searcher
from shoal_cluster.shard.calls import AsOf, SearchReply
from shoal_protos.v1 import search_pb2, types_pb2
from shoal_protos.v1.search_pb2_grpc import add_SearchServicer_to_server
from tests.bench.machine import describe_machine
from tests.unit.query.fake_cluster import FakeCluster, a_schema

PATH: Final = "/shoal.v1.Search/Search"
DIMENSION, K = 384, 10
TURNS: Final = 6
"""Of the loop, between two steps of a search: more than any step needs."""
SWEPT_FLOATS: Final = 8_000_000
ROUNDS_WARM, ROUNDS_COLD = 1_000, 150


class ReadyShard:
    """A ShardCaller that holds its answers until they are let go."""

    def __init__(self) -> None:
        self._held: list[asyncio.Future[None]] = []
        self._replies: dict[int, bytes] = {}
        self.calls = self.queries = 0

    async def call(
        self, _server: str, _method: str, header: Any, body: Any, **_: Any
    ) -> tuple[Any, memoryview]:
        queries = len(body) // (4 * DIMENSION)
        self.calls += 1
        self.queries += queries
        msgpack.packb(header)
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.append(held)
        await held
        if queries not in self._replies:
            self._replies[queries] = _reply(queries)
        return msgpack.unpackb(self._replies[queries]), memoryview(b"")

    def let_go(self) -> None:
        held, self._held = self._held, []
        for each in held:
            each.set_result(None)


def _reply(queries: int) -> bytes:
    hits = queries * K
    reply = SearchReply(
        counts=[K] * queries,
        ids=[b"point-%07d" % hit for hit in range(hits)],
        keys=np.arange(hits, dtype=np.float32).tobytes(),
        seqs=list(range(1000, 1000 + hits)),
        tails=None,
        as_of=AsOf(position=Position(Epoch(1), Seq(100_000)), staleness_ms=3.0),
    )
    packed: bytes = msgpack.packb(reply.to_wire())
    return packed


async def measure() -> None:
    clock = SystemClock()
    cluster, shard = FakeCluster(clock), ReadyShard()
    schema = a_schema(dimension=DIMENSION)
    cluster.add_collection(schema, [["a"]])
    searcher = Searcher(caller=shard, topology=cluster, clock=clock)  # type: ignore[arg-type]
    service = SearchService(searcher, None, Admission())  # type: ignore[arg-type]
    decoders = {PATH[1:]: service.decoder.decode}
    guard = Guard(grpc.aio.server(), Admission(), SystemIdGenerator(), decoders)
    add_SearchServicer_to_server(service, guard)  # type: ignore[arg-type]
    handle: Any = lane_handlers(guard.serialised, clock)[PATH]
    vector = np.random.default_rng(0).normal(size=DIMENSION).astype(np.float32)
    raw = search_pb2.SearchRequest(
        collection=schema.name,
        vectors=(vector / np.linalg.norm(vector)).tobytes(),
        dimension=DIMENSION,
        k=K,
        consistency=types_pb2.CONSISTENCY_SESSION,
        session=types_pb2.SessionToken(
            collection_id=schema.id,
            positions=[types_pb2.ShardPosition(shard=0, epoch=1, seq=100_000)],
        ),
    ).SerializeToString()
    swept = np.zeros(SWEPT_FLOATS, np.float32)

    async def round_s(together: int, *, cold: bool) -> float:
        spent_s = 0.0
        if cold:
            swept.sum()
        began_s = time.perf_counter()
        deadline_s = clock.monotonic_s() + 15
        asked = [
            asyncio.ensure_future(handle(Request(PATH, None, memoryview(raw), deadline_s, "")))
            for _ in range(together)
        ]
        while True:
            for _ in range(TURNS):
                await asyncio.sleep(0)
            spent_s += time.perf_counter() - began_s
            if all(future.done() for future in asked):
                break
            if cold:
                swept.sum()
            began_s = time.perf_counter()
            shard.let_go()
        assert all(len(future.result()) > K for future in asked)
        return spent_s

    for together in (1, 8):
        for cold in (False, True):
            for _ in range(20):
                await round_s(together, cold=cold)
            shard.calls = shard.queries = 0
            rounds = ROUNDS_COLD if cold else ROUNDS_WARM
            spent_s = [await round_s(together, cold=cold) for _ in range(rounds)]
            print(
                f"{together} at once, {'cold' if cold else 'warm'}: "
                f"{np.median(spent_s) / together * 1e6:.1f} us a search (median of {rounds}), "
                f"{shard.queries / shard.calls:.1f} a call"
            )


if __name__ == "__main__":
    print(describe_machine())
    uvloop.run(measure())
