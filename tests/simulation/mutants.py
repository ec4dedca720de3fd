"""Small, named breakages of the real code. Each must be caught: a checker that cannot fail proves
nothing.

A mutant replaces one function while a run lasts. Caught means that some seed ends with a violation,
be it the history's, the audit's, or the code's own invariants crying out.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from shoal_cluster.bucket.store import PutOutcome, Store
from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.domain.ids import Epoch, ManifestVersion, Slot
from shoal_cluster.domain.session import Consistency
from shoal_cluster.ingest import execute, primary_calls, route
from shoal_cluster.manifest import version_log
from shoal_cluster.manifest.version_log import VersionLog
from shoal_cluster.query.plan import Freshness
from shoal_cluster.shard import dedup, garbage, takeover
from shoal_cluster.shard.calls import ReadLevel
from shoal_cluster.shard.composition import Composition
from shoal_cluster.shard.dedup import Dedup
from shoal_cluster.shard.garbage import GarbageCollector
from shoal_cluster.shard.primary import Primary
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.sealing import Sealer
from shoal_cluster.shard.state import ShardState
from shoal_cluster.wal import log as wal_log
from tests.simulation.scenario import Outcome, simulate

Patch = tuple[Any, str, Any]
"""Where, which name, and what it becomes."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """what: the mistake, as one would make it."""

    name: str
    what: str
    patches: Callable[[], list[Patch]]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Breaks the code for as long as the context lasts."""
        with contextlib.ExitStack() as stack:
            for owner, name, broken in self.patches():
                before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
                stack.callback(setattr, owner, name, before)
                setattr(owner, name, broken)
            yield


MUTANTS: dict[str, Mutant] = {}


