"""A primary's part in bulk loads: has segments built, says when they are prepared, commits them.

Steps 4 to 7 and 9 to 15 of docs/design/bulk-load.md. Work goes on in the background; calls wait for
it as long as they may and are repeated. What this object forgets (a takeover, a failure) is done
again by the next call: only objects in the bucket and the manifest count.

Invariant L-3: "prepared" is answered only after the object that names the segments is durable and
the newest manifest, read after that, is of our epoch. So no collector of a later epoch can miss it.
"""

import asyncio
import functools
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import (
    Conflict,
    Corrupt,
    Internal,
    InvalidRequest,
    NotFound,
    NotPrimary,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import Epoch
from shoal_cluster.domain.keys import LoadKeys, segment_id
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.building import BuildOrder, there_twice
from shoal_cluster.shard.load_commit import LoadCommit
from shoal_cluster.shard.load_objects import (
    Prepared,
    read_decision,
    read_prepared,
    record_prepared,
)
from shoal_cluster.shard.loading_calls import LoadCall, LoadReply, LoadStep
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.sealing import Sealer

BUILDS_AT_ONCE = 2
"""Of one load in one shard; actors/builder.py has as many builders for loads."""

_RETRY_MS = 1000
_WORK = "a bulk load"

Segments = list[tuple[SegmentEntry, SegmentReader]]


@dataclass(slots=True, eq=False)
class _Load:
    """A load this epoch works on. segments: opened, once all are there."""

    chunks: tuple[tuple[str, int], ...] = ()
    done: int = 0
    total: int = 0
    segments: Segments | None = None
    prepared: bool = False
    preparing: "asyncio.Task[None] | None" = None
    committing: "asyncio.Task[None] | None" = None
    built: list[SegmentEntry] = field(default_factory=list)


class Loads:
    """The loads of one shard, for one primary."""

    def __init__(self, replica: Replica, epoch: Epoch, sealer: Sealer) -> None:
        self._replica = replica
        self._epoch = epoch
        self._sealer = sealer
        self._loads: dict[str, _Load] = {}
        self._closed = False

    async def serve(self, call: LoadCall) -> LoadReply:
        """Begins or goes on with a step, waits for it at most `call.wait_s`, says how far it is.

        Raises: Conflict (other chunks than before; not decided; aborted), InvalidRequest (an id
        that is there twice), NotFound (a chunk is gone), NotPrimary, Unavailable, Overloaded.
        """
        if self._closed:
            raise NotPrimary(f"epoch {self._epoch} has ended; nothing was changed")
        if call.load in self._sealer.manifest().loads:
            return self._committed()
        if call.step is LoadStep.EXPECT:
            self._replica.ports.builds.expect_load()
            return LoadReply()
        if call.step is LoadStep.PREPARE:
            return await self._prepare(call)
        return await self._commit(call.load, call.wait_s)

    def finish(self, load: str) -> None:
        """Commits a decided load that nobody asks for any more; see shard/garbage.py."""
        if not self._closed and load not in self._sealer.manifest().loads:
            self._start_commit(load)

    def forget(self, load: str) -> None:
        """An abort was decided, or the load is committed: what was built is no more in flight."""
        found = self._loads.get(load)
        if found is not None and not _is_running(found.committing):
            if found.preparing is not None:
                found.preparing.cancel()
            self._drop(load, found)

    def stop(self) -> None:
        self._closed = True
        for task in self._tasks():
            if task is not asyncio.current_task():
                task.cancel()

    async def close(self) -> None:
        self.stop()
        await asyncio.gather(*self._tasks(), return_exceptions=True)

    def _tasks(self) -> list["asyncio.Task[None]"]:
        tasks = [
            task for load in self._loads.values() for task in (load.preparing, load.committing)
        ]
        return [task for task in tasks if task is not None]

    def _committed(self) -> LoadReply:
        return LoadReply(committed=True, position=self._replica.state.position)

    async def _prepare(self, call: LoadCall) -> LoadReply:
        if self._replica.schema.version < call.schema_version:
            # Rows may have attributes that a segment built now would not index.
            raise Unavailable(
                f"shard {call.shard} has not heard of version {call.schema_version} of the schema"
            )
        load = self._loads.get(call.load)
        if load is None:
            if len(self._loads) >= limits.LOADS_MAX:
                raise Overloaded(
                    f"shard {call.shard} has {len(self._loads)} loads on their way; commit or "
                    "abort some",
                    limit=f"{limits.LOADS_MAX} loads",
                    retry_after_ms=_RETRY_MS,
                )
            if len(self._sealer.manifest().loads) >= limits.LOADS_REMEMBERED:
                raise InvalidRequest(
                    f"shard {call.shard} has had {len(self._sealer.manifest().loads)} bulk loads; "
                    "it remembers each for ever, so that none is committed twice. Use bulk_upsert, "
                    "or load into a new collection; nothing was changed",
                    field="load_id",
                    limit=f"{limits.LOADS_REMEMBERED} loads of a collection",
                )
            load = self._loads[call.load] = _Load(chunks=tuple(call.chunks))
        elif load.chunks and load.chunks != tuple(call.chunks):
            raise Conflict(
                f"load {call.load} is being prepared with {len(load.chunks)} chunks, not these "
                f"{len(call.chunks)}; a load is committed with the chunks it was first given",
                field="chunks",
            )
        if load.preparing is None:
            load.chunks = tuple(call.chunks)
            work = self._run(self._build_all(call.load, load))
            load.preparing = asyncio.ensure_future(work)
            load.preparing.add_done_callback(_seen)
        await asyncio.wait((load.preparing,), timeout=call.wait_s)
        if load.preparing is not None and load.preparing.done() and not load.prepared:
            failed = load.preparing
            self._drop(call.load, load)  # asked again, it begins anew
            _raise_of(failed)
        return LoadReply(
            segments_done=load.done,
            segments_total=load.total,
            prepared=self._epoch if load.prepared else None,
        )

    async def _build_all(self, name: str, load: _Load) -> None:
        orders = self._orders(name, load.chunks)
        load.total = len(orders)
        turns = asyncio.Semaphore(BUILDS_AT_ONCE)

        async def build(order: BuildOrder) -> tuple[SegmentEntry, SegmentReader]:
            async with turns:
                entry = await self._sealer.build(order)
            assert entry is not None, "chunks have rows"
            load.built.append(entry)
            reader = await self._sealer.open(entry)
            assert reader is not None, "there is an entry"
            load.done += 1
            return entry, reader

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(build(order)) for order in orders]
        segments = [task.result() for task in tasks]
        checking = functools.partial(_require_distinct, [reader for _, reader in segments])
        await self._replica.ports.background.run(checking)
        ports = self._replica.ports
        prepared = Prepared(
            epoch=self._epoch,
            rows=sum(rows for _, rows in load.chunks),
            segments=tuple(entry for entry, _ in segments),
        )
        record = functools.partial(
            record_prepared,
            ports.store,
            ports.clock,
            self._keys(name),
            prepared,
            ports.ids.put_id(),
        )
        # Not given up half way: this epoch has one name for it, and one body.
        await self._sealer.until_available(_WORK, record)
        newest = await self._sealer.until_available(_WORK, self._replica.manifests.newest)
        if newest is None or newest.epoch != self._epoch:
            raise NotPrimary(f"epoch {self._epoch} has ended while load {name} was prepared (L-3)")
        load.segments = segments
        load.prepared = True

    def _orders(self, name: str, chunks: Sequence[tuple[str, int]]) -> list[BuildOrder]:
        orders = []
        first_seq = 1
        for group in groups_of(chunks):
            rows = sum(count for _, count in group)
            orders.append(
                BuildOrder(
                    schema=self._replica.schema,
                    shard=self._replica.keys.shard,
                    cluster_uuid=self._replica.ports.cluster_uuid,
                    segment=segment_id(self._epoch, 0, ""),
                    load=name,
                    chunks=tuple(chunk for chunk, _ in group),
                    rows=rows,
                    first_seq=first_seq,
                )
            )
            first_seq += rows
        return orders

    async def _commit(self, name: str, wait_s: float) -> LoadReply:
        load = self._start_commit(name)
        committing = load.committing
        assert committing is not None, "it was just started"
        await asyncio.wait((committing,), timeout=wait_s)
        if not committing.done():
            return LoadReply(segments_done=load.done, segments_total=load.total)
        if committing.cancelled() or committing.exception() is not None:
            load.committing = None
            _raise_of(committing)
        return self._committed()

    def _start_commit(self, name: str) -> _Load:
        load = self._loads.setdefault(name, _Load())
        if load.committing is None or (load.committing.done() and not _succeeded(load.committing)):
            load.committing = asyncio.ensure_future(self._run(self._carry_out(name, load)))
            load.committing.add_done_callback(lambda task: self._ended(name, load, task))
        return load

    def _ended(self, name: str, load: _Load, task: "asyncio.Task[None]") -> None:
        """A commit is over: what is prepared here is kept for the next attempt, if it needs one."""
        _seen(task)
        if _succeeded(task) or load.preparing is None:
            self._drop(name, load)

    async def _carry_out(self, name: str, load: _Load) -> None:
        """Commits what was decided, and as it was decided."""
        ports, keys = self._replica.ports, self._keys(name)
        decision = await read_decision(ports.store, keys)
        if decision is None or not decision.commit:
            what = "not decided yet" if decision is None else "aborted"
            raise Conflict(f"load {name} is {what}; nothing was changed", field="load_id")
        epoch = decision.epochs.get(keys.shard)
        if epoch is None:
            return  # it has no rows here
        segments = load.segments if load.prepared and epoch == self._epoch else None
        if segments is None:
            prepared = await read_prepared(ports.store, keys, keys.prepared_by(epoch))
            if prepared is None:
                raise Corrupt(
                    f"object {keys.prepared_by(epoch)} is gone, though load {name} was decided and "
                    "is not committed in this shard (G-3); nothing was changed"
                )
            segments = [await self._opened(entry) for entry in prepared.segments]
        try:
            await LoadCommit(self._replica, self._sealer, name, segments).run()
        except (NotPrimary, Corrupt) as error:
            self._sealer.on_lost(error.message)
            raise

    async def _opened(self, entry: SegmentEntry) -> tuple[SegmentEntry, SegmentReader]:
        reader = await self._sealer.open(entry)
        assert reader is not None, "there is an entry"
        return entry, reader

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Gives errors a kind: a bug is Internal, of several builds' failures one is told."""
        try:
            await work
        except ShoalError:
            raise
        except Exception as raised:
            error = _first(raised)
            if isinstance(error, ShoalError):
                raise error from raised
            self._replica.failures.note(error, _WORK)
            raise Internal(f"the load met a bug: {error!r}") from raised

    def _drop(self, name: str, load: _Load) -> None:
        """Forgets a load; segments that the manifest does not list are garbage from now on."""
        if self._loads.get(name) is load:
            del self._loads[name]
        for entry in load.built:
            self._sealer.in_flight.discard(entry.id)

    def _keys(self, name: str) -> LoadKeys:
        return LoadKeys(self._replica.keys.collection, self._replica.keys.shard, name)


