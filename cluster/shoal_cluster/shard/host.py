"""All replicas of one shard server: opens, promotes and closes them, and answers calls on them.

Control methods are idempotent: the controller repeats them until what it observes is what it wants.
A replica that cannot be loaded, or that is in quarantine because bytes it served from are damaged,
is FAILED; opening it again backs off, because every attempt reads whole segments.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog

from shoal_cluster.domain.errors import (
    Corrupt,
    Internal,
    InvalidRequest,
    NotPrimary,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import CollectionId, Epoch, ShardNumber, Slot
from shoal_cluster.domain.limits import (
    HITS_ID_BYTES_MAX,
    HITS_TAIL_BYTES_MAX,
    POINT_ID_BYTES_MAX,
    SHARD_PAGE_BYTES_MAX,
)
from shoal_cluster.domain.observation import ReplicaReport, ReplicaState
from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.filtering.wire import from_wire
from shoal_cluster.shard import rows, search
from shoal_cluster.shard.calls import (
    CountCall,
    CountReply,
    GetCall,
    ReadLevel,
    RowsReply,
    ScrollCall,
    SearchCall,
    SearchReply,
    WriteCall,
    WriteFate,
    rows_body,
)
from shoal_cluster.shard.damage import Damage, Part
from shoal_cluster.shard.loading_calls import LoadCall, LoadReply
from shoal_cluster.shard.ports import Publisher, ShardPorts
from shoal_cluster.shard.primary import Primary
from shoal_cluster.shard.recall_sampling import RecallSampler, SampleBudget
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.scrubbing import Scrubber
from shoal_cluster.shard.search_queue import SearchQueue
from shoal_cluster.shard.state import Snapshot
from shoal_cluster.shard.takeover import take_over

_log = structlog.get_logger()

REOPEN_S_MIN = 1.0
REOPEN_S_MAX = 60.0
"""Pause before a replica is opened again: none after the first failure, then doubling to this."""
REOPEN_UNAVAILABLE_S_MAX = 5.0
"""The same while the bucket just does not answer, which costs nothing to ask."""
_REASONS_SHOWN = 3

ShardName = tuple[CollectionId, ShardNumber]


@dataclass(slots=True)
class _Hosted:
    replica: Replica
    sampler: RecallSampler
    state: ReplicaState
    opening: asyncio.Task[None] | None = None
    primary: Primary | None = None
    promoting: asyncio.Lock | None = None
    reason: str = ""
    damage: str = ""
    failures: int = 0
    reopen_s: float = float("-inf")
    ready_s: float = float("inf")
    unfit: bool = False


class ShardHost:
    """publisher_of: makes the Publisher of a shard, which knows the followers' addresses.

    In _Hosted: damage: what the scrubber found and does not keep the replica from serving.
    failures: openings in a row that failed or came to nothing; reopen_s: monotonic, when the next
    may be; ready_s: monotonic, when this one succeeded. unfit: a takeover
    met damage, so the next one must first see the log's tail.
    """

    def __init__(self, ports: ShardPorts, publisher_of: Callable[[ShardName], Publisher]) -> None:
        self._ports = ports
        self._publisher_of = publisher_of
        self._hosted: dict[ShardName, _Hosted] = {}
        self.scrubber = Scrubber(ports, self._serving, self.treat)
        self._scrubbing: asyncio.Task[None] | None = None
        self._queue = SearchQueue(ports.compute, ports.clock, ports.search_workers)
        self._sample_budget = SampleBudget(ports.clock)
        self.searches = 0

    def start_scrubbing(self) -> None:
        """Begins to read everything again in the background, until `close_all`."""
        if self._scrubbing is None:
            self._scrubbing = asyncio.ensure_future(self.scrubber.run())

    def open(self, schema: CollectionSchema, shard: ShardNumber) -> None:
        """Begins to load a replica, or hands a newer schema to one that is there."""
        name = (schema.id, shard)
        hosted = self._hosted.get(name)
        if hosted is not None and hosted.state is not ReplicaState.FAILED:
            hosted.replica.alter(schema)
            hosted.sampler.alter()
            return
        failures = 0
        if hosted is not None:
            retiring = hosted.opening is not None and not hosted.opening.done()
            if retiring or self._ports.clock.monotonic_s() < hosted.reopen_s:
                return
            failures = hosted.failures
        replica = Replica(schema, shard, self._ports)
        hosted = _Hosted(
            replica=replica,
            sampler=RecallSampler(replica, self._ports.background, self._sample_budget),
            state=ReplicaState.LOADING,
            failures=failures,
        )
        replica.on_died = functools.partial(self._bury, name, hosted)
        hosted.opening = asyncio.ensure_future(self._load(name, hosted))
        self._hosted[name] = hosted

    async def _load(self, name: ShardName, hosted: _Hosted) -> None:
        try:
            await hosted.replica.load()
            hosted.state = ReplicaState.READY
            hosted.ready_s = self._ports.clock.monotonic_s()
        except asyncio.CancelledError:
            raise
        except Exception as raised:  # noqa: BLE001  a bug must not leave it loading for ever
            error = raised if isinstance(raised, ShoalError) else Internal(repr(raised))
            hosted.state = ReplicaState.FAILED
            hosted.reason = error.message
            if isinstance(error, Corrupt):
                hosted.reason += (
                    "; put a sound copy of the object back (`shoal check` names all that are "
                    "damaged), and the replica opens by itself"
                )
            self._back_off(hosted, error)
            _log.error(
                "replica_failed",
                collection=name[0],
                shard=name[1],
                reason=hosted.reason,
                failures=hosted.failures,
            )

    def _bury(self, name: ShardName, hosted: _Hosted, cause: Exception) -> None:
        """Has a replica opened again that follows the log no more."""
        if hosted.state is not ReplicaState.READY:
            return
        hosted.state = ReplicaState.FAILED
        hosted.reason = hosted.replica.failures.reason()
        self._back_off(hosted, Internal(repr(cause)))
        _log.error(
            "replica_died",
            collection=name[0],
            shard=name[1],
            reason=hosted.reason,
            failures=hosted.failures,
        )
        hosted.opening = asyncio.ensure_future(_retire(hosted))

    def _back_off(self, hosted: _Hosted, error: ShoalError) -> None:
        """Sets when the replica may be opened again."""
        if self._ports.clock.monotonic_s() - hosted.ready_s >= REOPEN_S_MAX:
            hosted.failures = 0  # it lived
        hosted.failures += 1
        if hosted.failures == 1:
            return
        longest_s = REOPEN_UNAVAILABLE_S_MAX if isinstance(error, Unavailable) else REOPEN_S_MAX
        # Bounded before the power is: a replica may fail for a year.
        delay_s = min(REOPEN_S_MIN * 2.0 ** min(hosted.failures - 2, 10), longest_s)
        hosted.reopen_s = self._ports.clock.monotonic_s() + delay_s

    def treat(self, name: ShardName, replica: Replica, damages: Sequence[Damage]) -> None:
        """Acts on what the scrubber found: quarantine, or repair by the primary if it is here."""
        hosted = self._hosted.get(name)
        if hosted is None or hosted.replica is not replica:
            return
        shown = [f"{damage.reason} ({damage.advice})" for damage in damages[:_REASONS_SHOWN]]
        hosted.damage = "; ".join(shown)
        for damage in damages:
            if damage.served:
                self._quarantine(name, hosted, damage)
                return
        if damages and hosted.primary is not None and hosted.primary.serving:
            hosted.primary.repair(damages)

    def _quarantine(self, name: ShardName, hosted: _Hosted, damage: Damage) -> None:
        """Stops the replica at once: it answers nothing any more until it is loaded again (Z-1).

        Loading compares every byte, fetches damaged copies again and builds derived files again.
        """
        if hosted.state is not ReplicaState.READY:
            return
        hosted.state = ReplicaState.FAILED
        hosted.reason = f"{damage.reason} ({damage.advice})"
        _log.error("replica_quarantined", collection=name[0], shard=name[1], reason=hosted.reason)
        hosted.opening = asyncio.ensure_future(_retire(hosted))

    @contextlib.contextmanager
    def _guarding(self, name: ShardName, hosted: _Hosted) -> Iterator[None]:
        """Puts a replica in quarantine whose rows turn out to be unreadable.

        Raises: Unavailable then, and when the replica was put there meanwhile: ask another.
        """
        try:
            yield
        except Corrupt as error:
            in_place = self._ports.store.local_path(hosted.replica.keys.slot(Slot(1))) is not None
            damage = Damage(
                part=Part.ROWS, key="", reason=error.message, served=True, fetched=not in_place
            )
            self._quarantine(name, hosted, damage)
        if hosted.state is not ReplicaState.READY:
            raise Unavailable(f"the replica of shard {name[1]} is in quarantine: {hosted.reason}")

    def _serving(self) -> Mapping[ShardName, Replica]:
        return {
            name: hosted.replica
            for name, hosted in self._hosted.items()
            if hosted.state is ReplicaState.READY
        }

    async def close(self, name: ShardName) -> None:
        hosted = self._hosted.pop(name, None)
        if hosted is None:
            return
        if hosted.opening is not None:
            hosted.opening.cancel()
            await asyncio.gather(hosted.opening, return_exceptions=True)
        await _retire(hosted)

    async def close_all(self) -> None:
        if self._scrubbing is not None:
            self._scrubbing.cancel()
            await asyncio.gather(self._scrubbing, return_exceptions=True)
            self._scrubbing = None
        for name in list(self._hosted):
            await self.close(name)

    async def promote(self, name: ShardName) -> Epoch:
        """Takes the shard over and serves its writes; returns the epoch.

        Raises: Conflict when somebody else is taking over; Unavailable when the replica is not
        loaded or the bucket does not answer; Corrupt naming what cannot be replayed.
        """
        hosted = self._ready(name)
        if hosted.promoting is None:
            hosted.promoting = asyncio.Lock()
        async with hosted.promoting:
            if hosted.primary is not None and hosted.primary.serving:
                return hosted.primary.epoch
            replica = hosted.replica
            if hosted.unfit:
                # Without this every attempt would burn an epoch before it meets the damage.
                await replica.probe()
                hosted.unfit = False
            async with replica.advancing:
                try:
                    epoch = await take_over(replica)
                except Corrupt:
                    hosted.unfit = True
                    raise
                if self._hosted.get(name) is not hosted or hosted.state is not ReplicaState.READY:
                    # Closed or put in quarantine while we were taking over: nobody would ever stop
                    # this primary. The epoch is burned; another replica takes the next.
                    raise Unavailable(f"the replica of shard {name[1]} was closed meanwhile")
                hosted.primary = Primary(replica, epoch, self._publisher_of(name))
                hosted.primary.start()
            return epoch

    def offer(self, name: ShardName, slot: Slot, body: bytes) -> None:
        """Takes a record that a primary pushed; unknown shards and old records are ignored."""
        hosted = self._hosted.get(name)
        if hosted is not None and hosted.state is ReplicaState.READY:
            hosted.replica.offer(slot, body)

    def wake(self, name: ShardName) -> None:
        hosted = self._hosted.get(name)
        if hosted is not None and hosted.state is ReplicaState.READY:
            hosted.replica.wake()

    @contextlib.asynccontextmanager
    async def reading(self, name: ShardName, level: ReadLevel) -> AsyncIterator[Replica]:
        """Lends a replica that satisfies the read level; damage met meanwhile is acted on."""
        hosted = self._ready(name)
        await hosted.replica.wait_for(level)
        with self._guarding(name, hosted):
            yield hosted.replica

    async def search(self, call: SearchCall, body: bytes | memoryview) -> tuple[SearchReply, bytes]:
        """Answers a search; the bytes are the reply's body.

        Raises: InvalidRequest when what the hits hold does not fit a reply.
        """
        name = (call.collection, call.shard)
        hosted = self._ready(name)
        started_s = self._ports.clock.monotonic_s()
        await hosted.replica.wait_for(call.level)
        with self._guarding(name, hosted):
            answer = await self._search(hosted, call, body, started_s)
        return answer

    async def _search(
        self, hosted: _Hosted, call: SearchCall, body: bytes | memoryview, started_s: float
    ) -> tuple[SearchReply, bytes]:
        clock = self._ports.clock
        replica = hosted.replica
        schema = replica.schema
        order = search.SearchOrder(
            queries=queries_of(body, schema.dimension),
            k=call.k,
            filter=_expression(call.filter),
            exact=call.exact,
            recall_target=call.recall_target or schema.recall_target,
            max_cost_ns=None if call.max_cost_ms is None else call.max_cost_ms * 1e6,
            explain=call.explain,
        )
        waited_s = clock.monotonic_s()
        hits, prepared, as_of, begun_s = await self._queue.search(replica, order)
        found_s = clock.monotonic_s()
        self.searches += len(order.queries)
        snapshot = prepared.snapshot
        require_ids_fit(hits.ids)
        tails = hit_tails(snapshot, hits.places) if call.with_payload else None
        vectors: bytes | memoryview = b""
        if call.with_vector:
            vectors = raw(rows.vectors_of(snapshot, hits.places, schema.dimension))
        explain = None
        if call.explain:
            explain = hits.explain
            explain["stages_us"] = {
                "wait": round((waited_s - started_s) * 1e6),
                "queue": round((begun_s - waited_s) * 1e6),
                "search": round((found_s - begun_s) * 1e6),
                "fetch": round((clock.monotonic_s() - found_s) * 1e6),
            }
        reply = SearchReply(
            counts=hits.counts,
            ids=hits.ids,
            keys=hits.keys.tobytes(),
            seqs=hits.seqs,
            tails=tails,
            as_of=as_of,
            explain=explain,
        )
        hosted.sampler.offer(prepared, order, hits)
        return reply, rows_body(vectors, tails)

    async def get(self, call: GetCall) -> tuple[RowsReply, bytes]:
        name = (call.collection, call.shard)
        hosted = self._ready(name)
        replica = hosted.replica
        await replica.wait_for(call.level)
        with self._guarding(name, hosted):
            snapshot = replica.state.snapshot()
            ids, places = rows.find_rows(snapshot, call.ids)
            answer = self._rows(replica, snapshot, ids, places, call)
        return answer

    async def scroll(self, call: ScrollCall) -> tuple[RowsReply, bytes]:
        name = (call.collection, call.shard)
        hosted = self._ready(name)
        replica = hosted.replica
        await replica.wait_for(call.level)
        with self._guarding(name, hosted):
            snapshot = replica.state.snapshot()
            ids, places = rows.scroll(snapshot, call.after, call.limit, _expression(call.filter))
            answer = self._rows(replica, snapshot, ids, places, call)
        return answer

    async def count(self, call: CountCall) -> CountReply:
        name = (call.collection, call.shard)
        hosted = self._ready(name)
        replica = hosted.replica
        await replica.wait_for(call.level)
        with self._guarding(name, hosted):
            found = rows.count(replica.state.snapshot(), _expression(call.filter))
        return CountReply(rows=found, as_of=replica.as_of())

    async def write(self, calls: Sequence[WriteCall]) -> list[WriteFate]:
        """Applies requests to one shard; see `Primary.write`."""
        name = (calls[0].collection, calls[0].shard)
        hosted = self._hosted.get(name)
        if hosted is None or hosted.primary is None:
            raise NotPrimary(f"this server does not lead shard {name[1]}; nothing was applied")
        return await hosted.primary.write(calls)

    async def load(self, call: LoadCall) -> LoadReply:
        """Carries out a step of a bulk load; see `Primary.load`."""
        hosted = self._hosted.get((call.collection, call.shard))
        if hosted is None or hosted.primary is None:
            raise NotPrimary(f"this server does not lead shard {call.shard}; nothing was changed")
        return await hosted.primary.load(call)

    def reports(self) -> list[ReplicaReport]:
        """Returns what the controller needs to know of every replica."""
        return [self._report(name, hosted) for name, hosted in self._hosted.items()]

    def _report(self, name: ShardName, hosted: _Hosted) -> ReplicaReport:
        replica, primary = hosted.replica, hosted.primary
        state = replica.state
        reasons = (hosted.reason, replica.failure, hosted.damage, replica.failures.reason())
        leads = primary is not None and primary.serving
        return ReplicaReport(
            collection=name[0],
            shard=name[1],
            state=hosted.state,
            reason="; ".join(dict.fromkeys(reason for reason in reasons if reason)),
            leads=leads,
            epoch=state.epoch,
            seq=state.seq,
            slot=state.slot,
            schema_version=replica.schema.version,
            manifest_version=replica.manifest_version,
            floor_slot=Slot(0 if replica.manifest is None else replica.manifest.floor_slot),
            live_rows=state.live,
            unsealed_rows=state.unsealed_rows,
            segments=len(state.segments),
            sum=state.sum,
            memory_bytes=sum(memtable.memory_bytes() for memtable in state.memtables)
            + sum(view.reader.memory_bytes().resident_bytes for view in state.segments.values()),
            mapped_bytes=sum(
                view.reader.memory_bytes().mapped_bytes for view in state.segments.values()
            ),
            appends=primary.appends if primary is not None else 0,
            operations=primary.operations if primary is not None else 0,
            sealing=primary is not None and primary.sealing,
            failures=max(hosted.failures if hosted.reason else 0, replica.failures.count),
            recall=hosted.sampler.estimates,
        )

    def _rows(
        self,
        replica: Replica,
        snapshot: Snapshot,
        ids: Sequence[bytes],
        places: Sequence[rows.Place],
        call: GetCall | ScrollCall,
    ) -> tuple[RowsReply, bytes]:
        """Returns the first of the rows that fit a page, and the reply's body."""
        dimension = replica.schema.dimension
        row_bytes = 4 * dimension if call.with_vector else 0
        count, tails = len(places), None
        if row_bytes:
            count = min(count, max(1, SHARD_PAGE_BYTES_MAX // row_bytes))
        if call.with_tails:
            tails = rows.tails_within(
                snapshot, places[:count], SHARD_PAGE_BYTES_MAX, row_bytes=row_bytes
            )
            count = len(tails)
        kept = places[:count]
        vectors: bytes | memoryview = b""
        if call.with_vector:
            vectors = raw(rows.vectors_of(snapshot, kept, dimension))
        reply = RowsReply(
            ids=ids[:count],
            seqs=rows.seqs_of(snapshot, kept),
            tails=tails,
            as_of=replica.as_of(),
            cut=count < len(places),
        )
        return reply, rows_body(vectors, tails)

    def _ready(self, name: ShardName) -> _Hosted:
        hosted = self._hosted.get(name)
        if hosted is None:
            raise Unavailable(f"this server holds no replica of shard {name[1]}; try another")
        if hosted.state is not ReplicaState.READY:
            reason = f" ({hosted.reason})" if hosted.reason else ""
            raise Unavailable(f"the replica of shard {name[1]} is {hosted.state.value}{reason}")
        return hosted


def raw(vectors: Vectors) -> memoryview:
    """Returns the bytes of vectors, without copying them; there may be none."""
    return vectors.reshape(-1).view(np.uint8).data


def hit_tails(snapshot: Snapshot, places: Sequence[rows.Place]) -> list[bytes]:
    """Raises: InvalidRequest when the tails of all hits do not fit a reply."""
    tails = rows.tails_within(snapshot, places, HITS_TAIL_BYTES_MAX)
    if len(tails) < len(places):
        raise InvalidRequest(
            f"{len(places)} hits in one shard hold payloads and attributes of which {len(tails)} "
            "fit one answer; ask for fewer hits, or without payload and get the points by id",
            field="with_payload",
            limit=f"{HITS_TAIL_BYTES_MAX} bytes from one shard",
        )
    return tails


def require_ids_fit(ids: Sequence[bytes]) -> None:
    """Raises: InvalidRequest when the ids of all hits do not fit a reply."""
    if len(ids) * POINT_ID_BYTES_MAX > HITS_ID_BYTES_MAX:
        size_bytes = sum(map(len, ids))
        if size_bytes > HITS_ID_BYTES_MAX:
            raise InvalidRequest(
                f"{len(ids)} hits in one shard have ids of {size_bytes} bytes; ask for fewer hits, "
                "or fewer queries at once",
                field="k",
                limit=f"{HITS_ID_BYTES_MAX} bytes of ids from one shard",
            )


async def _retire(hosted: _Hosted) -> None:
    hosted.sampler.close()
    if hosted.primary is not None:
        await hosted.primary.close()
    await hosted.replica.close()


def queries_of(body: bytes | memoryview, dimension: int) -> Vectors:
    """Returns the queries in memory of their own: a frame's body is aligned for nothing.

    Raises: InvalidRequest when the bytes are not whole vectors.
    """
    size_bytes = memoryview(body).nbytes
    if not size_bytes or size_bytes % (4 * dimension):
        raise InvalidRequest(
            f"the queries have {size_bytes} bytes",
            field="vectors",
            limit=f"a multiple of {4 * dimension} bytes ({dimension} float32)",
        )
    return np.array(np.frombuffer(body, dtype=np.float32)).reshape(-1, dimension)


def _expression(wire: Any) -> Expression | None:
    return None if wire is None else from_wire(wire)
