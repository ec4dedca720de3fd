"""Holds every answer of every shard against the shard's log, replayed by a model of its own.

The bucket is watched, so at the end the total order of each shard is known, collected slots
included. The model applies it to a dictionary and works out again what each request should have
become and what each read should have returned at the position it claims. White box: knows slots,
records and rows. What clients may expect without knowing any of this is in history.py.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shoal_cluster.domain.errors import Corrupt, Outcome, ShoalError
from shoal_cluster.domain.ids import ServerId, ShardNumber
from shoal_cluster.domain.keys import COLLECTIONS_PREFIX, ShardKeys, number_of
from shoal_cluster.domain.point import SUM_MODULUS, decode_tail, encode_tail, row_hash
from shoal_cluster.domain.session import Consistency
from shoal_cluster.domain.shard_caller import Body, ShardCaller
from shoal_cluster.filtering.expression import And, Comparison, Expression, Operator
from shoal_cluster.filtering.wire import from_wire
from shoal_cluster.shard.calls import (
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
    fates_from_wire,
)
from shoal_cluster.wal.log import check_follows
from shoal_cluster.wal.record import RecordKind, RequestMark, WalIdentity, WalRecord, decode_record
from tests.simulation.bucket import WatchedObjects

Place = tuple[str, int]
"""Collection and shard."""


@dataclass(frozen=True, slots=True)
class Read:
    """One shard's answer. floor: what was acknowledged on the shard before it was asked."""

    call: SearchCall | GetCall | ScrollCall | CountCall
    body: bytes
    reply: SearchReply | RowsReply | CountReply
    reply_body: bytes
    floor: int
    durable: int

    @property
    def as_of(self) -> AsOf:
        return self.reply.as_of


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    call: WriteCall
    reply: WriteReply
    durable: int


@dataclass(frozen=True, slots=True)
class StoredRow:
    seq: int
    vector: bytes
    tail: bytes


Rows = dict[bytes, StoredRow]


@dataclass(slots=True)
class Audit:
    """What was asked and answered, to be judged by `judge` once the run is over."""

    objects: WatchedObjects
    reads: dict[Place, list[Read]] = field(default_factory=lambda: defaultdict(list))
    acknowledgements: dict[Place, list[Acknowledgement]] = field(
        default_factory=lambda: defaultdict(list)
    )
    asked: dict[tuple[Place, str, int], WriteCall] = field(default_factory=dict)
    acked_seq: dict[Place, int] = field(default_factory=lambda: defaultdict(int))
    violations: list[str] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)

    def judge(self, cluster_uuid: bytes) -> list[str]:
        """Returns everything that was wrong.

        Not in collections that are dropped: their objects are deleted, fences too, and who has not
        heard of that may still open one.
        """
        found = list(self.violations)
        for place, slots in sorted(self._slots().items()):
            if place[0] in self.dropped:
                continue
            found += _ShardTrial(self, place, slots, cluster_uuid).judge()
        return found

    def final_rows(self, place: Place, cluster_uuid: bytes) -> tuple[Rows, int]:
        """Returns the rows after the whole log, and the last sequence number."""
        trial = _ShardTrial(self, place, self._slots().get(place, {}), cluster_uuid)
        rows: Rows = {}
        seq = 0
        for record in trial.records():
            _apply(rows, record)
            seq = record.last_seq
        return rows, seq

    def durable(self) -> int:
        """Returns how many objects were durable by now."""
        return len(self.objects.order)

    def durable_slots(self) -> dict[Place, int]:
        """Returns the last slot of each shard's log."""
        ends = {}
        for place, slots in self._slots().items():
            end = 0
            while end + 1 in slots:
                end += 1
            ends[place] = end
        return ends

    def _slots(self) -> dict[Place, dict[int, bytes]]:
        slots: dict[Place, dict[int, bytes]] = defaultdict(dict)
        for key, body in self.objects.first.items():
            parts = key.split("/")
            if key.startswith(COLLECTIONS_PREFIX) and parts[4] == "wal":
                slots[(parts[1], int(parts[3]))][number_of(key)] = body
        return slots


