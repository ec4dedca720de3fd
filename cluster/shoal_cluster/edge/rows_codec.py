"""Translates rows between protobuf's columns and the domain's rows.

On the way out nothing is decoded that was not asked for: ids, sequence numbers and vectors pass
through as they came from the shard.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import ATTRIBUTES_MAX, DIMENSION_MAX
from shoal_cluster.domain.point import NO_PROVENANCE, Provenance, Tail, Vectors, decode_tail
from shoal_cluster.domain.schema import (
    AttributeType,
    AttributeValue,
    CollectionSchema,
    Metric,
)
from shoal_protos.v1 import types_pb2 as pb

COLUMNS_MAX = 6 * ATTRIBUTES_MAX
"""A batch may hold one column of each type per attribute."""


def decode_vectors(raw: bytes | memoryview, dimension: int, *, field: str) -> Vectors:
    """Returns the vectors of a request as (n, dimension) float32, without copying them.

    Raises: InvalidRequest when the bytes are not whole vectors.
    """
    if not raw:
        return np.empty((0, max(dimension, 1)), np.float32)
    if not 1 <= dimension <= DIMENSION_MAX:
        raise InvalidRequest(
            f"dimension {dimension} is out of range",
            field="dimension",
            limit=f"1 to {DIMENSION_MAX}",
        )
    if len(raw) % (4 * dimension):
        raise InvalidRequest(
            f"{len(raw)} bytes are not whole vectors of {dimension} float32",
            field=field,
            limit=f"a multiple of {4 * dimension} bytes",
        )
    return np.frombuffer(raw, np.dtype("<f4")).reshape(-1, dimension)


def decode_attributes(columns: Sequence[pb.AttributeColumn], count: int) -> list[dict[str, object]]:
    """Returns one map per row of a batch; () columns give empty maps.

    Raises: InvalidRequest when a column does not fit the batch, naming the column.
    """
    maps: list[dict[str, object]] = [{} for _ in range(count)]
    if len(columns) > COLUMNS_MAX:
        raise InvalidRequest(
            f"{len(columns)} columns of attributes", field="attributes", limit=f"{COLUMNS_MAX}"
        )
    for column in columns:
        field = f"attributes.{column.name[:80]}"
        values = _column_values(column, field)
        rows: Sequence[int] = column.rows or range(count)
        if len(values) != len(rows):
            raise InvalidRequest(
                f"the column has {len(values)} values for {len(rows)} rows", field=field
            )
        for row, value in zip(rows, values, strict=True):
            if row >= count:
                raise InvalidRequest(f"row {row} of a batch of {count}", field=field)
            if column.name in maps[row]:
                raise InvalidRequest(f"two values for row {row}", field=field)
            maps[row][column.name] = value
    return maps


def decode_provenance(messages: Iterable[pb.Provenance]) -> list[Provenance]:
    return [
        Provenance(
            source_id=message.source_id,
            source_version=message.source_version,
            source_changed_at_ms=message.source_changed_at_ms,
            embedded_at_ms=message.embedded_at_ms,
        )
        for message in messages
    ]


def scores_of(keys: npt.NDArray[np.float32], metric: Metric) -> list[float]:
    """Returns what users see of keys: similarity, dot product, or Euclidean distance."""
    if metric is Metric.L2:
        # Rounding can leave the squared distance of two equal vectors just below 0.
        distances: list[float] = np.sqrt(np.maximum(keys, 0)).tolist()
        return distances
    negated: list[float] = (-keys).tolist()
    return negated


def fill_rows(
    rows: pb.Rows,
    schema: CollectionSchema,
    *,
    ids: Sequence[bytes],
    seqs: Sequence[int],
    tails: Sequence[Tail] | None,
    vectors: Vectors | None,
    with_payload: bool,
) -> None:
    """Writes rows into a message. All parallel; tails and vectors as shards keep them.

    tails may be there although no payload was asked for: they hold the lengths that vectors of a
    cosine collection are given back with.
    """
    # Protobuf takes UTF-8 bytes for strings, so ids need no decoding here.
    rows.ids.extend(ids)  # type: ignore[arg-type]
    rows.seqs.extend(seqs)
    decoded: Sequence[tuple[Any, ...]] = ()
    if tails is not None and (with_payload or vectors is not None):
        decoded = [decode_tail(tail) for tail in tails]
    if vectors is not None:
        if schema.metric is Metric.COSINE and len(vectors):
            norms = np.array([tail[0] for tail in decoded], np.float64)
            if (norms != 1).any():
                vectors = (vectors * norms[:, np.newaxis]).astype(np.float32)
        rows.vectors = vectors.tobytes()
        rows.dimension = schema.dimension
    if with_payload and decoded:
        _fill_attributes(rows, schema, [tail[1] for tail in decoded])
        if any(tail[2] for tail in decoded):
            rows.payloads.extend(tail[2] for tail in decoded)
        if any(tail[3] is not NO_PROVENANCE for tail in decoded):
            for tail in decoded:
                _fill_provenance(rows.provenance.add(), tail[3])


def _fill_provenance(message: pb.Provenance, provenance: Provenance) -> None:
    message.source_id = provenance.source_id
    message.source_version = provenance.source_version
    message.source_changed_at_ms = provenance.source_changed_at_ms
    message.embedded_at_ms = provenance.embedded_at_ms


def _fill_attributes(
    rows: pb.Rows, schema: CollectionSchema, maps: Sequence[dict[str, AttributeValue]]
) -> None:
    for name, kind in schema.attributes.items():
        present = [i for i, attributes in enumerate(maps) if name in attributes]
        if not present:
            continue
        column = rows.attributes.add(name=name)
        if len(present) < len(maps):
            column.rows.extend(present)
        values: list[Any] = [maps[i][name] for i in present]
        match kind:
            case AttributeType.KEYWORD:
                column.keyword.values.extend(values)
            case AttributeType.KEYWORD_LIST:
                column.keyword_list.lengths.extend(map(len, values))
                column.keyword_list.values.extend(word for words in values for word in words)
            case AttributeType.INT:
                column.int.values.extend(values)
            case AttributeType.FLOAT:
                column.float.values.extend(values)
            case AttributeType.BOOL:
                column.bool.values.extend(values)
            case AttributeType.TIMESTAMP:
                column.timestamp.values_ms.extend(values)


def _column_values(column: pb.AttributeColumn, field: str) -> Sequence[object]:
    match column.WhichOneof("values"):
        case "keyword":
            return column.keyword.values
        case "keyword_list":
            return _split(column.keyword_list, field)
        case "int":
            return column.int.values
        case "float":
            return column.float.values
        case "bool":
            return column.bool.values
        case "timestamp":
            return column.timestamp.values_ms
        case _:
            raise InvalidRequest("the column holds no values", field=field)


def _split(column: pb.KeywordListValues, field: str) -> list[list[str]]:
    words = list(column.values)
    if sum(column.lengths) != len(words):
        raise InvalidRequest(
            f"the lengths add up to {sum(column.lengths)}, there are {len(words)} keywords",
            field=field,
        )
    lists = []
    start = 0
    for length in column.lengths:
        lists.append(words[start : start + length])
        start += length
    return lists
