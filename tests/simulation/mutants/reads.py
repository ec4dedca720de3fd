"""Mistakes in reading: levels, probes, tokens, following."""

import asyncio
from typing import Any

from shoal_cluster.domain.errors import Conflict, Indeterminate, ShoalError, Unavailable
from shoal_cluster.domain.ids import ManifestVersion, Slot
from shoal_cluster.domain.session import Consistency
from shoal_cluster.links import connection
from shoal_cluster.query.plan import Freshness
from shoal_cluster.shard.calls import ReadLevel
from shoal_cluster.shard.primary import Primary
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.state import ShardState
from shoal_cluster.wal.record import WalRecord
from tests.simulation.mutants.registry import Patch, mutant


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
            doubtful = None if self.leader is None else self.leader.appending
            while True:
                started_s = self.ports.clock.monotonic_s()
                slot = self.state.slot + 1
                newest = await self.manifests.newest_number()
                newer = newest is not None and newest > self.manifest_version
                if newer and self.leader is None:
                    await self.load_manifest()
                    continue
                record = await self._next_record()
                if record is not None:
                    if self.leader is None:
                        await self.accept(record)
                        continue
                    await self.leader.meet(record)
                    if self.leader is not None and slot != doubtful:
                        return
                    doubtful = None
                    continue
                if newer and slot == doubtful and self.leader is not None:
                    await self.leader.settled()
                    doubtful = None
                    continue
                self.mark_at_tail(started_s)
                return

    return [(Replica, "_run_probe", broken)]


@mutant("the coordinator does not pass the session's token on")
def token_not_sent() -> list[Patch]:
    def broken(self: Freshness, shard: Any, schema: Any) -> ReadLevel:
        return ReadLevel(consistency=self.consistency)

    return [(Freshness, "level", broken)]


class _ProbedByName:
    """A replica's manifests, whose newest is looked for under the name after the one it has."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._manifests = replica.manifests

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manifests, name)

    async def newest_number(self) -> int | None:
        following = ManifestVersion(self._replica.manifest_version + 1)
        found = await self._manifests.versions.read(following)
        return None if found is None else following


@mutant("looks for the next manifest by its name instead of listing")
def manifest_probed_by_name() -> list[Patch]:
    run_probe = Replica._run_probe

    async def broken(self: Replica) -> None:
        manifests = self.manifests
        self.manifests = _ProbedByName(self)  # type: ignore[assignment]
        try:
            await run_probe(self)
        finally:
            self.manifests = manifests

    return [(Replica, "_run_probe", broken)]


@mutant("a primary takes an append of its own that was under way for the tail of the log")
def own_append_taken_for_tail() -> list[Patch]:
    return [(Primary, "appending", property(lambda self: None))]


@mutant("a read whose replica is closed meanwhile, or whose deadline passes, ends as a write would")
def read_ends_as_unknown() -> list[Patch]:
    # Two guards, either of which covers for the other where a replica is closed.
    probe = Replica.probe
    received_error = connection.received_error

    async def broken(self: Replica) -> None:
        try:
            await probe(self)
        except Unavailable as error:
            if "was closed" in error.message:
                raise asyncio.CancelledError from error
            raise

    def unclear(header: Any) -> ShoalError:
        error = received_error(header)
        if not isinstance(error, Indeterminate):
            return error
        return Conflict(error.message, outcome=error.outcome)

    return [(Replica, "probe", broken), (connection, "received_error", unclear)]


@mutant("a follower applies a fence without looking for a newer manifest")
def fence_taken_on_trust() -> list[Patch]:
    async def broken(self: Replica, record: WalRecord) -> None:
        if record.slot > self.state.slot:
            self._apply(record)

    return [(Replica, "accept", broken)]


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
