"""Points on their way to the server: from objects or arrays to `Rows`, whole or in batches."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.arguments import SEQ_MAX, checked_count
from shoal.errors import InvalidRequest
from shoal.point import Point, Provenance
from shoal.vectors import Vectors, VectorsLike, to_vector, to_vectors
from shoal_protos.columns import ColumnError, encode_columns
from shoal_protos.v1 import points_pb2, types_pb2

Payload = Mapping[str, Any] | bytes | None
"""A JSON object, or the UTF-8 of one, or none."""

ROW_OVERHEAD_BYTES = 64
"""Allowance a row for lengths and tags when batches are cut by size."""

_VALUE_BYTES = 9
"""Of a number, or of a keyword's tag and length, as servers store them at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Points as parallel arrays: n ids, (n, dimension) vectors; the rest None or n long."""

    ids: Sequence[str]
    vectors: Vectors
    attributes: Sequence[Mapping[str, Any] | None] | None = None
    payloads: Sequence[bytes] | None = None
    provenance: Sequence[Provenance | None] | None = None

    def to_rows(self) -> types_pb2.Rows:
        """Raises: InvalidRequest for a value that cannot be sent."""
        return types_pb2.Rows(
            ids=self.ids,
            vectors=self.vectors.tobytes(),
            dimension=self.vectors.shape[1],
            attributes=columns_of(self.attributes or ()),
            payloads=self.payloads,
            provenance=None
            if self.provenance is None
            else [_provenance_to_proto(each) for each in self.provenance],
        )

    def part(self, start: int, stop: int) -> "Batch":
        """Returns rows start to stop, sharing memory with this batch."""
        return Batch(
            ids=self.ids[start:stop],
            vectors=self.vectors[start:stop],
            attributes=None if self.attributes is None else self.attributes[start:stop],
            payloads=None if self.payloads is None else self.payloads[start:stop],
            provenance=None if self.provenance is None else self.provenance[start:stop],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PointArrays:
    """Points as the user gives them by arrays: n ids, n vectors; the rest None or n long."""

    ids: Sequence[str]
    vectors: VectorsLike
    attributes: Sequence[Mapping[str, Any] | None] | None = None
    payloads: Sequence[Payload] | None = None
    provenance: Sequence[Provenance | None] | None = None


def points_or_arrays(
    points: Iterable[Point] | Point | None,
    *,
    ids: Sequence[str] | None,
    vectors: VectorsLike | None,
    attributes: Sequence[Mapping[str, Any] | None] | None,
    payloads: Sequence[Payload] | None,
    provenance: Sequence[Provenance | None] | None,
) -> Iterable[Point] | PointArrays:
    """Returns the one of the two that was given.

    Raises: InvalidRequest when both or neither were.
    """
    arrays = (ids, vectors, attributes, payloads, provenance)
    if points is not None:
        if any(array is not None for array in arrays):
            raise InvalidRequest("give points or arrays, not both", field="points")
        return [points] if isinstance(points, Point) else points
    if ids is None or vectors is None:
        raise InvalidRequest("give points, or both ids and vectors", field="points")
    return PointArrays(
        ids=ids, vectors=vectors, attributes=attributes, payloads=payloads, provenance=provenance
    )


def batch_of_points(points: Iterable[Point], *, first: int = 0) -> Batch:
    """Returns the points as arrays. first: the number of the first one, for error messages.

    Raises: InvalidRequest naming the point that has no vector or another dimension.
    """
    listed = list(points)
    for number, point in enumerate(listed, start=first):
        if not isinstance(point, Point):
            raise InvalidRequest(
                f"points[{number}] is a {type(point).__name__}, not a Point",
                field=f"points[{number}]",
            )
    if not listed:
        raise InvalidRequest("there are no points to write", field="points")
    with_payload = any(point.payload is not None for point in listed)
    with_provenance = any(point.provenance is not None for point in listed)
    return Batch(
        ids=checked_ids([point.id for point in listed]),
        vectors=_stack(listed, first),
        attributes=[point.attributes for point in listed],
        payloads=[
            payload_to_json(point.payload, field=f"points[{number}].payload")
            for number, point in enumerate(listed, start=first)
        ]
        if with_payload
        else None,
        provenance=[point.provenance for point in listed] if with_provenance else None,
    )


def batch_of_arrays(arrays: PointArrays) -> Batch:
    """Raises: InvalidRequest naming the array whose length or shape does not fit."""
    return _batch_of_slice(*_checked_arrays(arrays), slice(None))


def batches_of_arrays(arrays: PointArrays, *, batch_size: int, bytes_max: int) -> Iterator[Batch]:
    """Yields the rows in order; payloads become JSON one batch at a time."""
    checked, vectors = _checked_arrays(arrays)
    for start in range(0, len(checked.ids), batch_size):
        batch = _batch_of_slice(checked, vectors, slice(start, start + batch_size))
        yield from split(batch, batch_size=batch_size, bytes_max=bytes_max)


def _checked_arrays(arrays: PointArrays) -> tuple[PointArrays, Vectors]:
    ids = checked_ids(arrays.ids)
    vectors = to_vectors(arrays.vectors, field="vectors")
    optional = {
        "vectors": vectors,
        "attributes": arrays.attributes,
        "payloads": arrays.payloads,
        "provenance": arrays.provenance,
    }
    for name, array in optional.items():
        if array is not None and len(array) != len(ids):
            raise InvalidRequest(f"{name} has {len(array)} rows for {len(ids)} ids", field=name)
    return dataclasses.replace(arrays, ids=ids), vectors


def _batch_of_slice(arrays: PointArrays, vectors: Vectors, rows: slice) -> Batch:
    first = rows.start or 0
    payloads = None
    if arrays.payloads is not None:
        payloads = [
            payload_to_json(payload, field=f"payloads[{number}]")
            for number, payload in enumerate(arrays.payloads[rows], start=first)
        ]
    return Batch(
        ids=arrays.ids[rows],
        vectors=vectors[rows],
        attributes=None if arrays.attributes is None else arrays.attributes[rows],
        payloads=payloads,
        provenance=None if arrays.provenance is None else arrays.provenance[rows],
    )


def batches_of_points(
    points: Iterable[Point], *, batch_size: int, bytes_max: int
) -> Iterator[Batch]:
    """Yields the points in order, reading the iterable no further ahead than one batch."""
    remaining = iter(points)
    first = 0
    while chunk := list(itertools.islice(remaining, batch_size)):
        batch = batch_of_points(chunk, first=first)
        yield from split(batch, batch_size=batch_size, bytes_max=bytes_max)
        first += len(chunk)


def split(batch: Batch, *, batch_size: int, bytes_max: int) -> Iterator[Batch]:
    """Yields the batch in parts of at most `batch_size` rows and about `bytes_max` bytes.

    A single row above `bytes_max` is a part of its own; the server judges it.
    """
    vector_bytes = batch.vectors.shape[1] * batch.vectors.itemsize
    start = 0
    size = 0
    for row, point_id in enumerate(batch.ids):
        row_bytes = vector_bytes + _text_bytes(point_id) + ROW_OVERHEAD_BYTES
        if batch.payloads is not None:
            row_bytes += len(batch.payloads[row])
        if batch.attributes is not None:
            row_bytes += _attribute_bytes(batch.attributes[row])
        if batch.provenance is not None:
            row_bytes += _provenance_bytes(batch.provenance[row])
        if row > start and (row - start >= batch_size or size + row_bytes > bytes_max):
            yield batch.part(start, row)
            start, size = row, 0
        size += row_bytes
    yield batch.part(start, len(batch.ids))


def _text_bytes(text: str) -> int:
    # What cannot be encoded is refused, naming it, when the batch is.
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def _attribute_bytes(attributes: Mapping[str, Any] | None) -> int:
    """Returns the most that a row's attributes take in a request and at the server."""
    if not isinstance(attributes, Mapping):
        return 0  # none, or what is refused when the batch is encoded
    size_bytes = 0
    for name, value in attributes.items():
        size_bytes += len(str(name)) + 2 * _VALUE_BYTES
        if isinstance(value, str):
            size_bytes += _text_bytes(value)
        elif isinstance(value, list | tuple):
            size_bytes += sum(
                _VALUE_BYTES + _text_bytes(word) for word in value if isinstance(word, str)
            )
    return size_bytes


def _provenance_bytes(provenance: Provenance | None) -> int:
    if provenance is None:
        return 0
    texts = (provenance.source_id, provenance.source_version)
    return 4 * _VALUE_BYTES + sum(map(_text_bytes, texts))


def payload_to_json(payload: Payload, *, field: str) -> bytes:
    """Returns the payload's UTF-8, b"" for None; bytes are sent as they are.

    Raises: InvalidRequest when it is no mapping or holds what JSON cannot (NaN included).
    """
    if payload is None:
        return b""
    if isinstance(payload, bytes):
        return payload
    if not isinstance(payload, Mapping):
        raise InvalidRequest(
            f"{field} is a {type(payload).__name__}; it must be a JSON object (a mapping)",
            field=field,
        )
    try:
        text = json.dumps(dict(payload), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field} is not JSON: {error}", field=field) from error


def columns_of(
    attributes: Sequence[Mapping[str, Any] | None],
) -> list[types_pb2.AttributeColumn]:
    """Raises: InvalidRequest naming attribute and row."""
    try:
        return encode_columns(attributes)
    except ColumnError as error:
        raise InvalidRequest(str(error), field=f"attributes.{error.attribute}") from error


def conditions_of(
    count: int, *, if_absent: bool, if_seq: Sequence[int | None] | None
) -> list[points_pb2.UpsertCondition]:
    """Returns one condition a row, or none at all.

    Raises: InvalidRequest when both kinds are asked for or the numbers do not fit.
    """
    if if_absent and if_seq is not None:
        raise InvalidRequest("if_absent and if_seq exclude each other", field="if_seq")
    if if_absent:
        return [points_pb2.UpsertCondition(if_absent=True)] * count
    if if_seq is None:
        return []
    if len(if_seq) != count:
        raise InvalidRequest(f"if_seq has {len(if_seq)} values for {count} points", field="if_seq")
    return [
        points_pb2.UpsertCondition()
        if seq is None
        else points_pb2.UpsertCondition(
            if_seq=checked_count(seq, field=f"if_seq[{number}]", least=0, most=SEQ_MAX)
        )
        for number, seq in enumerate(if_seq)
    ]


def checked_ids(ids: Sequence[str]) -> list[str]:
    """Returns the ids as a list. Their length and uniqueness are the server's to judge."""
    listed = [ids] if isinstance(ids, str) else list(ids)
    for number, point_id in enumerate(listed):
        if not isinstance(point_id, str):
            raise InvalidRequest(
                f"ids[{number}] is a {type(point_id).__name__}; an id is a str",
                field=f"ids[{number}]",
            )
    return listed


def _stack(points: Sequence[Point], first: int) -> Vectors:
    try:
        return to_vectors([point.vector for point in points], field="points")  # type: ignore[misc]
    except InvalidRequest:
        # Only now look for the point to blame: the loop costs more than the conversion.
        dimension: int | None = None
        for number, point in enumerate(points, start=first):
            field = f"points[{number}].vector"
            if point.vector is None:
                raise InvalidRequest(
                    f"point {point.id!r} has no vector; use patch_attributes to change attributes "
                    "alone",
                    field=field,
                ) from None
            vector = to_vector(point.vector, field=field)
            dimension = dimension or len(vector)
            if len(vector) != dimension:
                raise InvalidRequest(
                    f"{field} has {len(vector)} values, points[{first}].vector has {dimension}",
                    field=field,
                    limit=f"{dimension} values",
                ) from None
        raise


def _provenance_to_proto(provenance: Provenance | None) -> types_pb2.Provenance:
    if provenance is None:
        return types_pb2.Provenance()
    return types_pb2.Provenance(
        source_id=provenance.source_id,
        source_version=provenance.source_version,
        source_changed_at_ms=provenance.source_changed_at_ms,
        embedded_at_ms=provenance.embedded_at_ms,
    )
