"""Turns queued requests into one batch of upserts and deletes: pure, against state plus the batch.

Here a request meets the order: deduplication, conditions, patches and deletes by filter are settled
now, so that what is written to the log are plain upserts and deletes whose replay cannot fail.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Conflict, InvalidRequest
from shoal_cluster.domain.ids import Epoch, Seq
from shoal_cluster.domain.point import Vector, Vectors, decode_tail, encode_tail
from shoal_cluster.filtering.expression import from_wire, matches
from shoal_cluster.shard.calls import WriteCall, WriteKind
from shoal_cluster.shard.dedup import Answer
from shoal_cluster.shard.search import matching_ids
from shoal_cluster.shard.state import ShardState
from shoal_cluster.wal.record import OperationBatch, RequestMark


@dataclass(slots=True)
class _Pending:
    """What the batch so far has made of an id; vector and tail None: deleted."""

    seq: int
    vector: Vector | None
    tail: bytes | None


class Composition:
    """A batch under construction. The state must not change while it is being composed."""

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

    @property
    def operations(self) -> int:
        return len(self._ids)

    def batch(self) -> OperationBatch:
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

    def add(self, call: WriteCall) -> Answer:
        """Adds a request's operations and returns the answer it gets once the batch is durable.

        A request that was carried out before gets its first answer and adds nothing.

        Raises: InvalidRequest, Conflict, Indeterminate: the request adds nothing.
        """
        name = (call.client_id, call.request_no)
        earlier = self._answers.get(name) or self._state.dedup.find(*name)
        if earlier is not None:
            return earlier
        first = len(self._ids)
        affected, more = self._operations_of(call)
        first_seq = Seq(self._state.seq + 1 + first)
        answer = Answer(
            epoch=self._epoch,
            last_seq=Seq(self._state.seq + len(self._ids)),
            first_seq=first_seq,
            affected=affected,
            more=more,
        )
        self._marks.append(
            RequestMark(*name, first, len(self._ids) - first, affected, more)
        )
        self._answers[name] = answer
        return answer

    def _operations_of(self, call: WriteCall) -> tuple[int, bool]:
        if call.kind is WriteKind.UPSERT:
            return self._upsert(call), False
        if call.kind is WriteKind.PATCH:
            return self._patch(call), False
        if call.kind is WriteKind.DELETE:
            return self._delete(call.ids), False
        expression = from_wire(call.filter)
        limit = limits.DELETE_BY_FILTER_MAX
        candidates = matching_ids(self._state.snapshot(), expression, limit + 1)
        chosen = [
            point_id
            for point_id in candidates[:limit]
            if (pending := self._pending.get(point_id)) is None
            or (pending.tail is not None and matches(expression, decode_tail(pending.tail)[1]))
        ]
        chosen += [
            point_id
            for point_id, pending in self._pending.items()
            if pending.tail is not None
            and point_id not in set(chosen)
            and matches(expression, decode_tail(pending.tail)[1])
        ]
        return self._delete(chosen), len(candidates) > limit

    def _upsert(self, call: WriteCall) -> int:
        dimension = self._state.schema.dimension
        if len(call.body) != len(call.ids) * dimension * 4 or len(call.tails) != len(call.ids):
            raise InvalidRequest(
                f"{len(call.ids)} ids came with {len(call.tails)} rows and {len(call.body)} bytes of "
                f"vectors",
                field="vectors",
                limit=f"{dimension} float32 a point",
            )
        self._check_conditions(call)
        vectors = np.frombuffer(call.body, dtype=np.float32).reshape(len(call.ids), dimension)
        first_seq = self._state.seq + 1 + len(self._ids)
        for offset, (point_id, tail) in enumerate(zip(call.ids, call.tails, strict=True)):
            self._pending[point_id] = _Pending(first_seq + offset, vectors[offset], tail)
        self._ids.extend(call.ids)
        self._upserts.extend(b"\x01" * len(call.ids))
        self._vectors.append(vectors)
        self._tails.extend(call.tails)
        return len(call.ids)

    def _push(self, point_id: bytes, vector: Vector | None, tail: bytes | None) -> None:
        seq = self._state.seq + 1 + len(self._ids)
        self._pending[point_id] = _Pending(seq, vector, tail)

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
                    f"point {point_id.decode()!r} should be {wanted} but is {found}; nothing of the "
                    "request was applied to this shard",
                    field=f"points[{index}].if_seq" if call.if_seqs else "if_absent",
                )

    def _seq_of(self, point_id: bytes) -> int:
        pending = self._pending.get(point_id)
        if pending is not None:
            return 0 if pending.tail is None else pending.seq
        place = self._state.locate(point_id)
        return 0 if place is None else place.seq

    def _patch(self, call: WriteCall) -> int:
        patched = 0
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
            tail = encode_tail(norm, attributes, payload, provenance)
            self._push(point_id, vector, tail)
            self._ids.append(point_id)
            self._upserts.append(1)
            self._vectors.append(vector.reshape(1, -1))
            self._tails.append(tail)
            patched += 1
        return patched

    def _row_of(self, point_id: bytes) -> tuple[Any, bytes] | None:
        pending = self._pending.get(point_id)
        if pending is not None:
            return None if pending.tail is None else (pending.vector, pending.tail)
        place = self._state.locate(point_id)
        return None if place is None else (place.vector, place.tail)

    def _delete(self, ids: Sequence[bytes]) -> int:
        """Deletes the ids that exist; a delete of nothing needs no record."""
        deleted = 0
        for point_id in ids:
            if self._seq_of(point_id) == 0:
                continue
            self._push(point_id, None, None)
            self._ids.append(point_id)
            self._upserts.append(0)
            deleted += 1
        return deleted
