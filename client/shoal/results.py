"""What reads and writes return. Parallel arrays of a reply become objects only when looked at."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import Corrupt, Internal
from shoal.point import Point, Provenance
from shoal.session import SessionToken, token_from_proto
from shoal.vectors import Vector, Vectors, from_wire
from shoal_protos.columns import AttributeValue, decode_columns
from shoal_protos.v1 import points_pb2, search_pb2, types_pb2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hit:
    """One point a search found.

    score: cosine similarity, dot product or Euclidean distance, by the collection's metric.
    attributes, payload and provenance are empty or None unless `with_payload`, vector is None
    unless `with_vector`. seq: sequence number of this version in its shard's order.
    """

    id: str
    score: float
    seq: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    payload: Mapping[str, Any] | None = None
    vector: Vector | None = None
    provenance: Provenance | None = None


class SearchResult:
    """The hits of one query, best first; equal scores by id.

    `ids` and `scores` are cheap; `hits` decodes everything, once. as_of, staleness_ms and explain
    are those of the whole request, so the results of one batch share them. explain is the
    `Explain` message of shoal.v1, None unless asked for.
    """

    def __init__(self, found: search_pb2.QueryHits, response: search_pb2.SearchResponse) -> None:
        self._found = found
        self._response = response

    @property
    def ids(self) -> list[str]:
        return list(self._found.rows.ids)

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        return np.array(self._found.scores, dtype=np.float32)

    @functools.cached_property
    def hits(self) -> list[Hit]:
        columns = _RowColumns(self._found.rows)
        return [
            Hit(
                id=point_id,
                score=score,
                seq=columns.seq(row),
                attributes=columns.attributes[row],
                payload=columns.payload(row),
                vector=columns.vector(row),
                provenance=columns.provenance(row),
            )
            for row, (point_id, score) in enumerate(
                zip(self._found.rows.ids, self._found.scores, strict=True)
            )
        ]

    @functools.cached_property
    def as_of(self) -> SessionToken:
        return token_from_proto(self._response.as_of)

    @property
    def staleness_ms(self) -> int:
        return self._response.staleness_ms

    @property
    def explain(self) -> search_pb2.Explain | None:
        return self._response.explain if self._response.HasField("explain") else None

    def __len__(self) -> int:
        return len(self._found.scores)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __repr__(self) -> str:
        return f"<SearchResult of {len(self)} hits: {self.ids[:3]}>"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PointsRead:
    """Points that were found; ids that do not exist are left out. Iterates over the points."""

    points: Sequence[Point]
    as_of: SessionToken
    staleness_ms: int

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def by_id(self) -> dict[str, Point]:
        return {point.id: point for point in self.points}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Page(PointsRead):
    """One page of a scroll. cursor: where the next page starts, None after the last one."""

    cursor: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UpsertResult:
    """seqs: the sequence number of each point. session: positions that see the write."""

    seqs: Sequence[int]
    session: SessionToken


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteResult:
    """deleted: how many points there were to delete. session: positions that see the write."""

    deleted: int
    session: SessionToken


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchResult:
    """missing_ids: ids that do not exist. session: positions that see the write."""

    missing_ids: Sequence[str]
    session: SessionToken


def points_read(response: points_pb2.GetResponse) -> PointsRead:
    return PointsRead(
        points=points_of(response.rows),
        as_of=token_from_proto(response.as_of),
        staleness_ms=response.staleness_ms,
    )


def page_read(response: points_pb2.ScrollResponse) -> Page:
    return Page(
        points=points_of(response.rows),
        as_of=token_from_proto(response.as_of),
        staleness_ms=response.staleness_ms,
        cursor=response.next_cursor or None,
    )


def points_of(rows: types_pb2.Rows) -> list[Point]:
    """Raises: Corrupt when a payload is not a JSON object."""
    columns = _RowColumns(rows)
    return [
        Point(
            id=point_id,
            vector=columns.vector(row),
            attributes=columns.attributes[row],
            payload=columns.payload(row),
            provenance=columns.provenance(row),
            seq=columns.seq(row),
        )
        for row, point_id in enumerate(rows.ids)
    ]


class _RowColumns:
    """The arrays of a `Rows` message by row; an array that was not sent gives None."""

    def __init__(self, rows: types_pb2.Rows) -> None:
        count = len(rows.ids)
        self._rows = rows
        self._vectors: Vectors | None = None
        try:
            self.attributes = decode_columns(rows.attributes, count)
            if rows.vectors:
                self._vectors = from_wire(rows.vectors, rows.dimension, count)
        except ValueError as error:
            raise Internal(f"the server sent rows that contradict themselves: {error}") from error

    def seq(self, row: int) -> int:
        return self._rows.seqs[row] if self._rows.seqs else 0

    def vector(self, row: int) -> Vector | None:
        return None if self._vectors is None else self._vectors[row]

    def payload(self, row: int) -> Mapping[str, Any] | None:
        if not self._rows.payloads or not (text := self._rows.payloads[row]):
            return None
        try:
            payload = json.loads(text)
        except ValueError as error:
            raise Corrupt(
                f"the payload of point {self._rows.ids[row]!r} is not JSON: {error}"
            ) from error
        if not isinstance(payload, dict):
            raise Corrupt(f"the payload of point {self._rows.ids[row]!r} is not a JSON object")
        return payload

    def provenance(self, row: int) -> Provenance | None:
        if not self._rows.provenance:
            return None
        message = self._rows.provenance[row]
        if not message.ByteSize():
            return None
        return Provenance(
            source_id=message.source_id,
            source_version=message.source_version,
            source_changed_at_ms=message.source_changed_at_ms,
            embedded_at_ms=message.embedded_at_ms,
        )