def mutant(what: str) -> Callable[[Callable[[], list[Patch]]], Callable[[], list[Patch]]]:
    """Registers a function that returns a mutant's patches, under the function's name."""

    def register(patches: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
        name = patches.__name__
        MUTANTS[name] = Mutant(name, what, patches)
        return patches

    return register


@dataclass(frozen=True, slots=True)
class Verdict:
    """seeds: how many were run. violation: what the last of them showed, None: it survived."""

    mutant: Mutant
    seeds: int
    violation: str | None
    outcome: Outcome | None


def hunt(victim: Mutant, seeds: range) -> Verdict:
    """Runs seeds with the mutant until one shows a violation."""
    for count, seed in enumerate(seeds, start=1):
        with victim.applied():
            outcome = simulate(seed)
        if outcome.violations:
            return Verdict(victim, count, outcome.violations[0], outcome)
    return Verdict(victim, len(seeds), None, None)


# ------------------------------------------------------------------------------------------ writes


@mutant("acknowledges as soon as the put is sent")
def ack_before_put() -> list[Patch]:
    append = Primary._append

    async def broken(self: Primary, composition: Any, group: Any) -> bool:
        group.settle()
        return await append(self, composition, group)

    return [(Primary, "_append", broken)]


@mutant("makes a batch readable before its put is durable")
def visible_before_durable() -> list[Patch]:
    read = wal_log.Wal.append

    async def broken(self: Any, record: Any, body: bytes) -> Any:
        for process_state in _leading_states(self):
            if record.batch and process_state.slot + 1 == record.slot:
                process_state.apply(record)
        return await read(self, record, body)

    apply = ShardState.apply

    def tolerant(self: ShardState, record: Any) -> None:
        if record.slot > self.slot:
            apply(self, record)

    open_state = ShardState.__init__

    def known(self: ShardState, schema: Any) -> None:
        open_state(self, schema)

    take = Replica.__init__

    def remember(self: Replica, *arguments: Any) -> None:
        take(self, *arguments)
        self.wal._owner = self  # type: ignore[attr-defined]

    del known
    return [
        (wal_log.Wal, "append", broken),
        (ShardState, "apply", tolerant),
        (Replica, "__init__", remember),
    ]


def _leading_states(wal: Any) -> list[ShardState]:
    owner = getattr(wal, "_owner", None)
    return [] if owner is None or owner.leader is None else [owner.state]


@mutant("an object in the slot is taken for one's own")
def exists_is_success() -> list[Patch]:
    async def broken(store: Store, key: str, body: bytes, *, clock: Any, **_: Any) -> bytes | None:
        while await store.create(key, body) is not PutOutcome.CREATED:
            with contextlib.suppress(Unavailable):
                if await store.get(key) is not None:
                    return None
            await clock.sleep(0.05)
        return None

    return [(wal_log, "create", broken)]


@mutant("an unanswered put is taken for done")
def moves_on_after_ambiguous_put() -> list[Patch]:
    async def broken(store: Store, key: str, body: bytes, **_: Any) -> bytes | None:
        await store.create(key, body)
        return None

    return [(wal_log, "create", broken)]


@mutant("pushes a record to followers before it is durable")
def push_before_durable() -> list[Patch]:
    append = wal_log.Wal.append
    take = Primary.__init__

    def remember(self: Primary, replica: Replica, epoch: Epoch, publisher: Any) -> None:
        take(self, replica, epoch, publisher)
        replica.wal._publisher = publisher  # type: ignore[attr-defined]

    async def broken(self: Any, record: Any, body: bytes) -> Any:
        publisher = getattr(self, "_publisher", None)
        if publisher is not None and record.batch:
            publisher.record(record.slot, body)
        return await append(self, record, body)

    return [(wal_log.Wal, "append", broken), (Primary, "__init__", remember)]


@mutant("a write without an answer is reported as not applied")
def unknown_is_failed() -> list[Patch]:
    gave_up = primary_calls._gave_up

    def broken(call: Any, schema: Any, lost: Any, failure: Any) -> Any:
        return gave_up(call, schema, None, Unavailable(failure.message))

    return [(primary_calls, "_gave_up", broken)]


@mutant("a retried request is carried out again")
def dedup_ignored() -> list[Patch]:
    return [(Dedup, "find", lambda self, client_id, request_no, since: None)]


@mutant("a request of a client that was forgotten is taken for its first")
def forgotten_client_is_new() -> list[Patch]:
    return [(dedup, "_require_later", lambda client_id, since, horizon: None)]


@mutant("a request older than those remembered of its client is taken for a new one")
def forgotten_number_is_new() -> list[Patch]:
    forget = dedup._Window.forget_smallest

    def broken(self: dedup._Window) -> None:
        before = self.forgotten
        forget(self)
        self.forgotten = before

    return [(dedup._Window, "forget_smallest", broken)]


@mutant("a shard is not told that a request was sent before")
def sent_before_is_not_told() -> list[Patch]:
    return [(route, "since_of", lambda request: None), (execute, "since_of", lambda request: None)]


@mutant("what was answered before the newest manifest is forgotten at a restart")
def dedup_forgotten_at_restart() -> list[Patch]:
    return [(Dedup, "restore", staticmethod(lambda snapshot: Dedup()))]


@mutant("a condition is judged without what the same batch did before")
def condition_ignores_batch() -> list[Patch]:
    def broken(self: Composition, point_id: bytes) -> int:
        place = self._state.locate(point_id)
        return 0 if place is None else place.seq

    return [(Composition, "_seq_of", broken)]


@mutant("a patch is built on the stored row though the batch has replaced it")
def patch_ignores_batch() -> list[Patch]:
    def broken(self: Composition, point_id: bytes) -> Any:
        place = self._state.locate(point_id)
        return None if place is None else (place.vector, place.tail)

    return [(Composition, "_row_of", broken)]


# ---------------------------------------------------------------------------------------- takeover


@mutant("does not look again after fencing")
def no_validation_after_fencing() -> list[Patch]:
    async def broken(replica: Replica, epoch: Epoch, fence_slot: Slot) -> None:
        return None

    return [(takeover, "_validate", broken)]


@mutant("takes over without a new epoch")
def epoch_reused() -> list[Patch]:
    async def broken(replica: Replica) -> Epoch:
        manifest = await replica.load_manifest()
        return Epoch(max(1, manifest.epoch))

    return [(takeover, "_claim_epoch", broken)]


@mutant("a fenced primary believes that it still leads")
def fenced_primary_goes_on() -> list[Patch]:
    async def broken(self: Primary, record: Any) -> None:
        return None

    return [(Primary, "meet", broken)]


@mutant("a takeover replays what was written, but not which requests wrote it")
def takeover_forgets_requests() -> list[Patch]:
    async def broken(replica: Replica, record: Any, epoch: Epoch) -> None:
        # Steps over the record without applying what it says.
        state = replica.state
        if record.slot == state.slot + 1:
            state.apply(replace(record, batch=replace(record.batch, requests=())))

    return [(takeover, "_accept_or_yield", broken)]


@mutant("a manifest version that somebody else took counts as committed")
def manifest_conflict_ignored() -> list[Patch]:
    commit = VersionLog.commit

    async def broken(self: VersionLog, number: int, put_id: bytes, fields: Any) -> bool:
        await commit(self, number, put_id, fields)
        return True

    return [(VersionLog, "commit", broken)]


# ------------------------------------------------------------------------------------------- reads


@mutant("a session read answers without looking at its token")
def session_token_ignored() -> list[Patch]:
    wait_for = Replica.wait_for

    async def broken(self: Replica, level: ReadLevel) -> None:
        if level.consistency is not Consistency.SESSION:
            await wait_for(self, level)

    return [(Replica, "wait_for", broken)]


@mutant("a strong read answers from what the replica has")
def strong_read_does_not_probe() -> list[Patch]:
    wait_for = Replica.wait_for

    async def broken(self: Replica, level: ReadLevel) -> None:
        if level.consistency is not Consistency.STRONG:
            await wait_for(self, level)

    return [(Replica, "wait_for", broken)]


@mutant("a strong read that finds a probe under way takes its result")
def strong_read_joins_a_running_probe() -> list[Patch]:
    import asyncio

    probe = Replica.probe

    async def broken(self: Replica) -> None:
        running = [task for task in self._probes if not task.done()]
        if running:
            await asyncio.shield(running[0])
        else:
            await probe(self)

    return [(Replica, "probe", broken)]


@mutant("a strong read trusts an empty slot alone")
def strong_read_without_manifest_probe() -> list[Patch]:
    run_probe = Replica._run_probe

    async def broken(self: Replica) -> None:
        manifests = self.manifests

        class Blind:
            def __getattr__(self, name: str) -> Any:
                return getattr(manifests, name)

            async def newest_number(self) -> int | None:
                return None

        self.manifests = Blind()  # type: ignore[assignment]
        try:
            await run_probe(self)
        finally:
            self.manifests = manifests

    return [(Replica, "_run_probe", broken)]


@mutant("lists the manifests first and looks into the slot after")
def manifest_probe_first() -> list[Patch]:
    async def broken(self: Replica) -> None:
        async with self.advancing:
            self._probe = None
            while True:
                started_s = self.ports.clock.monotonic_s()
                newest = await self.manifests.newest_number()
                if newest is not None and newest > self.manifest_version and self.leader is None:
                    await self.load_manifest()
                    continue
                record = await self._next_record()
                if record is not None:
                    if self.leader is None:
                        await self.accept(record)
                        continue
                    await self.leader.meet(record)
                    if self.leader is not None:
                        return
                    continue
                self.mark_at_tail(started_s)
                return

    return [(Replica, "_run_probe", broken)]


@mutant("a primary takes an append of its own that was under way for the tail of the log")
def own_append_taken_for_tail() -> list[Patch]:
    return [(Primary, "appending", property(lambda self: None))]


@mutant("a read that waits in a replica that is closed ends as if it had been a write")
def closed_read_is_unknown() -> list[Patch]:
    import asyncio

    probe = Replica.probe

    async def broken(self: Replica) -> None:
        try:
            await probe(self)
        except Unavailable as error:
            if "was closed" in error.message:
                raise asyncio.CancelledError from error
            raise

    return [(Replica, "probe", broken)]


@mutant("the coordinator does not pass the session's token on")
def token_not_sent() -> list[Patch]:
    def broken(self: Freshness, shard: Any, schema: Any) -> ReadLevel:
        return ReadLevel(consistency=self.consistency)

    return [(Freshness, "level", broken)]


# ------------------------------------------------------------------------ replicas, seals, garbage


@mutant("a follower applies what is pushed in the order it arrives")
def follower_out_of_order() -> list[Patch]:
    apply = ShardState.apply

    def tolerant(self: ShardState, record: Any) -> None:
        if record.slot > self.slot + 1:
            self.slot, self.seq = Slot(record.slot - 1), record.first_seq - 1
            self.last_put_id = record.prev_put_id
        apply(self, record)

    def broken(self: Replica, slot: Slot, body: bytes) -> None:
        if self.leader is None and slot > self.state.slot and not self.advancing.locked():
            self._apply(self.wal.decode(slot, body))

    return [(ShardState, "apply", tolerant), (Replica, "offer", broken)]


@mutant("a newer version does not replace the one in a segment")
def segments_keep_replaced_rows() -> list[Patch]:
    return [(ShardState, "_kill_in_segments", lambda self, ids, memtable: None)]


@mutant("a seal forgets which older rows died meanwhile")
def seal_forgets_tombstones() -> list[Patch]:
    bury = Sealer._bury

    async def broken(self: Sealer, view: Any, rows: Any) -> Any:
        return await bury(self, view, rows[:0])

    return [(Sealer, "_bury", broken)]


@mutant("a seal claims one slot more than it holds")
def floor_too_high() -> list[Patch]:
    rotate = ShardState.rotate

    def broken(self: ShardState) -> Any:
        point = rotate(self)
        return replace(point, floor_slot=Slot(point.floor_slot + 1))

    return [(ShardState, "rotate", broken)]


@mutant("garbage collection deletes fences")
def garbage_deletes_fences() -> list[Patch]:
    async def broken(self: GarbageCollector, key: str) -> None:
        self._fences[key] = False

    return [(GarbageCollector, "_learn", broken)]


@mutant("garbage collection deletes segments that are about to be committed")
def garbage_deletes_builds() -> list[Patch]:
    plan = garbage.plan_garbage

    def broken(**arguments: Any) -> Any:
        return plan(**{**arguments, "is_in_flight": lambda segment: False})

    return [(garbage, "plan_garbage", broken)]


@mutant("garbage collection deletes log data that no segment holds yet")
def garbage_deletes_unsealed_log() -> list[Patch]:
    plan = garbage.plan_garbage

    def broken(**arguments: Any) -> Any:
        manifest = arguments["manifest"]
        higher = replace(manifest, floor_slot=Slot(manifest.floor_slot + 2))
        return plan(**{**arguments, "manifest": higher, "is_fence": lambda key: False})

    return [(garbage, "plan_garbage", broken)]


@mutant("old manifests go without a floor marker, and nobody looks for one")
def no_manifest_boundary_check() -> list[Patch]:
    async def broken(self: VersionLog) -> int:
        return ManifestVersion(-1)

    return [(version_log.VersionLog, "floor", broken)]
