"""Keeps what runs equal to what the catalog says: observe, compare, command, publish, repeat.

Holds nothing durable: started anywhere, it reads the catalog and observes the servers. Two
controllers at once can duel over who leads a shard, which costs time but never a write: shards
are fenced in the bucket. The one that no longer owns the catalog stops.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from shoal_cluster.bucket.store import Store
from shoal_cluster.control.catalog import Catalog, Owner
from shoal_cluster.control.owned_catalog import Deposed, OwnedCatalog
from shoal_cluster.control.reconcile import (
    Command,
    OpenReplica,
    Promote,
    diff,
    topology_of,
)
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import (
    NotFound,
    Outcome,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import CollectionId, IdGenerator, ServerId, ShardNumber
from shoal_cluster.domain.keys import COLLECTIONS_PREFIX
from shoal_cluster.domain.observation import ReplicaState, ServerReport
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.schema_change import SchemaChange
from shoal_cluster.domain.topology import Topology

_log = structlog.get_logger()

ROUND_S = 0.3
"""Pause between rounds; a lost link starts a round at once."""
SUSPECT_AFTER_S = 2.0
"""A server that answers nothing for so long is treated as dead; fencing makes an early verdict
safe, and Ray's own verdict takes 15–65 s."""
STRAGGLER_S = 0.05
"""How long a round waits for servers that count as dead once all others have answered. Waiting for
a stopped one to its report's deadline would hold up every step of the takeover by a second."""
FRUITLESS_S = 10.0
PROMOTION_PAUSE_S_MAX = 5.0
"""A process whose reign failed, or ended within FRUITLESS_S, is promoted again after a pause that
doubles from ROUND_S to this, the first time at once: each attempt on a damaged shard costs an epoch
and a fence, and fences are for ever."""
READY_TIMEOUT_S = 60.0


class Servers(Protocol):
    """Port: the shard servers, however they are reached. Each method ends within seconds."""

    def placed(self) -> Mapping[ServerId, str]:
        """Returns every server the cluster consists of, running or not, and its node."""
        ...

    async def report(self, server: ServerId) -> ServerReport:
        """Raises: NotFound when no process answers to the name; Unavailable when it is silent."""
        ...

    async def carry_out(self, command: Command) -> None:
        """Raises: Unavailable when the server cannot be reached, or what the command raised."""
        ...


class Audience(Protocol):
    """Port: those who want to know the topology."""

    def publish(self, topology: Topology) -> None: ...


@dataclass(slots=True)
class _Promotion:
    """The last promotion of a shard. ended_s: monotonic, None while it is under way.

    incarnation: the process that was promoted. fruitless: promotions of this process before it, in
    a row, that failed or did not last.
    """

    server: ServerId
    incarnation: str = ""
    fruitless: int = 0
    ended_s: float | None = None


