"""Lets searches of one shard travel together when the shard is busy. Between scatter and replicas.

Natural batching, without timers: up to IN_FLIGHT_MAX calls of the same shard and plan are sent as
searches come; those that arrive meanwhile wait for one of them to be answered, and then go as one
call, whose answer is cut up again. A client alone never waits; at eight clients a call carries
three queries or so, and frames, messages and kernels are paid for once (docs/design/hot-path.md).

A batch asks for the newest position that any of its searches needs, which satisfies all.
"""

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.topology import Topology
from shoal_cluster.query.merge import Hits
from shoal_cluster.query.prepared import Parsed, PreparedRead
from shoal_cluster.query.replica_reads import ReplicaReads, ShardAnswer

IN_FLIGHT_MAX: Final = 3
"""Of one shard and plan: two are searched while the next is on its way. With eight clients three
answered a fifteenth more than two did, four no more than three."""

BATCH_QUERIES_MAX: Final = 64
"""A shard server cuts a batch up among its idle workers, so this bounds what waits for whom."""


class Asker(Protocol):
    """A search that waits for shards. topology: what it was planned with."""

    @property
    def topology(self) -> Topology: ...

    @property
    def deadline_s(self) -> float: ...

    @property
    def done(self) -> bool:
        """Whether nobody waits for it any more: it failed or was given up."""
        ...

    def answered(self, number: int, answer: ShardAnswer[Parsed]) -> None:
        """Takes the answer to its read of that number."""
        ...

    def failed(self, error: BaseException) -> None: ...


class Waiting(NamedTuple):
    """A search's read of that number. queries: how many the body holds."""

    asker: Asker
    number: int
    read: PreparedRead
    body: bytes | memoryview
    queries: int


@dataclass(slots=True, eq=False)
class _Line:
    """Searches of one shard and plan."""

    in_flight: int = 0
    waiting: deque[Waiting] = field(default_factory=deque)


class SearchBatches:
    """For one event loop. Bounded by the requests that the edge admits."""

    def __init__(self, reads: ReplicaReads) -> None:
        self._reads = reads
        self._lines: dict[bytes, _Line] = {}
        self._running: dict[asyncio.Task[Callable[[], None]], Sequence[Waiting]] = {}

    def ask(self, waiting: Waiting) -> None:
        """Has the shard asked; its asker hears of the answer or the failure later."""
        key = waiting.read.line
        if key is None or waiting.queries >= BATCH_QUERIES_MAX:
            self._send(None, [waiting])
            return
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        if line.in_flight >= IN_FLIGHT_MAX:
            line.waiting.append(waiting)
        else:
            line.in_flight += 1
            self._send(key, [waiting])

    def abandon(self) -> None:
        """Ends the calls that nobody waits for any more; to be called when an asker gave up."""
        for task, batch in self._running.items():
            if all(waiting.asker.done for waiting in batch):
                task.cancel()

    def _send(self, key: bytes | None, batch: Sequence[Waiting]) -> None:
        task = asyncio.ensure_future(self._ask(batch))
        self._running[task] = batch
        # Not in the task itself: one that is cancelled before its first step runs nothing of it.
        task.add_done_callback(functools.partial(self._ended, key))

    def _ended(self, key: bytes | None, task: "asyncio.Task[Callable[[], None]]") -> None:
        batch = self._running.pop(task)
        if key is not None:
            self._left(key)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            _fail(batch, error)
        else:
            # After the next call is sent: the shard need not wait until an answer is cut up.
            asyncio.get_running_loop().call_soon(task.result())

    def _left(self, key: bytes) -> None:
        """One call of the line was answered: whoever waits goes together."""
        line = self._lines[key]
        batch = _next_batch(line.waiting)
        if batch:
            self._send(key, batch)
            return
        line.in_flight -= 1
        if not line.in_flight:
            del self._lines[key]

    async def _ask(self, batch: Sequence[Waiting]) -> Callable[[], None]:
        """Returns what tells the askers."""
        asker, _, read, body, _ = batch[0]
        at_least, deadline_s = read.level.at_least, asker.deadline_s
        if len(batch) > 1:
            at_least = max(waiting.read.level.at_least for waiting in batch)
            deadline_s = max(waiting.asker.deadline_s for waiting in batch)
            body = b"".join([waiting.body for waiting in batch])
        try:
            answer = await self._reads.read(
                read.read(at_least, body), asker.topology, deadline_s=deadline_s
            )
        except Exception as error:  # noqa: BLE001  it belongs to whoever awaits the searches
            if not isinstance(error, InvalidRequest) or len(batch) == 1:
                return functools.partial(_fail, batch, error)
        else:
            return functools.partial(_hand_out, batch, answer)
        # Together they may ask for more than a reply holds, and each alone not.
        parts = await asyncio.gather(*(self._ask([waiting]) for waiting in batch))

        def deliver() -> None:
            for part in parts:
                part()

        return deliver


def _next_batch(waiting: deque[Waiting]) -> list[Waiting]:
    """Takes those that still wait, in their order, up to the bound."""
    batch: list[Waiting] = []
    queries = 0
    while waiting and queries + waiting[0].queries <= BATCH_QUERIES_MAX:
        each = waiting.popleft()
        if not each.asker.done:
            batch.append(each)
            queries += each.queries
    return batch


def _fail(batch: Sequence[Waiting], error: BaseException) -> None:
    for waiting in batch:
        waiting.asker.failed(error)


def _hand_out(batch: Sequence[Waiting], answer: ShardAnswer[Parsed]) -> None:
    if len(batch) == 1:
        batch[0].asker.answered(batch[0].number, answer)
        return
    reply, hits = answer.reply
    query = hit = 0
    for asker, number, _, _, queries in batch:
        counts = hits.counts[query : query + queries]
        end = hit + sum(counts)
        if not asker.done:
            part = (reply, _part(hits, counts, hit, end))
            asker.answered(number, ShardAnswer(part, answer.server, answer.primary, answer.reason))
        query += queries
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
