"""Turns queued requests into one batch of upserts and deletes: pure, against state plus the batch.

Here a request meets the order: deduplication, conditions, patches and deletes by filter are settled
now, so that what is written to the log are plain upserts and deletes whose replay cannot fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Conflict, InvalidRequest, Unavailable
from shoal_cluster.domain.ids import Epoch, Seq
from shoal_cluster.domain.point import Vector, Vectors, decode_tail, encode_tail
from shoal_cluster.filtering.expression import matches
from shoal_cluster.filtering.wire import from_wire
from shoal_cluster.shard.calls import WriteCall, WriteKind
from shoal_cluster.shard.dedup import Answer
from shoal_cluster.shard.rows import matching_ids
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

    def add(self, call: WriteCall) -> Answer:
        """Adds a request's operations and returns the answer it gets once the batch is durable.

        A request that was carried out before gets its first answer and adds nothing.

        Raises: InvalidRequest, Conflict (a condition failed on the state as far as it is known
        here), Unavailable, Indeterminate: the request adds nothing.
        """
        name = (call.client_id, call.request_no)
        earlier = self._answers.get(name) or self._state.dedup.find(*name)
        if earlier is not None:
            return earlier
        self._check(call)
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
        self._marks.append(RequestMark(*name, first, len(self._ids) - first, affected, more))
        self._answers[name] = answer
        return answer

    def _operations_of(self, call: WriteCall) -> tuple[int, bool]:
        if call.kind is WriteKind.UPSERT:
            return self._upsert(call), False
        if call.kind is WriteKind.PATCH:
            return self._patch(call), False
        if call.kind is WriteKind.DELETE:
            self._check_conditions(call)
            return self._delete(call.ids), False
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
        return self._delete(chosen), len(stored) > limit

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

    def _upsert(self, call: WriteCall) -> int:
        dimension = self._state.schema.dimension
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


def _attributes_of(tail: bytes) -> Mapping[str, Any]:
    try:
        return decode_tail(tail)[1]
    except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
        raise InvalidRequest(f"a row's tail does not decode: {error}", field="tails") from error