class ControlLoop:
    """The controller's work; `run` until `close`."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        ids: IdGenerator,
        servers: Servers,
        audience: Audience,
        cluster_uuid: bytes,
        owner: Owner,
    ) -> None:
        self._store = store
        self._clock = clock
        self._servers = servers
        self._audience = audience
        self._cluster_uuid = cluster_uuid
        self._owned = OwnedCatalog(
            store=store,
            clock=clock,
            ids=ids,
            owner=owner,
            placed=servers.placed,
            on_change=self._react,
        )
        self._wake = asyncio.Event()
        self._seen: dict[ServerId, float] = {}
        self._asking: dict[ServerId, asyncio.Task[ServerReport]] = {}
        self._busy: dict[tuple[type, ServerId, str, int], asyncio.Task[None]] = {}
        self._promotions: dict[tuple[CollectionId, ShardNumber], _Promotion] = {}
        self._changed = asyncio.Condition()
        self._creating: asyncio.Task[None] | None = None
        self._deleting: asyncio.Task[None] | None = None
        self.reports: dict[ServerId, ServerReport] = {}
        self.topology = Topology(version=0, cluster_uuid=cluster_uuid)

    @property
    def catalog(self) -> Catalog:
        """The catalog as far as this process knows."""
        return self._owned.current

    async def claim(self) -> None:
        """See `OwnedCatalog.claim`."""
        await self._owned.claim()

    async def release(self) -> None:
        """See `OwnedCatalog.release`."""
        await self._owned.release()

    async def run(self) -> None:
        """Reconciles until cancelled, or until another cluster owns the bucket."""
        try:
            await self._run()
        finally:
            for asking in self._asking.values():
                asking.cancel()
            for task in (self._creating, self._deleting):
                if task is not None:
                    task.cancel()

    async def _run(self) -> None:
        while True:
            # Before the round: what happens during it, after its reports, needs another at once.
            self._wake.clear()
            try:
                await self._round()
            except Deposed as error:
                _log.error("bucket_taken_over", reason=error.message)
                self._publish_nothing()
                return
            except ShoalError as error:
                _log.warning("control_round_failed", reason=error.message)
            with contextlib.suppress(TimeoutError):
                # Not wait_for: Python 3.11's loses a cancellation that meets the event.
                async with asyncio.timeout(ROUND_S):
                    await self._wake.wait()

    def wake(self) -> None:
        """Starts a round at once; called when a link is lost."""
        self._wake.set()

    async def create_collection(
        self, schema: CollectionSchema, request: RequestName
    ) -> CollectionSchema:
        """Creates a collection and returns when every shard takes writes. `schema.id` is ignored.

        Raises: InvalidRequest; AlreadyExists unless `request` is the one that created it;
        Unavailable (created, but not serving yet: the same request again waits for it).
        """
        created = await self._owned.create(schema, request)
        await self._until_serving(created)
        return created

    async def alter_collection(
        self, change: SchemaChange, request: RequestName
    ) -> CollectionSchema:
        """Changes a collection; returns its schema once the catalog holds it and replicas know.

        Raises: NotFound, InvalidRequest, Conflict.
        """
        schema = await self._owned.alter(change, request)
        await self._until_serving(schema)
        return schema

    async def drop_collection(self, name: str, request: RequestName) -> None:
        """Removes a collection from the catalog; its objects are deleted in the background.

        Raises: NotFound unless `request` is the one that dropped it.
        """
        await self._owned.drop(name, request)

    def _react(self) -> None:
        """The catalog was changed."""
        self._publish()
        self.wake()

    async def _until_serving(self, schema: CollectionSchema) -> None:
        """Waits until coordinators can reach a primary of every shard with this schema."""

        def serving() -> bool:
            place = self.topology.collections.get(schema.name)
            if place is None or any(shard.primary is None for shard in place.shards):
                return False
            return all(
                replica.schema_version >= schema.version
                for report in self.reports.values()
                for replica in report.replicas
                if replica.collection == schema.id
            )

        try:
            async with asyncio.timeout(READY_TIMEOUT_S), self._changed:
                await self._changed.wait_for(serving)
        except TimeoutError:
            raise Unavailable(
                f"collection {schema.name!r} is in the catalog but not all of its shards serve "
                f"after {READY_TIMEOUT_S:g} s; look at `shoal status`",
                outcome=Outcome.MAYBE_APPLIED,
            ) from None

    async def _round(self) -> None:
        await self._owned.refresh()
        if self.catalog.unfinished and (self._creating is None or self._creating.done()):
            self._creating = asyncio.ensure_future(self._finish_creating())
        observing_s = self._clock.monotonic_s()
        await self._observe()
        for command in diff(self.catalog, self.reports):
            if isinstance(command, Promote) and self._is_being_promoted(command, observing_s):
                continue
            self._start(command)
        self._publish()
        async with self._changed:
            self._changed.notify_all()
        if self.catalog.dropped and (self._deleting is None or self._deleting.done()):
            self._deleting = asyncio.ensure_future(self._delete_dropped())
        for running in (key for key, task in list(self._busy.items()) if task.done()):
            del self._busy[running]

    async def _observe(self) -> None:
        """Asks every server at once; keeps the last report of one that is merely slow.

        Servers that count as dead are asked too, but an answer of theirs that does not come soon is
        taken by a later round.
        """
        for server in self._servers.placed():
            if server not in self._asking:
                self._asking[server] = asyncio.ensure_future(self._servers.report(server))
        asked = list(self._asking.items())
        alive = [asking for server, asking in asked if server in self.reports]
        await asyncio.wait(alive or self._asking.values())
        await asyncio.wait(self._asking.values(), timeout=STRAGGLER_S)
        now_s = self._clock.monotonic_s()
        for server, asking in asked:
            if not asking.done():
                continue
            del self._asking[server]
            answer = asking.exception() or asking.result()
            if isinstance(answer, ServerReport):
                if server not in self.reports:
                    _log.info("server_seen", server=server, incarnation=answer.incarnation)
                self.reports[server] = answer
                self._seen[server] = now_s
            elif isinstance(answer, ShoalError):
                silent_s = now_s - self._seen.get(server, float("-inf"))
                if server in self.reports and (
                    silent_s > SUSPECT_AFTER_S or isinstance(answer, NotFound)
                ):
                    _log.warning("server_suspected", server=server, reason=answer.message)
                    del self.reports[server]
            elif isinstance(answer, BaseException):
                raise answer

    def _start(self, command: Command) -> None:
        """Carries a command out in the background, unless the same is under way already."""
        collection = command.schema.id if isinstance(command, OpenReplica) else command.collection
        key = (type(command), command.server, collection, command.shard)
        running = self._busy.get(key)
        if running is not None and not running.done():
            return
        self._busy[key] = asyncio.ensure_future(self._carry_out(command))

    def _is_being_promoted(self, command: Promote, observing_s: float) -> bool:
        """Says whether a promotion of the shard is under way, or ended after we asked for reports.

        Without this the reports of a moment ago would have a second server promoted, and the first
        fenced, for nothing. A promotion by a server that is gone does not count.
        """
        promotion = self._promotions.get((command.collection, command.shard))
        if promotion is None or promotion.server not in self.reports:
            return False
        if promotion.ended_s is None or promotion.ended_s >= observing_s:
            return True
        if promotion.incarnation != self._incarnation_of(command.server):
            return False
        return observing_s < promotion.ended_s + _pause_s(promotion.fruitless)

    def _next_promotion(self, command: Promote) -> _Promotion:
        incarnation = self._incarnation_of(command.server)
        last = self._promotions.get((command.collection, command.shard))
        fruitless = 0
        if last is not None and last.incarnation == incarnation and last.ended_s is not None:
            lasted_s = self._clock.monotonic_s() - last.ended_s
            if lasted_s < FRUITLESS_S + _pause_s(last.fruitless):
                fruitless = last.fruitless + 1
        return _Promotion(command.server, incarnation=incarnation, fruitless=fruitless)

    def _incarnation_of(self, server: ServerId) -> str:
        report = self.reports.get(server)
        return "" if report is None else report.incarnation

    async def _carry_out(self, command: Command) -> None:
        if isinstance(command, Promote):
            promotion = self._next_promotion(command)
            self._promotions[(command.collection, command.shard)] = promotion
            try:
                await self._try(command)
            finally:
                promotion.ended_s = self._clock.monotonic_s()
        else:
            await self._try(command)

    async def _try(self, command: Command) -> None:
        try:
            await self._servers.carry_out(command)
        except ShoalError as error:
            _log.warning(
                "command_failed",
                command=type(command).__name__,
                server=command.server,
                shard=command.shard,
                reason=error.message,
            )
            return
        if not self._is_reopening(command):
            self.wake()

    def _is_reopening(self, command: Command) -> bool:
        """Says whether the replica had failed: its server decides when to try (shard/host.py).

        A round at once would give the same command again, and again, as fast as links can carry it.
        """
        report = self.reports.get(command.server)
        return (
            isinstance(command, OpenReplica)
            and report is not None
            and any(
                replica.state is ReplicaState.FAILED
                for replica in report.replicas
                if (replica.collection, replica.shard) == (command.schema.id, command.shard)
            )
        )

    def _publish(self) -> None:
        topology = topology_of(
            self.catalog, self.reports, self._cluster_uuid, self.topology.version
        )
        if topology != self.topology:
            self.topology = replace(topology, version=self.topology.version + 1)
            self._audience.publish(self.topology)

    async def _finish_creating(self) -> None:
        """Makes the shards of collections that the catalog lists without any."""
        try:
            await self._owned.finish_creating()
        except ShoalError as error:
            # The next round tries again; whoever asked for the collection waits for its shards.
            _log.warning("collection_not_created", reason=error.message)

    async def _delete_dropped(self) -> None:
        """Deletes the objects of dropped collections that no live server holds any more."""
        held = {
            replica.collection for report in self.reports.values() for replica in report.replicas
        }
        try:
            for collection in self.catalog.dropped:
                if collection in held or collection in self._owned.creating:
                    continue
                for entry in await self._store.list(f"{COLLECTIONS_PREFIX}{collection}/"):
                    await self._store.delete(entry.key)
                await self._owned.forget_dropped(collection)
        except ShoalError as error:
            # The objects harm nobody; the next round tries again.
            _log.warning("dropped_collection_not_deleted", reason=error.message)

    def _publish_nothing(self) -> None:
        """Tells coordinators that no server of ours serves any more."""
        self.reports = {}
        self._publish()


def _pause_s(fruitless: int) -> float:
    """Returns how long to wait before a process that led in vain is promoted once more."""
    if fruitless == 0:
        return 0.0
    # Bounded before the power is: a shard may be damaged for a year.
    return min(ROUND_S * 2.0 ** min(fruitless - 1, 10), PROMOTION_PAUSE_S_MAX)