class AuditedCaller:
    """A ShardCaller that notes what passes through it."""

    def __init__(self, inner: ShardCaller, audit: Audit) -> None:
        self._inner = inner
        self._audit = audit

    async def call(
        self,
        server: ServerId,
        method: str,
        header: Any,
        body: Body = b"",
        *,
        timeout_s: float,
        on_lost: Outcome,
    ) -> tuple[Any, memoryview]:
        audit = self._audit
        place = (header[0], header[1])
        floor = audit.acked_seq[place]
        sent = bytes(body) if isinstance(body, bytes | memoryview) else b"".join(body)
        writes: Sequence[WriteCall] = ()
        if method == WriteGroup.METHOD:
            writes = WriteGroup.from_wire(header, sent).calls
        for call in writes:
            self._note_asked(place, call)
        try:
            found, reply_body = await self._inner.call(
                server, method, header, body, timeout_s=timeout_s, on_lost=on_lost
            )
        except ShoalError as error:
            if error.kind in ("internal", "corrupt"):
                audit.violations.append(f"{method} to {server}: {error.kind}: {error.message}")
            raise
        durable = audit.durable()
        if writes:
            for call, fate in zip(writes, fates_from_wire(found), strict=True):
                self._note_fate(place, call, fate, durable)
        else:
            read = _read_of(method, header, sent, found, bytes(reply_body), floor, durable)
            if read is not None:
                audit.reads[place].append(read)
        return found, reply_body

    def _note_fate(self, place: Place, call: WriteCall, fate: WriteFate, durable: int) -> None:
        audit = self._audit
        if isinstance(fate, WriteReply):
            audit.acknowledgements[place].append(Acknowledgement(call, fate, durable))
            audit.acked_seq[place] = max(audit.acked_seq[place], fate.position.seq)
        elif fate.kind in ("internal", "corrupt"):
            audit.violations.append(f"write of {call.ids}: {fate.kind}: {fate.message}")

    def _note_asked(self, place: Place, call: WriteCall) -> None:
        name = (place, call.client_id, call.request_no)
        earlier = self._audit.asked.setdefault(name, call)
        same = replace(earlier, since=call.since).to_wire() == call.to_wire()
        assert same, f"request {name} was sent with two contents"


def _read_of(
    method: str, header: Any, body: bytes, found: Any, reply_body: bytes, floor: int, durable: int
) -> Read | None:
    match method:
        case "search":
            return Read(
                SearchCall.from_wire(header),
                body,
                SearchReply.from_wire(found, reply_body),
                reply_body,
                floor,
                durable,
            )
        case "get":
            return Read(
                GetCall.from_wire(header),
                body,
                RowsReply.from_wire(found, reply_body),
                reply_body,
                floor,
                durable,
            )
        case "scroll":
            return Read(
                ScrollCall.from_wire(header),
                body,
                RowsReply.from_wire(found, reply_body),
                reply_body,
                floor,
                durable,
            )
        case "count":
            return Read(
                CountCall.from_wire(header),
                body,
                CountReply.from_wire(found),
                reply_body,
                floor,
                durable,
            )
    return None


