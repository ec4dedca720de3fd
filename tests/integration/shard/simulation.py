"""A shard under faults: clients, readers, takeovers, seals and garbage collection, from one seed.

Every value written is unique, and the log is never really deleted (collected records move to
`buried`), so that afterwards the order of all operations is known and the check is linear.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shoal_cluster.bucket.faults import NO_FAULTS, FaultPlan, FaultStore, draw_legal_plan
from shoal_cluster.domain.errors import (
    Indeterminate,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import Slot
from shoal_cluster.domain.keys import epoch_of_segment
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.shard.calls import ReadLevel, WriteReply
from shoal_cluster.shard.state import ShardState
from shoal_cluster.wal.log import Wal, check_follows
from shoal_cluster.wal.record import RecordKind, WalRecord
from tests.unit.shard.nodes import (
    CLUSTER_UUID,
    KEYS,
    SCHEMA,
    LoopClock,
    Node,
    Shard,
    delete,
    points_of,
    upsert,
)

POINTS = [f"p{number}" for number in range(6)]
CLIENTS = 3
OPERATIONS = 12
ATTEMPTS_MAX = 8
START_ATTEMPTS_MAX = 100
UNAVAILABLE_MAX = 0.04
THINK_S_MAX = 1.0


@dataclass(slots=True)
class Operation:
    """One request. value: what it wrote, None for a delete. replies: every acknowledgement."""

    client: str
    request_no: int
    point: str
    value: float | None
    replies: list[WriteReply] = field(default_factory=list)
    unknown: bool = False


@dataclass(slots=True)
class Read:
    """A strong read. acknowledged: operations that were acknowledged before it began."""

    acknowledged: list[Operation]
    points: dict[str, float]
    position: Position


@dataclass(slots=True)
class History:
    operations: list[Operation] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    final_sum: int = 0
    takeovers: int = 0
    faults: int = 0
    buried: dict[str, bytes] = field(default_factory=dict)
    error: str = ""


class Simulation:
    def __init__(self, scratch: Path, seed: int, plan: FaultPlan | None = None) -> None:
        self.rng = random.Random(seed)
        drawn = draw_legal_plan(self.rng) if plan is None else plan
        # Nothing retries a read here as a real store does, so a takeover of some twenty reads in a
        # row must have a chance.
        self.plan = replace(drawn, unavailable=min(drawn.unavailable, UNAVAILABLE_MAX))
        self.shard = Shard(scratch, seed)
        self.history = History()
        self.nodes: list[Node] = []
        self._next_value = 0.0

    async def run(self) -> History:
        await self.shard.create()
        for _ in range(START_ATTEMPTS_MAX):
            if await self._start_node(lead=True) is not None:
                break
        await self._start_node(lead=False)
        chaos = asyncio.ensure_future(self._chaos())
        readers = asyncio.ensure_future(self._reader())
        await asyncio.gather(*(self._client(f"client-{number}") for number in range(CLIENTS)))
        for task in (chaos, readers):
            task.cancel()
        await asyncio.gather(chaos, readers, return_exceptions=True)
        await self._finish()
        return self.history

    async def _start_node(self, *, lead: bool) -> Node | None:
        store = FaultStore(
            self.shard.bucket,
            plan=self.plan,
            rng=random.Random(self.rng.random()),
            clock=LoopClock(),
        )
        node = self.shard.node(store=store)
        try:
            await node.load()
            if lead:
                await node.promote()
                self.history.takeovers += 1
        except ShoalError:
            await node.crash()
            return None
        self.nodes.append(node)
        return node

    async def _client(self, client: str) -> None:
        rng = random.Random(self.rng.random())
        for request_no in range(1, OPERATIONS + 1):
            operation = Operation(client, request_no, rng.choice(POINTS), None)
            if rng.random() < 0.65:
                self._next_value += 1
                operation.value = self._next_value
            self.history.operations.append(operation)
            await asyncio.sleep(THINK_S_MAX * rng.random())
            for _ in range(ATTEMPTS_MAX):
                if await self._attempt(operation, rng):
                    if rng.random() < 0.3:  # the reply was lost on the way: asks once more
                        await asyncio.sleep(3 * rng.random())
                        await self._attempt(operation, rng)
                    break
                await asyncio.sleep(rng.random())
        # Very late retries: their records may be sealed, and led by somebody else.
        mine = [operation for operation in self.history.operations if operation.client == client]
        for operation in rng.sample(mine, 4):
            if operation.replies:
                await self._attempt(operation, rng)

    async def _attempt(self, operation: Operation, rng: random.Random) -> bool:
        """Sends the request once to some primary, perhaps a fenced one; says if it was acked."""
        primaries = [node for node in self.nodes if node.primary is not None]
        if not primaries:
            return False
        name = {"client": operation.client}
        if operation.value is None:
            call = delete(operation.request_no, operation.point, **name)
        else:
            call = upsert(operation.request_no, {operation.point: operation.value}, **name)
        # Mostly the newest, as a client with a fresh topology would.
        node = primaries[-1] if rng.random() < 0.8 else rng.choice(primaries)
        try:
            async with asyncio.timeout(5):
                operation.replies.append(await node.write(call))
                return True
        except (Indeterminate, TimeoutError):
            operation.unknown = True
        except (Unavailable, Overloaded):
            pass
        return False

    async def _reader(self) -> None:
        rng = random.Random(self.rng.random())
        level = ReadLevel(consistency=Consistency.STRONG)
        while True:
            await asyncio.sleep(rng.random())
            if not self.nodes:
                continue
            node = rng.choice(self.nodes)
            acknowledged = [operation for operation in self.history.operations if operation.replies]
            try:
                async with asyncio.timeout(3):
                    await node.replica.wait_for(level)
            except (ShoalError, TimeoutError, asyncio.CancelledError) as error:
                if (
                    isinstance(error, asyncio.CancelledError)
                    and asyncio.current_task().cancelling()
                ):
                    raise
                continue
            self.history.reads.append(
                Read(acknowledged, points_of(node.replica), node.replica.state.position)
            )

    async def _chaos(self) -> None:
        rng = random.Random(self.rng.random())
        while True:
            await asyncio.sleep(0.5 * rng.random())
            action = rng.random()
            leaders = [node for node in self.nodes if node.primary is not None]
            serving = [node for node in leaders if node.primary.serving]
            if action < 0.2 or not leaders:
                await self._start_node(lead=True)
            elif action < 0.3 and len(self.nodes) > 1:
                await self._crash(rng.choice(self.nodes))
            elif action < 0.35:
                await self._start_node(lead=False)
            elif action < 0.65 and serving:
                node = rng.choice(serving)
                if not node.primary._sealer.busy:
                    node.primary._sealer.start()
            elif action < 0.8:
                await self._collect()
            else:
                self.shard.network.connected = not self.shard.network.connected
            while len(self.nodes) > 4:
                await self._crash(self.nodes[0])

    async def _crash(self, node: Node) -> None:
        self.nodes.remove(node)
        self.history.faults += sum(
            count for name, count in node.store.counts.items() if name != "ok"
        )
        await node.crash()

    async def _collect(self) -> None:
        """Deletes what garbage collection may: data below the floor, segments nobody can commit."""
        objects = self.shard.objects
        before = list(objects)
        newest = await self.shard.manifests.newest()
        for slot in range(1, newest.floor_slot + 1):
            key = KEYS.slot(Slot(slot))
            if b"\xa4kind\xa4data" in objects.get(key, b""):
                self.history.buried[key] = objects.pop(key)
        listed = {entry.id for entry in newest.segments}
        for key in before:
            if key.startswith(KEYS.segments):
                segment = key.removeprefix(KEYS.segments).split("/")[0]
                if segment not in listed and epoch_of_segment(segment) < newest.epoch:
                    objects.pop(key, None)
        await self.shard.manifests.versions.collect(newest.version, self.rng.randbytes(16))

    async def _finish(self) -> None:
        for node in list(self.nodes):
            await self._crash(node)
            node.store.plan = NO_FAULTS
            await node.store.settle()
        node = await self.shard.lead()
        self.history.final = points_of(node.replica)
        self.history.final_sum = node.replica.state.sum
        await node.crash()


async def find_violation(simulation: Simulation) -> str:
    """Returns what of the protocol's promises did not hold, or ''."""
    history = simulation.history
    objects = {**simulation.shard.objects, **history.buried}
    records = _whole_log(objects)
    state = ShardState(SCHEMA)
    order: dict[tuple[str, int], int] = {}
    writer_of: dict[float, tuple[str, int]] = {}
    previous: WalRecord | None = None
    for record in records:
        check_follows(previous, record)  # W-1 to W-4
        state.apply(record)
        previous = record
        for mark in record.batch.requests:
            name = (mark.client_id, mark.request_no)
            if name in order:
                return f"request {name} was carried out twice"
            order[name] = record.first_seq + mark.first
    by_name = {(op.client, op.request_no): op for op in history.operations}
    for name, operation in by_name.items():
        if operation.value is not None:
            writer_of[operation.value] = name
        if len(set(operation.replies)) > 1:
            return f"request {name} got two answers: {operation.replies}"
        if operation.replies and name not in order:
            return f"request {name} was acknowledged and is not in the log"
        for reply in operation.replies:
            if reply.first_seq != order[name]:
                return f"request {name} was acknowledged at {reply.first_seq}, is at {order[name]}"
    if (state.sum, set(_final(records))) != (history.final_sum, set(history.final)):
        return f"the log ends with {_final(records)}, the shard shows {history.final}"
    for read in history.reads:
        wrong = _judge(read, by_name, order, writer_of)
        if wrong:
            return wrong
    return ""


