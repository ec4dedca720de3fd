"""Mistakes in the way of a write: append, acknowledgement, conditions, retries."""

import contextlib
from typing import Any

from shoal_cluster.bucket.store import PutOutcome, Store
from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.domain.ids import Epoch
from shoal_cluster.ingest import execute, primary_calls, route
from shoal_cluster.shard import dedup
from shoal_cluster.shard.composition import Composition
from shoal_cluster.shard.dedup import Dedup
from shoal_cluster.shard.primary import Primary
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.state import ShardState
from shoal_cluster.wal import log as wal_log
from tests.simulation.mutants.registry import Patch, mutant


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

    take = Replica.__init__

    def remember(self: Replica, *arguments: Any) -> None:
        take(self, *arguments)
        self.wal._owner = self  # type: ignore[attr-defined]

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