class _ShardTrial:
    """Judges one shard."""

    def __init__(
        self, audit: Audit, place: Place, slots: Mapping[int, bytes], cluster_uuid: bytes
    ) -> None:
        self._audit = audit
        self._place = place
        self._slots = slots
        self._keys = ShardKeys(place[0], ShardNumber(place[1]))  # type: ignore[arg-type]
        self._identity = WalIdentity(cluster_uuid=cluster_uuid, collection=place[0], shard=place[1])
        self._found: list[str] = []
        self._marks: dict[tuple[str, int], tuple[WalRecord, RequestMark]] = {}

    def records(self) -> Iterator[WalRecord]:
        """Yields the shard's log from slot 1 to its first gap."""
        slot = 1
        while slot in self._slots:
            key = self._keys.slot(slot)  # type: ignore[arg-type]
            yield decode_record(self._slots[slot], self._identity, key=key)
            slot += 1

    def judge(self) -> list[str]:
        self._judge_records()
        for acknowledgement in self._audit.acknowledgements[self._place]:
            self._judge_acknowledgement(acknowledgement)
        return self._found

    def _say(self, violation: str) -> None:
        self._found.append(f"shard {self._place[1]}: {violation}")

    def _judge_records(self) -> None:
        rows: Rows = {}
        previous: WalRecord | None = None
        seq = 0
        fenced: dict[int, int] = {}
        by_seq: dict[int, list[Read]] = defaultdict(list)
        for read in self._audit.reads[self._place]:
            by_seq[read.as_of.position.seq].append(read)
        self._judge_reads(by_seq.pop(0, []), rows, None)
        for record in self.records():
            try:
                check_follows(previous, record)
            except Corrupt as error:
                self._say(f"log broken: {error.message}")
                return
            if record.kind is RecordKind.FENCE:
                if record.epoch in fenced:
                    self._say(
                        f"two primaries: epoch {record.epoch} fenced slot {fenced[record.epoch]} "
                        f"and slot {record.slot}"
                    )
                fenced[record.epoch] = record.slot
            self._judge_requests(record, dict(rows))
            _apply(rows, record)
            previous = record
            if record.last_seq > seq:
                for inside in range(seq + 1, record.last_seq):
                    for read in by_seq.pop(inside, []):
                        self._say(f"torn batch: a {read.call.METHOD} reflects seq {inside} only")
                seq = record.last_seq
                self._judge_reads(by_seq.pop(seq, []), rows, record)
        for position, reads in sorted(by_seq.items()):
            self._say(
                f"dirty read: {len(reads)} answers reflect seq {position}, the log ends at {seq}"
            )

    def _judge_requests(self, record: WalRecord, rows: Rows) -> None:
        """Works out again what each request of the record should have become."""
        batch = record.batch
        upserted = np.cumsum(np.frombuffer(batch.upserts, dtype=np.uint8))
        for mark in batch.requests:
            name = (mark.client_id, mark.request_no)
            if name in self._marks:
                self._say(f"double apply: request {name} is in the log twice")
            self._marks[name] = (record, mark)
            call = self._audit.asked.get((self._place, *name))
            found: list[tuple[bytes, bytes | None, bytes | None]] = []
            for i in range(mark.first, mark.first + mark.operations):
                if batch.upserts[i]:
                    row = int(upserted[i]) - 1
                    found.append((batch.ids[i], batch.vectors[row].tobytes(), batch.tails[row]))
                else:
                    found.append((batch.ids[i], None, None))
            if call is None:
                self._say(f"request {name} is in the log, but nobody sent it")
            else:
                broken = _broken_condition(call, rows)
                if broken is not None:
                    self._say(f"request {name} was applied though {broken}")
                expected = _operations_of(call, rows)
                if sorted(found, key=_by_id) != sorted(expected, key=_by_id):
                    self._say(
                        f"wrong effect: {call.kind.value} {name} at slot {record.slot} became "
                        f"{_brief(found)}, should be {_brief(expected)}"
                    )
            for offset, (point, vector, tail) in enumerate(found):
                if vector is None or tail is None:
                    rows.pop(point, None)
                else:
                    seq = record.first_seq + mark.first + offset
                    rows[point] = StoredRow(seq, vector, tail)

    def _judge_acknowledgement(self, acknowledgement: Acknowledgement) -> None:
        call, reply = acknowledgement.call, acknowledgement.reply
        name = (call.client_id, call.request_no)
        known = self._marks.get(name)
        if known is None:
            self._say(f"acknowledged write lost: request {name} is not in the log")
            return
        record, mark = known
        first = record.first_seq + mark.first
        expected = (record.epoch, first + mark.operations - 1, first, mark.affected)
        told = (reply.position.epoch, reply.position.seq, reply.first_seq, reply.affected)
        if told != expected:
            self._say(
                f"wrong acknowledgement: request {name} was told (epoch, seq, first, affected) "
                f"{told}, the log says {expected}"
            )
        if self._durable_at(record) > acknowledgement.durable:
            self._say(f"acknowledged before durable: request {name} at slot {record.slot}")

    def _durable_at(self, record: WalRecord) -> int:
        return self._audit.objects.order[self._keys.slot(record.slot)]

    def _judge_reads(self, reads: Sequence[Read], rows: Rows, record: WalRecord | None) -> None:
        for read in reads:
            self._judge_level(read)
            if record is not None and self._durable_at(record) > read.durable:
                self._say(f"dirty read: {read.call.METHOD} saw slot {record.slot} undurable")
            wrong = _wrong_answer(read, rows)
            if wrong is not None:
                self._say(f"wrong answer at seq {read.as_of.position.seq}: {wrong}")

    def _judge_level(self, read: Read) -> None:
        level, position = read.call.level, read.as_of.position
        if level.consistency is Consistency.STRONG and position.seq < read.floor:
            self._say(
                f"stale strong read: {read.call.METHOD} at seq {position.seq}, "
                f"{read.floor} was acknowledged before it began"
            )
        if level.consistency is Consistency.SESSION and position < level.at_least:
            self._say(
                f"session guarantee broken: {read.call.METHOD} at {tuple(position)}, "
                f"the token says {tuple(level.at_least)}"
            )