def _whole_log(objects: dict[str, bytes]) -> list[WalRecord]:
    wal = Wal(None, KEYS, CLUSTER_UUID, LoopClock())  # type: ignore[arg-type]
    records = []
    slot = 1
    while (body := objects.get(KEYS.slot(Slot(slot)))) is not None:
        records.append(wal.decode(Slot(slot), body))
        slot += 1
    return records


def _final(records: Sequence[WalRecord]) -> list[str]:
    alive: dict[bytes, bool] = {}
    for record in records:
        if record.kind is RecordKind.DATA:
            for point, upserted in zip(record.batch.ids, record.batch.upserts, strict=True):
                alive[point] = bool(upserted)
    return sorted(point.decode() for point, lives in alive.items() if lives)


def _judge(
    read: Read,
    by_name: dict[tuple[str, int], Operation],
    order: dict[tuple[str, int], int],
    writer_of: dict[float, tuple[str, int]],
) -> str:
    """Checks a strong read: nothing undurable, nothing older than what was acknowledged."""
    for point in POINTS:
        known = [order[(op.client, op.request_no)] for op in read.acknowledged if op.point == point]
        oldest = max(known, default=0)
        if point in read.points:
            name = writer_of[read.points[point]]
            if name not in order:
                return f"a strong read saw {point} = {read.points[point]}, which never was durable"
            if order[name] < oldest:
                return f"a strong read saw {point} at seq {order[name]}, acknowledged was {oldest}"
        elif known and not any(
            op.point == point and op.value is None and order.get(name, 0) >= oldest
            for name, op in by_name.items()
        ):
            return f"a strong read missed {point}, acknowledged at seq {oldest}"
    return ""


async def violation_of(
    scratch: Path, seed: int, plan: FaultPlan | None = None
) -> tuple[str, History]:
    """Runs one seed and judges it; an error that the protocol excludes counts as a violation."""
    simulation = Simulation(scratch, seed, plan)
    try:
        await simulation.run()
        return await find_violation(simulation), simulation.history
    except (ShoalError, AssertionError) as error:
        return f"{type(error).__name__}: {error}", simulation.history
