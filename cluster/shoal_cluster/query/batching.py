"""Lets searches of one shard travel together when the shard is busy. Between scatter and replicas.

Natural batching, without timers: up to IN_FLIGHT_MAX searches of the same shard and plan are sent
as they come; those that arrive meanwhile wait for one of them to be answered, and then go as one
call, whose answer is cut up again. A client alone never waits; at eight clients a call carries
three queries or so, and frames, messages and kernels are paid for once (docs/design/hot-path.md).

A batch asks for the newest position that any of its searches needs, which satisfies all.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgpack

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.topology import Topology
from shoal_cluster.query.merge import Hits
from shoal_cluster.query.replica_reads import ReplicaReads, ShardAnswer, ShardRead
from shoal_cluster.shard.calls import ReadLevel, SearchCall, SearchReply

IN_FLIGHT_MAX: Final = 2
"""Of one shard and plan: one is searched while the next is on its way."""

BATCH_QUERIES_MAX: Final = 64
"""A shard server cuts a batch up among its idle workers, so this bounds what waits for whom."""

Parsed = tuple[SearchReply, Hits]

_pack = msgpack.Packer(autoreset=True).pack


@dataclass(slots=True, eq=False)
class _Waiting:
    """queries: how many the body holds."""

    read: ShardRead[Parsed]
    call: SearchCall
    queries: int
    topology: Topology
    deadline_s: float
    future: "asyncio.Future[ShardAnswer[Parsed]]"


@dataclass(slots=True, eq=False)
class _Line:
    """Searches of one shard and plan."""

    in_flight: int = 0
    waiting: deque[_Waiting] = field(default_factory=deque)


class SearchBatches:
    """For one event loop. Bounded by the requests that the edge admits."""

    def __init__(self, reads: ReplicaReads) -> None:
        self._reads = reads
        self._lines: dict[bytes, _Line] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def read(
        self,
        read: ShardRead[Parsed],
        call: SearchCall,
        queries: int,
        topology: Topology,
        *,
        deadline_s: float,
    ) -> ShardAnswer[Parsed]:
        """Returns what one shard finds, as `ReplicaReads.read`.

        read: carries `call` in its header and `queries` vectors in its body.
        """
        if call.explain or queries >= BATCH_QUERIES_MAX:
            return await self._reads.read(read, topology, deadline_s=deadline_s)
        # Everything of the call but its level, which is last.
        key: bytes = _pack((read.header[:-1], call.level.consistency.value))  # type: ignore[index]
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        if line.in_flight >= IN_FLIGHT_MAX:
            future: asyncio.Future[ShardAnswer[Parsed]] = asyncio.get_running_loop().create_future()
            line.waiting.append(_Waiting(read, call, queries, topology, deadline_s, future))
            return await future
        line.in_flight += 1
        try:
            return await self._reads.read(read, topology, deadline_s=deadline_s)
        finally:
            self._left(key, line)

    def _left(self, key: bytes, line: _Line) -> None:
        """One of the line was answered: whoever waits goes together."""
        line.in_flight -= 1
        batch = _next_batch(line.waiting)
        if batch:
            line.in_flight += 1
            task = asyncio.ensure_future(self._run(key, line, batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        elif not line.in_flight:
            del self._lines[key]

    async def _run(self, key: bytes, line: _Line, batch: Sequence[_Waiting]) -> None:
        try:
            await self._ask(batch)
        finally:
            self._left(key, line)

    async def _ask(self, batch: Sequence[_Waiting]) -> None:
        first = batch[0]
        try:
            answer = await self._reads.read(
                _joined(batch),
                first.topology,
                deadline_s=max(waiting.deadline_s for waiting in batch),
            )
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001  it belongs to whoever awaits the searches
            if isinstance(error, InvalidRequest) and len(batch) > 1:
                # Together they may ask for more than a reply holds, and each alone not.
                await asyncio.gather(*(self._ask([waiting]) for waiting in batch))
                return
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
        else:
            _hand_out(answer, batch)


def _next_batch(waiting: deque[_Waiting]) -> list[_Waiting]:
    """Takes those that still wait, in their order, up to the bound."""
    batch: list[_Waiting] = []
    queries = 0
    while waiting and queries + waiting[0].queries <= BATCH_QUERIES_MAX:
        each = waiting.popleft()
        if not each.future.done():
            batch.append(each)
            queries += each.queries
    return batch


def _joined(batch: Sequence[_Waiting]) -> ShardRead[Parsed]:
    first = batch[0]
    if len(batch) == 1:
        return first.read
    level = ReadLevel(
        consistency=first.call.level.consistency,
        at_least=max(waiting.call.level.at_least for waiting in batch),
    )
    return replace(
        first.read,
        header=replace(first.call, level=level).to_wire(),
        body=b"".join(waiting.read.body for waiting in batch),
    )


def _hand_out(answer: ShardAnswer[Parsed], batch: Sequence[_Waiting]) -> None:
    reply, hits = answer.reply
    query = hit = 0
    for waiting in batch:
        counts = hits.counts[query : query + waiting.queries]
        end = hit + sum(counts)
        if not waiting.future.done():
            part: Any = (reply, _part(hits, counts, hit, end))
            waiting.future.set_result(replace(answer, reply=part))
        query += waiting.queries
        hit = end


def _part(hits: Hits, counts: Sequence[int], start: int, end: int) -> Hits:
    return Hits(
        counts=counts,
        ids=hits.ids[start:end],
        keys=hits.keys[start:end],
        seqs=hits.seqs[start:end],
        tails=None if hits.tails is None else hits.tails[start:end],
        vectors=None if hits.vectors is None else hits.vectors[start:end],
    )