def _by_id(operation: tuple[bytes, bytes | None, bytes | None]) -> tuple[bytes, bool]:
    return operation[0], operation[1] is None


def _brief(operations: Sequence[tuple[bytes, bytes | None, bytes | None]]) -> str:
    return ", ".join(
        f"{point.decode()}={'delete' if tail is None else decode_tail(tail)[1]}"
        for point, _, tail in operations
    )


def _apply(rows: Rows, record: WalRecord) -> None:
    batch = record.batch
    row = 0
    for i, point in enumerate(batch.ids):
        if batch.upserts[i]:
            rows[point] = StoredRow(
                record.first_seq + i, batch.vectors[row].tobytes(), batch.tails[row]
            )
            row += 1
        else:
            rows.pop(point, None)


def _operations_of(
    call: WriteCall, rows: Mapping[bytes, StoredRow]
) -> list[tuple[bytes, bytes | None, bytes | None]]:
    """Returns what a request becomes on these rows."""
    match call.kind:
        case WriteKind.UPSERT:
            size = len(call.body) // max(len(call.ids), 1)
            body = bytes(call.body)
            return [
                (point, body[i * size : (i + 1) * size], tail)
                for i, (point, tail) in enumerate(zip(call.ids, call.tails, strict=True))
            ]
        case WriteKind.DELETE:
            return [(point, None, None) for point in call.ids if point in rows]
        case WriteKind.DELETE_WHERE:
            wanted = from_wire(call.filter)
            return [
                (point, None, None)
                for point, row in rows.items()
                if satisfies(wanted, decode_tail(row.tail)[1])
            ]
        case WriteKind.PATCH:
            patched: list[tuple[bytes, bytes | None, bytes | None]] = []
            for point, patch in zip(call.ids, call.patches, strict=True):
                if point not in rows:
                    continue
                norm, attributes, payload, provenance = decode_tail(rows[point].tail)
                merged = {**attributes, **patch}
                kept = {name: value for name, value in merged.items() if value is not None}
                tail = encode_tail(norm, kept, payload, provenance)
                patched.append((point, rows[point].vector, tail))
            return patched


def _broken_condition(call: WriteCall, rows: Mapping[bytes, StoredRow]) -> str | None:
    if call.if_absent:
        present = [point for point in call.ids if point in rows]
        if present:
            return f"{present[0].decode()} existed"
    for point, wanted in zip(call.ids, call.if_seqs or (), strict=False):
        actual = rows[point].seq if point in rows else 0
        if actual != wanted:
            return f"{point.decode()} was at seq {actual}, not {wanted}"
    return None


def satisfies(expression: Expression | None, attributes: Mapping[str, Any]) -> bool:
    """Evaluates the few filters that the simulated clients use."""
    match expression:
        case None:
            return True
        case And(operands):
            return all(satisfies(operand, attributes) for operand in operands)
        case Comparison(name, Operator.EQ, value):
            return bool(attributes.get(name) == value)
        case Comparison(name, Operator.GE, value):
            return name in attributes and attributes[name] >= value
    raise AssertionError(f"the model has no meaning for {expression}")


