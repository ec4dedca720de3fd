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
from shoal.vectors import Vector, from_wire
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


SearchReply = (
    search_pb2.SearchResponse
    | search_pb2.RecommendResponse
    | search_pb2.SearchDiverseResponse
    | search_pb2.SearchGroupsResponse
    | search_pb2.SearchRangeResponse
)
"""The messages that hits come in; all say as of when, and how they were found."""


class SearchResult:
    """The hits of one query, best first; equal scores by id.

    `ids` and `scores` are cheap; `hits` decodes everything, once. as_of, staleness_ms and explain
    are those of the whole request, so the results of one batch share them. explain is the
    `Explain` message of shoal.v1, None unless asked for.
    """

    def __init__(self, found: search_pb2.QueryHits, response: SearchReply) -> None:
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
        rows = _RowColumns(self._found.rows)
        if len(self._found.scores) != len(rows.ids):
            raise Internal(
                f"the server sent {len(self._found.scores)} scores for {len(rows.ids)} ids"
            )
        return [
            Hit(
                id=point_id,
                score=score,
                seq=seq,
                attributes=attributes,
                payload=payload,
                vector=vector,
                provenance=provenance,
            )
            for point_id, score, seq, attributes, payload, vector, provenance in zip(
                rows.ids,
                self._found.scores,
                rows.seqs,
                rows.attributes,
                rows.payloads,
                rows.vectors,
                rows.provenance,
                strict=True,
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
    """One page of a scroll. cursor: where the next page starts, None after the last one.

    explain: of an ordered scroll, the `Explain` message of shoal.v1 if it was asked for.
    """

    cursor: bytes | None
    explain: search_pb2.Explain | None = None


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


def page_read(response: points_pb2.ScrollResponse | points_pb2.ScrollOrderedResponse) -> Page:
    explain = None
    if isinstance(response, points_pb2.ScrollOrderedResponse) and response.HasField("explain"):
        explain = response.explain
    return Page(
        points=points_of(response.rows),
        as_of=token_from_proto(response.as_of),
        staleness_ms=response.staleness_ms,
        cursor=response.next_cursor or None,
        explain=explain,
    )


def points_of(rows: types_pb2.Rows) -> list[Point]:
    """Returns the rows as points; what was not sent is empty or None."""
    columns = _RowColumns(rows)
    return [
        Point(
            id=point_id,
            vector=vector,
            attributes=attributes,
            payload=payload,
            provenance=provenance,
            seq=seq,
        )
        for point_id, vector, attributes, payload, provenance, seq in zip(
            columns.ids,
            columns.vectors,
            columns.attributes,
            columns.payloads,
            columns.provenance,
            columns.seqs,
            strict=True,
        )
    ]


class _RowColumns:
    """The arrays of a `Rows` message as lists of one element a row, made once for all rows.

    Reading a repeated field element by element costs a call into protobuf each time.
    Raises: Corrupt when a payload is not a JSON object, Internal when arrays contradict each other.
    """

    def __init__(self, rows: types_pb2.Rows) -> None:
        self.ids = list(rows.ids)
        count = len(self.ids)
        self.seqs = list(rows.seqs) or [0] * count
        self.vectors: Sequence[Vector | None] = [None] * count
        try:
            self.attributes = decode_columns(rows.attributes, count)
            if rows.vectors:
                self.vectors = list(from_wire(rows.vectors, rows.dimension, count))
        except ValueError as error:
            raise Internal(f"the server sent rows that contradict themselves: {error}") from error
        self.payloads: Sequence[Mapping[str, Any] | None] = [None] * count
        if rows.payloads:
            self.payloads = list(map(_payload_of, rows.payloads, self.ids))
        self.provenance: Sequence[Provenance | None] = [None] * count
        if rows.provenance:
            self.provenance = list(map(_provenance_of, rows.provenance))
        lengths = {len(self.seqs), len(self.payloads), len(self.provenance)}
        if lengths != {count}:
            raise Internal(f"the server sent arrays of {sorted(lengths)} rows for {count} ids")


def _payload_of(text: bytes, point_id: str) -> Mapping[str, Any] | None:
    if not text:
        return None
    try:
        payload = json.loads(text)
    except ValueError as error:
        raise Corrupt(f"the payload of point {point_id!r} is not JSON: {error}") from error
    if not isinstance(payload, dict):
        raise Corrupt(f"the payload of point {point_id!r} is not a JSON object")
    return payload


def _provenance_of(message: types_pb2.Provenance) -> Provenance | None:
    if not message.ByteSize():
        return None
    return Provenance(
        source_id=message.source_id,
        source_version=message.source_version,
        source_changed_at_ms=message.source_changed_at_ms,
        embedded_at_ms=message.embedded_at_ms,
    )
