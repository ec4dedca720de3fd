"""A cluster in memory behind the ports of domain/shard_caller.py, with scripted failures.

Every replica of a shard shows the same rows, as replicas at the tail do. Messages go through
msgpack, so a test fails when one cannot travel.
"""

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import numpy as np

from shoal_cluster.domain.errors import (
    Conflict,
    Indeterminate,
    NotFound,
    NotPrimary,
    Outcome,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import CollectionId, Epoch, Seq, ServerId, ShardNumber, Slot
from shoal_cluster.domain.point import NO_PROVENANCE, decode_tail, encode_tail
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.shard_caller import Body
from shoal_cluster.domain.topology import CollectionPlace, ShardPlace, Topology
from shoal_cluster.filtering.expression import matches
from shoal_cluster.filtering.wire import from_wire
from shoal_cluster.shard.calls import (
    UNKNOWN_CLIENT,
    AsOf,
    CountCall,
    CountReply,
    GetCall,
    RowsReply,
    ScrollCall,
    SearchCall,
    SearchReply,
    WriteCall,
    WriteFate,
    WriteGroup,
    WriteKind,
    WriteReply,
    fates_to_wire,
    rows_body,
)
from tests.unit.query import fake_exploring

EPOCH = Epoch(7)


class FakeClock:
    """Time that passes only in `sleep`, at once."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return int(self.now_s * 1000)

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        await asyncio.sleep(0)


@dataclass(slots=True)
class StoredRow:
    seq: int
    vector: np.ndarray
    tail: bytes


@dataclass(slots=True)
class FakeShard:
    """The rows of one shard, with the semantics of shard/calls.py.

    horizon: unknown clients may have written before it, counted in sequence numbers here.
    """

    schema: CollectionSchema
    number: ShardNumber
    rows: dict[bytes, StoredRow] = field(default_factory=dict)
    seq: int = 0
    answered: dict[tuple[str, int], WriteReply] = field(default_factory=dict)
    horizon: int = 0
    delete_where_max: int = 10_000
    rows_per_reply_max: int = 10_000
    bounded_shards: set[int] = field(default_factory=set)

    def as_of(self) -> AsOf:
        return AsOf(position=Position(EPOCH, Seq(self.seq)), staleness_ms=3.5, slot=Slot(self.seq))

    def matching(self, filter_wire: Any) -> list[bytes]:
        if filter_wire is None:
            return sorted(self.rows)
        expression = from_wire(filter_wire)
        return sorted(
            i for i, row in self.rows.items() if matches(expression, decode_tail(row.tail)[1])
        )

    def search(self, call: SearchCall, body: bytes) -> tuple[list[Any], bytes]:
        queries = np.frombuffer(body, np.float32).reshape(-1, self.schema.dimension)
        ids = self.matching(call.filter)
        counts, found, keys, vectors = [], [], [], []
        for query in queries:
            scored = sorted((self.key(query, self.rows[i].vector), i) for i in ids)[: call.k]
            counts.append(len(scored))
            found += [i for _, i in scored]
            keys += [key for key, _ in scored]
            vectors += [self.rows[i].vector for _, i in scored]
        reply = SearchReply(
            counts=counts,
            ids=found,
            keys=np.array(keys, np.float32).tobytes(),
            seqs=[self.rows[i].seq for i in found],
            tails=[self.rows[i].tail for i in found] if call.with_payload else None,
            as_of=self.as_of(),
            explain={"segments": [], "memtable_rows": len(ids), "stages_us": {"search": 5}}
            if call.explain
            else None,
        )
        raw = b"".join(v.tobytes() for v in vectors) if call.with_vector else b""
        return reply.to_wire(), rows_body(raw, reply.tails)

    def key(self, query: np.ndarray, vector: np.ndarray) -> float:
        if self.schema.metric is Metric.L2:
            return float(np.float32(((query - vector) ** 2).sum()))
        return float(np.float32(-(query @ vector)))

    def reply_rows(
        self, call: GetCall | ScrollCall, ids: Sequence[bytes]
    ) -> tuple[list[Any], bytes]:
        found = [i for i in ids if i in self.rows]
        there = found[: self.rows_per_reply_max]
        reply = RowsReply(
            ids=there,
            seqs=[self.rows[i].seq for i in there],
            tails=[self.rows[i].tail for i in there] if call.with_tails else None,
            as_of=self.as_of(),
            cut=len(there) < len(found),
        )
        raw = b"".join(self.rows[i].vector.tobytes() for i in there) if call.with_vector else b""
        return reply.to_wire(), rows_body(raw, reply.tails)

    def write(self, call: WriteCall) -> WriteReply:
        name = (call.client_id, call.request_no)
        if name not in self.answered:
            known = any(client == call.client_id for client, _ in self.answered)
            if not known and (call.since or 0) < self.horizon:
                raise Indeterminate("nothing is known of the client", field=UNKNOWN_CLIENT)
            self.answered[name] = self._apply(call)
        return self.answered[name]

    def _apply(self, call: WriteCall) -> WriteReply:
        wanted = [0] * len(call.ids) if call.if_absent else call.if_seqs
        for i, (point_id, seq) in enumerate(zip(call.ids, wanted or (), strict=False)):
            actual = self.rows[point_id].seq if point_id in self.rows else 0
            if actual != seq:
                raise Conflict(f"{point_id!r} is at {actual}", field=f"points[{i}].if_seq")
        first, affected, more = self.seq + 1, 0, False
        if call.kind is WriteKind.UPSERT:
            vectors = np.frombuffer(call.body, np.float32).reshape(len(call.ids), -1)
            for point_id, vector, tail in zip(call.ids, vectors, call.tails, strict=True):
                self.seq += 1
                self.rows[point_id] = StoredRow(self.seq, vector, tail)
                affected += 1
        elif call.kind is WriteKind.PATCH:
            for point_id, patch in zip(call.ids, call.patches, strict=True):
                row = self.rows.get(point_id)
                if row is not None:
                    self.seq += 1
                    affected += 1
                    self.rows[point_id] = StoredRow(self.seq, row.vector, _patched(row.tail, patch))
        else:
            ids = list(call.ids)
            if call.kind is WriteKind.DELETE_WHERE:
                found = self.matching(call.filter)
                ids, more = found[: self.delete_where_max], len(found) > self.delete_where_max
            for point_id in ids:
                self.seq += 1
                affected += self.rows.pop(point_id, None) is not None
        return WriteReply(
            position=Position(EPOCH, Seq(self.seq)),
            first_seq=first,
            affected=affected,
            more=more,
            slot=Slot(self.seq),
        )


def _patched(tail: bytes, patch: Mapping[str, Any]) -> bytes:
    norm, attributes, payload, provenance = decode_tail(tail)
    merged = {k: v for k, v in {**attributes, **patch}.items() if v is not None}
    return encode_tail(norm, merged, payload, provenance)


class Behaviour:
    """What a server does with one call. HANG: says nothing until the timeout."""

    HANG = "hang"
    LOSE_REPLY = "lose_reply"


Script = deque[Any]
"""One entry a call: an exception to raise, a Behaviour, a delay in seconds, or None for normal."""


@dataclass(frozen=True, slots=True)
class Call:
    server: ServerId
    method: str
    message: Any


class FakeCluster:
    """Implements ShardCaller and TopologySource."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.topology = Topology(version=1, cluster_uuid=b"u" * 16)
        self.shards: dict[tuple[str, int], FakeShard] = {}
        self.scripts: dict[ServerId, Script] = defaultdict(deque)
        self.dead: set[ServerId] = set()
        self.hanging: set[ServerId] = set()
        self.calls: list[Call] = []
        self.sent: list[Any] = []
        self.cancelled: list[ServerId] = []
        self.on_wait: list[Callable[[], None]] = []
        self._newer = asyncio.Event()

    # Building

    def add_collection(
        self, schema: CollectionSchema, replicas: Sequence[Sequence[str]]
    ) -> CollectionPlace:
        """replicas: of each shard, the first one being the primary."""
        places = tuple(
            ShardPlace(
                shard=ShardNumber(number),
                primary=ServerId(servers[0]) if servers else None,
                epoch=EPOCH,
                replicas=tuple(map(ServerId, servers)),
            )
            for number, servers in enumerate(replicas)
        )
        for place in places:
            self.shards[schema.id, place.shard] = FakeShard(schema, place.shard)
        collection = CollectionPlace(schema=schema, shards=places)
        self.publish({**self.topology.collections, schema.name: collection})
        return collection

    def publish(self, collections: Mapping[str, CollectionPlace]) -> None:
        self.topology = replace(
            self.topology, version=self.topology.version + 1, collections=collections
        )
        self._newer.set()
        self._newer = asyncio.Event()

    def move_primary(self, collection: str, shard: int, to: str | None) -> None:
        place = self.topology.collections[collection]
        shards = list(place.shards)
        primary = None if to is None else ServerId(to)
        shards[shard] = replace(shards[shard], primary=primary)
        self.publish(
            {**self.topology.collections, collection: replace(place, shards=tuple(shards))}
        )

    def shard(self, schema: CollectionSchema, number: int) -> FakeShard:
        return self.shards[schema.id, number]

    def methods(self, method: str) -> list[Call]:
        return [call for call in self.calls if call.method == method]

    # TopologySource

    def current(self) -> Topology:
        return self.topology

    async def newer_than(self, version: int, timeout_s: float) -> Topology:
        if self.on_wait:
            self.on_wait.pop(0)()
        if self.topology.version <= version:
            if isinstance(self.clock, FakeClock):
                await self.clock.sleep(timeout_s)
            else:
                newer = self._newer
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(newer.wait(), timeout_s)
        return self.topology

    # ShardCaller

    async def call(
        self,
        server: ServerId,
        method: str,
        header: object,
        body: Body = b"",
        *,
        timeout_s: float,
        on_lost: Outcome,
    ) -> tuple[Any, memoryview]:
        assert timeout_s > 0, "a call without time"
        fields = msgpack.unpackb(msgpack.packb(header))
        sent = bytes(body) if isinstance(body, bytes | memoryview) else b"".join(body)
        message = _parse(method, fields, sent)
        self.sent.append(message)
        writes = message.calls if isinstance(message, WriteGroup) else [message]
        self.calls += [Call(server, method, each) for each in writes]
        try:
            return await self._serve(server, message, sent, timeout_s, on_lost)
        except asyncio.CancelledError:
            self.cancelled.append(server)
            raise

    async def _serve(
        self, server: ServerId, message: Any, body: bytes, timeout_s: float, on_lost: Outcome
    ) -> tuple[Any, memoryview]:
        lost = Indeterminate if on_lost is Outcome.MAYBE_APPLIED else Unavailable
        if server in self.dead:
            raise Unavailable(f"{server} is not reachable")
        step = self.scripts[server].popleft() if self.scripts[server] else None
        if server in self.hanging or step == Behaviour.HANG:
            await self.clock.sleep(timeout_s)
            raise lost(f"{server} did not answer in {timeout_s} s")
        if isinstance(step, Exception):
            raise step
        if isinstance(step, int | float):
            await self.clock.sleep(step)
        reply, raw = self._answer(server, message, body)
        if step == Behaviour.LOSE_REPLY:
            raise lost(f"the link to {server} broke")
        return msgpack.unpackb(msgpack.packb(reply)), memoryview(raw)

    def _answer(self, server: ServerId, message: Any, body: bytes) -> tuple[Any, bytes]:
        if isinstance(message, WriteGroup):
            return fates_to_wire([self._fate(server, call) for call in message.calls]), b""
        shard = self.shards.get((message.collection, message.shard))
        if shard is None:
            raise NotFound(f"{server} does not hold shard {message.shard}")
        match message:
            case SearchCall():
                return shard.search(message, body)
            case GetCall():
                return shard.reply_rows(message, message.ids)
            case ScrollCall():
                ids = [i for i in shard.matching(message.filter) if i > message.after]
                return shard.reply_rows(message, ids[: message.limit])
            case CountCall():
                rows = len(shard.matching(message.filter))
                return CountReply(rows=rows, as_of=shard.as_of()).to_wire(), b""
        if type(message) in fake_exploring.ANSWERS:
            return fake_exploring.answer(shard, message, body)
        raise AssertionError(f"unexpected {message}")

    def _fate(self, server: ServerId, call: WriteCall) -> WriteFate:
        shard = self.shards.get((call.collection, call.shard))
        if shard is None:
            raise NotFound(f"{server} does not hold shard {call.shard}")
        place = self.topology.collections[shard.schema.name].shards[call.shard]
        if place.primary != server:
            raise NotPrimary(f"{server} is not the primary of shard {call.shard}")
        try:
            return shard.write(call)
        except ShoalError as error:
            return error


def _parse(method: str, fields: Any, body: bytes) -> Any:
    if method == WriteGroup.METHOD:
        return WriteGroup.from_wire(fields, body)
    known: list[Any] = [SearchCall, GetCall, ScrollCall, CountCall, *fake_exploring.ANSWERS]
    return {c.METHOD: c for c in known}[method].from_wire(fields)


def a_schema(**changes: Any) -> CollectionSchema:
    """A collection of four dimensions, unless changed."""
    fields: dict[str, Any] = {
        "id": CollectionId("c" * 32),
        "name": "docs",
        "dimension": 4,
        "metric": Metric.COSINE,
        "attributes": {
            "section": AttributeType.KEYWORD,
            "size": AttributeType.INT,
            "tags": AttributeType.KEYWORD_LIST,
        },
    }
    return CollectionSchema(**{**fields, **changes})


def store(
    cluster: FakeCluster,
    schema: CollectionSchema,
    shard: int,
    point_id: str,
    vector: Sequence[float],
    norm: float = 1.0,
    payload: bytes = b"",
    **attributes: Any,
) -> None:
    """Puts one row into a shard, as the index wants it."""
    of_shard = cluster.shard(schema, shard)
    of_shard.seq += 1
    stored = np.array(vector, np.float32)
    if schema.metric is Metric.COSINE:
        stored = stored / np.linalg.norm(stored)
    tail = encode_tail(norm, attributes, payload, NO_PROVENANCE)
    of_shard.rows[point_id.encode()] = StoredRow(of_shard.seq, stored.astype(np.float32), tail)