def _wrong_answer(read: Read, rows: Rows) -> str | None:
    """Returns how an answer differs from what these rows give, or None."""
    call, reply = read.call, read.reply
    match call:
        case CountCall():
            assert isinstance(reply, CountReply)
            wanted = None if call.filter is None else from_wire(call.filter)
            expected = sum(satisfies(wanted, decode_tail(row.tail)[1]) for row in rows.values())
            return None if reply.rows == expected else f"count {reply.rows} for {expected}"
        case GetCall():
            points = [point for point in call.ids if point in rows]
            return _wrong_rows(read, sorted(points), rows)
        case ScrollCall():
            wanted = None if call.filter is None else from_wire(call.filter)
            points = [
                point
                for point in sorted(rows)
                if point > call.after and satisfies(wanted, decode_tail(rows[point].tail)[1])
            ]
            return _wrong_rows(read, points[: call.limit], rows)
        case SearchCall():
            return _wrong_hits(read, rows)


def _wrong_rows(read: Read, points: Sequence[bytes], rows: Rows) -> str | None:
    reply, call = read.reply, read.call
    assert isinstance(reply, RowsReply)
    tails = [b""] * len(reply.ids) if reply.tails is None else map(bytes, reply.tails)
    told = sorted(zip(reply.ids, reply.seqs, tails, strict=True))
    expected = [
        (point, rows[point].seq, b"" if reply.tails is None else rows[point].tail)
        for point in points
    ]
    if told != expected:
        return f"{call.METHOD} {_seqs(told)} for {_seqs(expected)}"
    vectors = b"".join(rows[point].vector for point in reply.ids)
    if not isinstance(call, GetCall | ScrollCall) or (reply.tails is None) == call.with_tails:
        return f"{call.METHOD} was answered with tails or without against its wish"
    if call.with_vector and read.reply_body[: len(vectors)] != vectors:
        return f"{call.METHOD} returned other vectors"
    return None


def _seqs(found: Sequence[tuple[bytes, int, bytes]]) -> str:
    return "{" + ", ".join(f"{point.decode()}@{seq}" for point, seq, _ in found) + "}"


def _wrong_hits(read: Read, rows: Rows) -> str | None:
    """Checks an exact search under squared distance; ties break by id."""
    call, reply = read.call, read.reply
    assert isinstance(call, SearchCall) and isinstance(reply, SearchReply)
    if not call.exact:
        return None
    wanted = None if call.filter is None else from_wire(call.filter)
    points = [point for point, row in rows.items() if satisfies(wanted, decode_tail(row.tail)[1])]
    dimension = len(next(iter(rows.values())).vector) // 4 if rows else 1
    queries = np.frombuffer(read.body, dtype=np.float32)
    if not rows:
        return None if not reply.ids else f"search found {len(reply.ids)} in an empty shard"
    begin = 0
    for query, count in zip(queries.reshape(-1, dimension), reply.counts, strict=True):
        expected = sorted(
            (float(((np.frombuffer(rows[point].vector, np.float32) - query) ** 2).sum()), point)
            for point in points
        )[: call.k]
        told = list(reply.ids[begin : begin + count])
        if told != [point for _, point in expected]:
            return f"search {told} for {[point for _, point in expected]}"
        seqs = list(reply.seqs[begin : begin + count])
        if seqs != [rows[point].seq for point in told]:
            return f"search returned seqs {seqs} for {[rows[point].seq for point in told]}"
        if reply.tails is not None:
            tails = list(reply.tails[begin : begin + count])
            if tails != [rows[point].tail for point in told]:
                return "search returned other payloads"
        begin += count
    return None


def sum_of(rows: Mapping[bytes, StoredRow]) -> int:
    """Returns the set checksum of rows."""
    return (
        sum(row_hash(point, row.seq, row.vector, row.tail) for point, row in rows.items())
        % SUM_MODULUS
    )
