"""Turns queued requests into one batch of upserts and deletes: pure, against state plus the batch.

Here a request meets the order: deduplication, conditions, patches and deletes by filter are settled
now, so that what is written to the log are plain upserts and deletes whose replay cannot fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
import numpy as np

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Conflict, InvalidRequest, Unavailable
from shoal_cluster.domain.ids import NO_SLOT, Epoch, Seq, Slot
from shoal_cluster.domain.point import Vector, Vectors, decode_tail, encode_tail
from shoal_cluster.filtering.attributes import keyword_bytes, require_keyword_bytes
from shoal_cluster.filtering.expression import matches
from shoal_cluster.filtering.wire import from_wire
from shoal_cluster.shard.calls import WriteCall, WriteKind
from shoal_cluster.shard.dedup import Answer
from shoal_cluster.shard.rows import matching_ids
from shoal_cluster.shard.state import ShardState
from shoal_cluster.wal.record import OPERATION_BYTES, OperationBatch, RequestMark

BATCH_BYTES_MAX: Final = limits.WAL_RECORD_BYTES_MAX - 4 * limits.KIB
"""A batch becomes one WAL record; 4 KiB are for its header."""

_REQUEST_BYTES: Final = 64
"""Of a request in a record, besides its client id, at most."""


@dataclass(slots=True)
class _Pending:
    """What the batch so far has made of an id; vector and tail None: deleted."""

    seq: int
    vector: Vector | None
    tail: bytes | None


@dataclass(slots=True)
class _Operations:
    """What one request becomes: upserts of all ids, or deletes of all when there are no tails.

    vectors: one a row; blocks: the same end to end. more: see WriteReply.
    """

    ids: Sequence[bytes]
    tails: Sequence[bytes] = ()
    vectors: Sequence[Vector] | Vectors = ()
    blocks: list[Vectors] = field(default_factory=list)
    more: bool = False

    def size_bytes(self) -> int:
        """Returns what they take in a record, at most."""
        return (
            sum(map(len, self.ids))
            + sum(map(len, self.tails))
            + sum(block.nbytes for block in self.blocks)
            + OPERATION_BYTES * len(self.ids)
        )


class Composition:
    """A batch under construction. The state must not change while it is being composed.

    Its record has at most WAL_RECORD_BYTES_MAX bytes, whatever the requests become.
    """

    def __init__(self, state: ShardState, epoch: Epoch) -> None:
        self._state = state
        self._epoch = epoch
        self._marks: list[RequestMark] = []
        self._answers: dict[tuple[str, int], Answer] = {}
        self._ids: list[bytes] = []
        self._upserts = bytearray()
        self._vectors: list[Vectors] = []
        self._tails: list[bytes] = []
        self._pending: dict[bytes, _Pending] = {}
        self._size_bytes = 0

    @property
    def full(self) -> bool:
        return self._size_bytes >= BATCH_BYTES_MAX or len(self._ids) >= limits.WAL_RECORD_OPS_MAX

    @property
    def operations(self) -> int:
        return len(self._ids)

    @property
    def requests(self) -> int:
        """Requests that became part of the batch, even those that found nothing to change."""
        return len(self._marks)

    def batch(self) -> OperationBatch:
        """Returns the batch; its vectors are copied out of the requests' bodies."""
        vectors = (
            np.concatenate(self._vectors)
            if self._vectors
            else np.empty((0, self._state.schema.dimension), dtype=np.float32)
        )
        return OperationBatch(
            requests=tuple(self._marks),
            ids=self._ids,
            upserts=bytes(self._upserts),
            vectors=np.ascontiguousarray(vectors),
            tails=self._tails,
        )

    def add(self, call: WriteCall) -> Answer | None:
        """Adds a request's operations and returns the answer it gets once the batch is durable.

        None: it does not fit any more and must go into the next batch; an empty one never says so.
        A request that was carried out before gets its first answer and adds nothing.

        Raises: InvalidRequest, Conflict (a condition failed on the state as far as it is known
        here), Unavailable, Indeterminate: the request adds nothing.
        """
        name = (call.client_id, call.request_no)
        earlier = self._answers.get(name) or self._state.dedup.find(*name, call.since or NO_SLOT)
        if earlier is not None:
            return earlier
        self._check(call)
        operations = self._operations_of(call)
        size_bytes = operations.size_bytes() + len(call.client_id.encode()) + _REQUEST_BYTES
        if size_bytes > BATCH_BYTES_MAX:
            raise _too_large(call, size_bytes, len(operations.ids))
        if self._marks and self._size_bytes + size_bytes > BATCH_BYTES_MAX:
            return None
        first, affected = len(self._ids), len(operations.ids)
        self._take(operations)
        self._size_bytes += size_bytes
        answer = Answer(
            epoch=self._epoch,
            last_seq=Seq(self._state.seq + len(self._ids)),
            first_seq=Seq(self._state.seq + 1 + first),
            affected=affected,
            more=operations.more,
            slot=Slot(self._state.slot + 1),
        )
        self._marks.append(RequestMark(*name, first, affected, affected, operations.more))
        self._answers[name] = answer
        return answer

    def _take(self, operations: _Operations) -> None:
        first_seq = self._state.seq + 1 + len(self._ids)
        count = len(operations.ids)
        if operations.tails:
            rows = zip(operations.ids, operations.vectors, operations.tails, strict=True)
            for offset, (point_id, vector, tail) in enumerate(rows):
                self._pending[point_id] = _Pending(first_seq + offset, vector, tail)
            self._upserts.extend(b"\x01" * count)
            self._vectors.extend(operations.blocks)
            self._tails.extend(operations.tails)
        else:
            for offset, point_id in enumerate(operations.ids):
                self._pending[point_id] = _Pending(first_seq + offset, None, None)
            self._upserts.extend(b"\x00" * count)
        self._ids.extend(operations.ids)

    def _operations_of(self, call: WriteCall) -> _Operations:
        if call.kind is WriteKind.UPSERT:
            return self._upsert(call)
        if call.kind is WriteKind.PATCH:
            return self._patch(call)
        if call.kind is WriteKind.DELETE:
            return self._delete(call.ids)
        expression = from_wire(call.filter)
        limit = limits.DELETE_BY_FILTER_MAX
        # What the batch so far has touched is judged by what it made of it, the rest as it stands.
        stored = matching_ids(self._state.snapshot(), expression, limit + 1)
        chosen = [point_id for point_id in stored[:limit] if point_id not in self._pending]
        chosen += [
            point_id
            for point_id, pending in self._pending.items()
            if pending.tail is not None and matches(expression, decode_tail(pending.tail)[1])
        ]
        operations = self._delete(chosen)
        operations.more = len(stored) > limit
        return operations

    def _check(self, call: WriteCall) -> None:
        """Refuses what could not be replayed, before anything of the request is in the batch."""
        counts = {
            WriteKind.UPSERT: (len(call.tails), memoryview(call.body).nbytes),
            WriteKind.PATCH: (len(call.patches), 0),
        }.get(call.kind)
        dimension = self._state.schema.dimension
        if call.kind is WriteKind.UPSERT and counts != (
            len(call.ids),
            4 * dimension * len(call.ids),
        ):
            raise InvalidRequest(
                f"{len(call.ids)} ids came with (rows, vector bytes) {counts}",
                field="vectors",
                limit=f"{dimension} float32 a point",
            )
        if call.kind is WriteKind.PATCH and counts != (len(call.ids), 0):
            raise InvalidRequest(
                f"{len(call.ids)} ids came with {len(call.patches)} patches", field="patches"
            )
        if call.if_seqs is not None and len(call.if_seqs) != len(call.ids):
            raise InvalidRequest(
                f"{len(call.ids)} ids came with {len(call.if_seqs)} conditions", field="if_seqs"
            )
        self._check_attributes(call)
        self._check_conditions(call)

    def _check_attributes(self, call: WriteCall) -> None:
        """Refuses attributes this replica has not been told of yet: its indexes would lack them."""
        declared = self._state.schema.attributes.keys()
        for attributes in (*map(_attributes_of, call.tails), *call.patches):
            if not attributes.keys() <= declared:
                raise Unavailable(
                    f"attributes {sorted(attributes.keys() - declared)} are not declared in schema "
                    f"version {self._state.schema.version}, the newest that has reached this "
                    "replica; nothing was applied, try again"
                )

    def _upsert(self, call: WriteCall) -> _Operations:
        dimension = self._state.schema.dimension
        vectors = np.frombuffer(call.body, dtype=np.float32).reshape(len(call.ids), dimension)
        return _Operations(ids=call.ids, tails=call.tails, vectors=vectors, blocks=[vectors])

    def _check_conditions(self, call: WriteCall) -> None:
        if not call.if_absent and call.if_seqs is None:
            return
        expected: Sequence[int] = call.if_seqs if call.if_seqs is not None else [0] * len(call.ids)
        for index, (point_id, seq) in enumerate(zip(call.ids, expected, strict=True)):
            actual = self._seq_of(point_id)
            if actual != seq:
                wanted = "absent" if seq == 0 else f"at seq {seq}"
                found = "absent" if actual == 0 else f"at seq {actual}"
                raise Conflict(
                    f"point {point_id.decode(errors='replace')!r} should be {wanted} but is "
                    f"{found}; nothing of the "
                    "request was applied to this shard",
                    field="if_absent" if call.if_seqs is None else f"points[{index}].if_seq",
                )

    def _seq_of(self, point_id: bytes) -> int:
        pending = self._pending.get(point_id)
        if pending is not None:
            return 0 if pending.tail is None else pending.seq
        place = self._state.locate(point_id)
        return 0 if place is None else place.seq

    def _patch(self, call: WriteCall) -> _Operations:
        ids: list[bytes] = []
        tails: list[bytes] = []
        vectors: list[Vector] = []
        size_bytes = 0
        for point_id, patch in zip(call.ids, call.patches, strict=True):
            row = self._row_of(point_id)
            if row is None:
                continue
            vector, tail = row
            norm, attributes, payload, provenance = decode_tail(tail)
            for name, value in patch.items():
                if value is None:
                    attributes.pop(name, None)
                else:
                    attributes[name] = value
            require_keyword_bytes(
                keyword_bytes(attributes),
                f"point {point_id.decode(errors='replace')!r}, once patched,",
                field="set",
            )
            tail = encode_tail(norm, attributes, payload, provenance)
            size_bytes += len(point_id) + len(tail) + vector.nbytes + OPERATION_BYTES
            if size_bytes > BATCH_BYTES_MAX:
                # At once: the rest may be a hundred times as much.
                raise _too_large(call, size_bytes, len(ids) + 1)
            ids.append(point_id)
            tails.append(tail)
            vectors.append(vector)
        return _Operations(
            ids=ids,
            tails=tails,
            vectors=vectors,
            blocks=[vector.reshape(1, -1) for vector in vectors],
        )

    def _row_of(self, point_id: bytes) -> tuple[Vector, bytes] | None:
        pending = self._pending.get(point_id)
        if pending is not None:
            if pending.vector is None or pending.tail is None:
                return None
            return pending.vector, pending.tail
        place = self._state.locate(point_id)
        if place is None:
            return None
        # It is about to be written again: a damaged vector would come out with a good checksum.
        place.check(point_id)
        return place.vector, place.tail

    def _delete(self, ids: Sequence[bytes]) -> _Operations:
        """Deletes the ids that exist; a delete of nothing needs no record."""
        return _Operations(ids=[point_id for point_id in ids if self._seq_of(point_id) != 0])


def _too_large(call: WriteCall, size_bytes: int, rows: int) -> InvalidRequest:
    is_patch = call.kind is WriteKind.PATCH
    why = "a patch writes vector and payload again, and " if is_patch else ""
    return InvalidRequest(
        f"{rows} points of shard {call.shard} make {size_bytes} bytes: {why}a shard writes a "
        f"request as one record; send fewer than {rows} points at a time",
        field="ids" if is_patch else "points",
        limit=f"{BATCH_BYTES_MAX} bytes for one shard",
    )


def _attributes_of(tail: bytes) -> Mapping[str, Any]:
    try:
        return decode_tail(tail)[1]
    except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"a row's tail does not decode: {error}", field="tails") from error
