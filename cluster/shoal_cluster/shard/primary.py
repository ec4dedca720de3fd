"""The one writer of a shard: puts requests in order, appends them in groups, acknowledges.

Group commit: one PUT is in flight; what arrives meanwhile queues and goes in the next. No timer.
A write is applied to the readable state and acknowledged only after its record is durable, so
nothing undurable is ever seen.

Invariants:
P-1 at most one append is unresolved, and its slot is the state's slot + 1.
P-2 an acknowledged request is in a record of our epoch, also when it found nothing to change, or
    was answered from the dedup memory. A condition is refused only once it is sure that it was
    judged by the newest state: by the group's append, or by a probe.
P-3 after the epoch has ended, nothing is applied and nothing acknowledged any more.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import (
    Conflict,
    Corrupt,
    Indeterminate,
    NotPrimary,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import Epoch, Seq, Slot
from shoal_cluster.domain.session import Position
from shoal_cluster.filtering.attributes import keyword_bytes
from shoal_cluster.shard.calls import WriteCall, WriteFate, WriteReply
from shoal_cluster.shard.composition import Composition
from shoal_cluster.shard.damage import Damage
from shoal_cluster.shard.dedup import Answer
from shoal_cluster.shard.loading import Loads
from shoal_cluster.shard.loading_calls import LoadCall, LoadReply
from shoal_cluster.shard.ports import Publisher
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.sealing import Sealer
from shoal_cluster.wal.record import RecordKind, WalRecord

_log = structlog.get_logger()

IDLE_PROBE_S = 2.0
"""An idle primary looks at its next slot this often, so that a fenced one notices by itself."""
_SEAL_RETRY_MS = 100
_DRAIN_RETRY_MS_MIN, _DRAIN_RETRY_MS_MAX = 20, 5000
_REQUEST_OVERHEAD_BYTES = 64


class _Fates:
    """Collects what becomes of the calls that came together. future: all of it, once known."""

    __slots__ = ("_fates", "_open", "future")

    def __init__(self, count: int) -> None:
        self._fates: list[WriteFate | None] = [None] * count
        self._open = count
        self.future: asyncio.Future[list[WriteFate]] = asyncio.get_running_loop().create_future()

    def settle(self, index: int, fate: WriteFate) -> None:
        """Takes the fate of a call; the first one counts."""
        if self._fates[index] is not None:
            return
        self._fates[index] = fate
        self._open -= 1
        if not self._open and not self.future.done():
            self.future.set_result([each for each in self._fates if each is not None])


@dataclass(slots=True, eq=False)
class _Queued:
    call: WriteCall
    size_bytes: int
    fates: _Fates
    index: int

    def settle(self, fate: WriteFate) -> None:
        self.fates.settle(self.index, fate)

    @property
    def is_given_up(self) -> bool:
        """Nobody waits for the answer any more."""
        return self.fates.future.done()


@dataclass(slots=True)
class _Group:
    """Requests of one append. refused: their condition failed, by a state yet to be confirmed."""

    members: list[tuple[_Queued, Answer]] = field(default_factory=list)
    refused: list[tuple[_Queued, Conflict]] = field(default_factory=list)

    def settle(self) -> None:
        """Tells everybody what was found: the group is durable, the state was the newest."""
        for queued, answer in self.members:
            queued.settle(_reply(answer))
        for queued, refusal in self.refused:
            queued.settle(refusal)

    def fail(self, error: ShoalError) -> None:
        """Gives `error` to all without an answer; what only failed a condition did nothing."""
        for queued, _ in self.members:
            queued.settle(error)
        for queued, _ in self.refused:
            reason = f"the condition could not be judged: {error.message}; nothing was applied"
            queued.settle(Unavailable(reason))


class Primary:
    """Serves writes of one epoch, from `start` until it is fenced or closed."""

    def __init__(self, replica: Replica, epoch: Epoch, publisher: Publisher) -> None:
        self.epoch = epoch
        self._replica = replica
        self._publisher = publisher
        self._wake = asyncio.Event()
        self._between_appends = asyncio.Lock()
        self._sealer = Sealer(
            replica,
            epoch,
            publisher,
            between_appends=self._between_appends,
            on_lost=self._lose,
            on_idle=self._wake.set,
            on_load=self._noticed_load,
        )
        self._loads = Loads(replica, epoch, self._sealer)
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._append_s = 0.0
        self._settled = asyncio.Event()
        self._settled.set()
        self._appending: Slot | None = None
        self._loop: asyncio.Task[None] | None = None
        self._ended: ShoalError | None = None
        self.appends = 0
        self.operations = 0

    def start(self) -> None:
        """Begins to lead; call while holding replica.advancing, right after take_over."""
        self._replica.leader = self
        self._loop = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Stops serving. Queued requests are refused; an append in flight is left unresolved."""
        self._end(NotPrimary("the shard is being handed over; nothing was applied, try again"))
        tasks = [task for task in (self._loop,) if task is not None]
        for task in tasks:
            task.cancel()
        await self._loads.close()
        await self._sealer.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def serving(self) -> bool:
        return self._ended is None

    @property
    def sealing(self) -> bool:
        return self._sealer.busy

    def repair(self, damages: Sequence[Damage]) -> None:
        """Replaces damaged objects by what this primary holds; see Sealer.repair."""
        self._sealer.repair(damages)

    async def write(self, calls: Sequence[WriteCall]) -> list[WriteFate]:
        """Applies requests and returns once each is durable and visible here, or has failed.

        An error is InvalidRequest, Conflict (a condition failed), NotPrimary: nothing was applied;
        or Indeterminate: send the same request again to find out.

        Raises: NotPrimary, Overloaded: nothing was applied of any.
        """
        if self._ended is not None:
            raise NotPrimary(self._ended.message)
        self._admit()
        fates = _Fates(len(calls))
        for index, call in enumerate(calls):
            size_bytes = self._size_of(call)
            self._queue.append(_Queued(call, size_bytes, fates, index))
            self._queued_bytes += size_bytes
        self._wake.set()
        return await fates.future

    async def load(self, call: LoadCall) -> LoadReply:
        """Carries out a step of a bulk load; see Loads.serve.

        Raises: NotPrimary when the epoch has ended, and what Loads.serve does.
        """
        if self._ended is not None:
            raise NotPrimary(self._ended.message)
        return await self._loads.serve(call)

    def _noticed_load(self, load: str, unfinished: bool) -> None:
        """Finishes a decided load whose caller has gone, or lets go of one that came to its end."""
        if unfinished:
            self._loads.finish(load)
        else:
            self._loads.forget(load)

    @property
    def appending(self) -> Slot | None:
        """See replica.Leader: the slot whose put is not resolved yet."""
        return self._appending

    async def settled(self) -> None:
        """See replica.Leader."""
        await self._settled.wait()

    async def meet(self, record: WalRecord) -> None:
        """See replica.Leader: our own append landing, or the record that ends our epoch."""
        if record.epoch == self.epoch:
            if record.slot > self._replica.state.slot:
                await self.settled()
            return
        self._lose(f"slot {record.slot} was taken by epoch {record.epoch}")

    @staticmethod
    def _size_of(call: WriteCall) -> int:
        return call.size_bytes + sum(map(keyword_bytes, call.patches)) + _REQUEST_OVERHEAD_BYTES

    def _admit(self) -> None:
        shard = self._replica.keys.shard
        if self._sealer.behind and self._is_full():
            failing = self._replica.failures.reason()
            raise Overloaded(
                f"shard {shard} holds {self._replica.state.active.operations} rows that wait "
                f"for a segment to be built{f' ({failing})' if failing else ''}; nothing was "
                "applied",
                limit=f"{limits.MEMTABLE_OPERATIONS_MAX} rows or {limits.MEMTABLE_BYTES_MAX} bytes",
                retry_after_ms=_SEAL_RETRY_MS,
            )
        if self._queued_bytes >= limits.WAL_QUEUE_BYTES_MAX:
            raise Overloaded(
                f"shard {shard} has {self._queued_bytes} bytes of writes queued; nothing was "
                "applied",
                limit=f"{limits.WAL_QUEUE_BYTES_MAX} bytes",
                retry_after_ms=self._drain_ms(),
            )

    def _is_full(self) -> bool:
        """Says whether the memtable that takes writes, or all of them together, hold enough.

        A seal that fails leaves its memtables frozen, and the next attempt freezes one more.
        """
        memtables = self._replica.state.memtables
        operations = sum(memtable.operations for memtable in memtables)
        size_bytes = sum(memtable.size_bytes for memtable in memtables)
        active = self._replica.state.active
        return (
            active.operations >= limits.MEMTABLE_OPERATIONS_MAX
            or active.size_bytes >= limits.MEMTABLE_BYTES_MAX
            or operations >= 2 * limits.MEMTABLE_OPERATIONS_MAX
            or size_bytes >= 2 * limits.MEMTABLE_BYTES_MAX
        )

    def _drain_ms(self) -> int:
        """Returns how long half of the queue takes to drain, at the pace of the last append."""
        appends = max(1.0, self._queued_bytes / (2 * limits.WAL_RECORD_BYTES_MAX))
        drain_ms = round(1000 * self._append_s * appends)
        return min(max(drain_ms, _DRAIN_RETRY_MS_MIN), _DRAIN_RETRY_MS_MAX)

    async def _run(self) -> None:
        try:
            while self._ended is None:
                async with self._between_appends:
                    if self._sealer.due():
                        self._sealer.start()
                    self._sealer.tidy()
                    if self._queue and self._ended is None:
                        await self._commit_group()
                        continue
                await self._idle()
        except ShoalError as error:
            # Not a lost race but a broken promise (corrupt log, failed fsync): stop and say so.
            _log.error("primary_failed", shard=self._replica.keys.shard, reason=error.message)
            self._lose(error.message)
        except Exception as error:  # noqa: BLE001  a bug: the next epoch begins from the bucket
            self._replica.failures.note(error, "taking writes")
            self._lose(f"a bug, {error!r}")
        finally:
            # Whatever ended the loop, a bug too: nobody may wait for it in vain.
            self._lose("its loop has stopped")

    async def _idle(self) -> None:
        self._wake.clear()
        try:
            # Not wait_for: Python 3.11's loses a cancellation that meets the event.
            async with asyncio.timeout(IDLE_PROBE_S):
                await self._wake.wait()
        except TimeoutError:
            try:
                await self._replica.probe()
                async with self._between_appends:
                    if self._ended is None and not self._queue:
                        self._sealer.settle()
            except Unavailable as error:
                _log.warning(
                    "bucket_unavailable", shard=self._replica.keys.shard, reason=error.message
                )

    async def _commit_group(self) -> None:
        composition = Composition(self._replica.state, self.epoch)
        group = _Group()
        try:
            self._compose(composition, group)
            if composition.requests:
                confirmed = await self._append(composition, group)
            elif group.refused:
                confirmed = await self._confirm(group)
            else:
                confirmed = True  # all were answered before, durably
            if confirmed:
                group.settle()
        finally:
            group.fail(Indeterminate("the primary has stopped; send the same request again"))

    def _compose(self, composition: Composition, group: _Group) -> None:
        while self._queue and not composition.full:
            queued = self._queue.popleft()
            self._queued_bytes -= queued.size_bytes
            if queued.is_given_up:
                continue  # before anything was started
            try:
                answer = composition.add(queued.call)
            except Conflict as error:
                group.refused.append((queued, error))
            except Corrupt as error:
                # There may be more damage in what the group was judged by: none of it is appended.
                self._replica.suspected = True
                queued.settle(error)
                raise
            except ShoalError as error:
                queued.settle(error)
            else:
                if answer is None:
                    self._queue.appendleft(queued)
                    self._queued_bytes += queued.size_bytes
                    return
                group.members.append((queued, answer))

    async def _append(self, composition: Composition, group: _Group) -> bool:
        """Makes the group durable and visible; False when it was told otherwise."""
        replica = self._replica
        state = replica.state
        record = WalRecord(
            slot=Slot(state.slot + 1),
            epoch=self.epoch,
            kind=RecordKind.DATA,
            put_id=replica.ports.ids.put_id(),
            prev_put_id=state.last_put_id,
            first_seq=Seq(state.seq + 1),
            memtable_start=state.active.start_slot,
            batch=composition.batch(),
        )
        body = replica.wal.encode(record)
        started_s = replica.ports.clock.monotonic_s()
        self._appending = record.slot
        self._settled.clear()
        try:
            other = await replica.wal.append(record, body)
            if other is None and self._ended is None:
                state.apply(record)
        except Unavailable as error:
            # Surely not stored: the slot is still ours to fill.
            group.fail(Unavailable(f"append of slot {record.slot}: {error.message}"))
            return False
        except Indeterminate as error:
            group.fail(error)
            raise
        except ShoalError as error:
            group.fail(Indeterminate(f"append of slot {record.slot}: {error.message}"))
            raise
        finally:
            self._appending = None
            self._settled.set()
        if other is not None:
            self._lose(f"slot {record.slot} was taken by epoch {other.epoch}")
        if self._ended is not None:
            # Even if the record is ours and durable: whoever follows the log applies it now.
            group.fail(
                Indeterminate(
                    f"epoch {self.epoch} ended while slot {record.slot} was being written; send "
                    "the same request again to learn whether it was applied"
                )
            )
            return False
        replica.mark_at_tail(started_s)
        self._append_s = replica.ports.clock.monotonic_s() - started_s
        self.appends += 1
        self.operations += len(record.batch)
        self._publisher.record(record.slot, body)
        return True

    async def _confirm(self, group: _Group) -> bool:
        """Makes sure that the state was the newest, where no append does so; False if not."""
        try:
            await self._replica.probe()
        except Unavailable as error:
            group.fail(error)
            return False
        if self._ended is not None:
            group.fail(NotPrimary(self._ended.message))
        return self._ended is None

    def _lose(self, reason: str) -> None:
        """Ends the epoch: refuses what is queued and lets the replica follow again."""
        if self._ended is not None:
            return
        _log.warning(
            "primary_ended", shard=self._replica.keys.shard, epoch=self.epoch, reason=reason
        )
        self._end(NotPrimary(f"epoch {self.epoch} has ended: {reason}; nothing was applied"))

    def _end(self, error: ShoalError) -> None:
        if self._ended is None:
            self._ended = error
        if self._replica.leader is self:
            self._replica.leader = None
            self._replica.wake()
        for queued in self._queue:
            queued.settle(error)
        self._queue.clear()
        self._queued_bytes = 0
        self._loads.stop()
        self._sealer.stop()
        self._wake.set()


def _reply(answer: Answer) -> WriteReply:
    return WriteReply(
        position=Position(answer.epoch, answer.last_seq),
        first_seq=answer.first_seq,
        affected=answer.affected,
        more=answer.more,
        slot=answer.slot,
    )