def groups_of(chunks: Sequence[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Cuts chunks into those of one segment each: as few as may be, about equal ones. Pure."""
    rows = sum(count for _, count in chunks)
    wanted = max(
        -(-rows // limits.LOAD_SEGMENT_ROWS), -(-len(chunks) // limits.LOAD_SEGMENT_CHUNKS)
    )
    groups: list[list[tuple[str, int]]] = [[]]
    done = 0
    for chunk in chunks:
        full = len(groups[-1]) >= limits.LOAD_SEGMENT_CHUNKS
        if groups[-1] and (full or done >= rows * len(groups) / wanted):
            groups.append([])
        groups[-1].append(chunk)
        done += chunk[1]
    return groups


def _require_distinct(readers: Sequence[SegmentReader]) -> None:
    """Raises: InvalidRequest naming an id that is in two of the segments."""
    for number, one in enumerate(readers):
        for other in readers[number + 1 :]:
            rows = one.rows_found_in(other)
            if len(rows):
                raise there_twice(other.id_of(int(np.min(rows))))


def _seen(task: "asyncio.Task[None]") -> None:
    """Marks a task's error as seen: whoever asks for the load next is told."""
    if not task.cancelled():
        task.exception()


def _is_running(task: "asyncio.Task[None] | None") -> bool:
    return task is not None and not task.done()


def _succeeded(task: "asyncio.Task[None]") -> bool:
    return not task.cancelled() and task.exception() is None


def _raise_of(task: "asyncio.Task[None]") -> None:
    """Raises what a finished task ended with; for a cancelled one that the epoch is over."""
    if task.cancelled():
        raise NotPrimary("the primary stopped meanwhile; nothing was changed")
    error = task.exception()
    if isinstance(error, NotFound):
        # A chunk or a segment is gone: not the shard, which the caller would look for elsewhere.
        raise Conflict(error.message, field="load_id") from error
    if error is not None:
        raise error


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
