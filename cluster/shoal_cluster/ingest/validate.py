"""Checks writes and turns them into rows as shards store them. Pure; second step of a write.

Nothing that passes here may be refused later, because a shard applies a record without asking: so
every limit is checked before a shard is touched, and an error names the point and the limit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.limits import BATCH_POINTS_MAX, PAYLOAD_BYTES_MAX, POINT_ID_BYTES_MAX
from shoal_cluster.domain.point import NO_PROVENANCE, Provenance, Vectors, encode_tail
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import AttributeValue, CollectionSchema, EmbeddingModel
from shoal_cluster.domain.vectors import (
    Norms,
    as_stored,
    prepare_vectors,
    require_dimension,
    require_model,
)
from shoal_cluster.filtering.attributes import validate_attributes
from shoal_cluster.filtering.expression import Expression

SOURCE_BYTES_MAX = 1024
"""For source_id and source_version: room for a URL or a content hash, as for a keyword."""

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class UpsertRequest:
    """Points to write, as parallel arrays; an empty optional one means: none for every point.

    vectors: (n, dimension) float32 as the caller gave them. payloads: UTF-8 JSON objects, b"" for
    none. if_absent: refuse when any id exists. if_seqs: refuse unless each id has this seq (0: does
    not exist). again: an earlier attempt may have been applied; the same in all requests.
    """

    collection: str
    name: RequestName
    ids: Sequence[str]
    vectors: Vectors
    attributes: Sequence[Mapping[str, object]] = ()
    payloads: Sequence[bytes] = ()
    provenance: Sequence[Provenance] = ()
    if_absent: bool = False
    if_seqs: Sequence[int] | None = None
    model: EmbeddingModel | None = None
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRequest:
    """Attributes to set, one map per id, and names to remove from all of them beforehand."""

    collection: str
    name: RequestName
    ids: Sequence[str]
    attributes: Sequence[Mapping[str, object]]
    remove: Sequence[str] = ()
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteRequest:
    collection: str
    name: RequestName
    ids: Sequence[str]
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteWhereRequest:
    collection: str
    name: RequestName
    filter: Expression
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What of an upsert is checked as a whole: ids in UTF-8, vectors as stored, their norms."""

    ids: list[bytes]
    vectors: Vectors
    norms: Norms


@dataclass(slots=True, kw_only=True)
class Tails:
    """Tails of the rows encoded so far, and the values that choose their shards (if any do)."""

    encoded: list[bytes] = field(default_factory=list)
    partition_values: list[str] = field(default_factory=list)


def check_batch(
    request: UpsertRequest, schema: CollectionSchema, *, points_max: int = BATCH_POINTS_MAX
) -> Batch:
    """Checks sizes, ids and vectors of an upsert; vectorised over the block of vectors.

    Raises: InvalidRequest naming the field, e.g. `points[3].vector`, and the limit (nothing was
    applied).
    """
    require_model(request.model, schema.model, schema.name)
    count = len(request.ids)
    if not 1 <= count <= points_max:
        raise InvalidRequest(
            f"the batch holds {count} points",
            field="points",
            limit=f"1 to {points_max} points",
        )
    _require_parallel(request, count)
    ids = encode_ids(request.ids, field="points[{}].id", ids_max=points_max)
    require_dimension(request.vectors, schema.dimension, schema.name, field="points[0].vector")
    vectors, norms = prepare_vectors(request.vectors, schema.metric, field=_vector_field)
    stored = as_stored(vectors, schema.storage, field=_vector_field)
    return Batch(ids=ids, vectors=stored, norms=norms)


def encode_tails(
    request: UpsertRequest,
    schema: CollectionSchema,
    batch: Batch,
    *,
    rows: range,
    tails: Tails,
) -> None:
    """Checks and encodes attributes, payload and provenance of `rows`, and appends them to `tails`.

    In slices, so that a large batch does not hold up the searches of the same event loop.

    Raises: InvalidRequest naming the field, e.g. `points[3].payload`, and the limit.
    """
    partition_by = schema.partition_by
    for i in rows:
        attributes: Mapping[str, AttributeValue] = {}
        if request.attributes and request.attributes[i]:
            attributes = validate_attributes(
                request.attributes[i], schema.attributes, field=f"points[{i}].attributes"
            )
        if partition_by is not None:
            value = attributes.get(partition_by)
            if not isinstance(value, str):
                raise InvalidRequest(
                    f"the point has no {partition_by!r}, which chooses the shard in "
                    f"{schema.name!r}",
                    field=f"points[{i}].attributes.{partition_by}",
                )
            tails.partition_values.append(value)
        payload = request.payloads[i] if request.payloads else b""
        if payload:
            _check_payload(payload, f"points[{i}].payload")
        provenance = request.provenance[i] if request.provenance else NO_PROVENANCE
        if provenance is not NO_PROVENANCE:
            _check_provenance(provenance, f"points[{i}].provenance")
        tails.encoded.append(encode_tail(float(batch.norms[i]), attributes, payload, provenance))


def check_patch(request: PatchRequest, schema: CollectionSchema) -> list[dict[str, Any]]:
    """Returns one map of attributes to set per id; None removes.

    The partition attribute cannot be patched: the point would have to move to another shard, and
    a patch has neither its vector nor its payload. Upsert the point instead.

    Raises: InvalidRequest naming the field.
    """
    if len(request.attributes) != len(request.ids):
        raise InvalidRequest(
            f"{len(request.attributes)} maps of attributes for {len(request.ids)} ids", field="set"
        )
    removed = dict.fromkeys(request.remove)
    for name in removed:
        if name not in schema.attributes:
            declared = ", ".join(schema.attributes) or "none"
            raise InvalidRequest(
                f"attribute {name[:80]!r} is not declared; declared are: {declared}",
                field="remove",
            )
    patches = []
    for i, attributes in enumerate(request.attributes):
        if schema.partition_by is not None and (
            schema.partition_by in attributes or schema.partition_by in removed
        ):
            raise InvalidRequest(
                f"{schema.partition_by!r} chooses the shard in {schema.name!r} and cannot be "
                "patched; upsert the point again with its vector",
                field=f"points[{i}].attributes.{schema.partition_by}",
            )
        checked = validate_attributes(
            attributes, schema.attributes, field=f"points[{i}].attributes"
        )
        patches.append({**removed, **checked})
    if not any(patches):
        raise InvalidRequest("the patch neither sets nor removes an attribute", field="set")
    return patches


def encode_ids(
    ids: Sequence[str], *, field: str = "ids[{}]", ids_max: int = BATCH_POINTS_MAX
) -> list[bytes]:
    """Returns the ids in UTF-8.

    field: where id i stands in the request, with `{}` for i.

    Raises: InvalidRequest naming the first id that is empty, too long, or there twice.
    """
    if not 1 <= len(ids) <= ids_max:
        raise InvalidRequest(
            f"the request names {len(ids)} ids", field="ids", limit=f"1 to {ids_max} ids"
        )
    try:
        encoded = [point_id.encode() for point_id in ids]
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the id {error.object[:80]!a} is not Unicode text",
            field=field.format(list(ids).index(error.object)),
        ) from error
    sizes = list(map(len, encoded))
    if len(set(encoded)) < len(encoded) or not 1 <= min(sizes) <= max(sizes) <= POINT_ID_BYTES_MAX:
        raise _bad_id(encoded, field)
    return encoded


def _bad_id(ids: Sequence[bytes], field: str) -> InvalidRequest:
    first: dict[bytes, int] = {}
    for i, point_id in enumerate(ids):
        if not 1 <= len(point_id) <= POINT_ID_BYTES_MAX:
            return InvalidRequest(
                f"the id has {len(point_id)} bytes",
                field=field.format(i),
                limit=f"1 to {POINT_ID_BYTES_MAX} bytes",
            )
        if point_id in first:
            return InvalidRequest(
                f"the id {point_id.decode()!r} is there twice, first at {first[point_id]}; which "
                "of the two to keep is not defined",
                field=field.format(i),
                limit="distinct ids in one request",
            )
        first[point_id] = i
    raise AssertionError("called for ids that are all good")


def _require_parallel(request: UpsertRequest, count: int) -> None:
    lengths = {
        "vectors": (len(request.vectors), False),
        "attributes": (len(request.attributes), True),
        "payloads": (len(request.payloads), True),
        "provenance": (len(request.provenance), True),
        "conditions": (count if request.if_seqs is None else len(request.if_seqs), False),
    }
    for name, (length, optional) in lengths.items():
        if length != count and not (optional and length == 0):
            raise InvalidRequest(f"{length} {name} for {count} ids", field=name)


def _vector_field(row: int) -> str:
    return f"points[{row}].vector"


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# Numbers stay text: a payload is only checked, and converting 200,000 digits takes seconds.
_JSON = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def _check_payload(payload: bytes, field: str) -> None:
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise InvalidRequest(
            f"the payload has {len(payload)} bytes; keep large documents elsewhere and store "
            "where they are",
            field=field,
            limit=f"{PAYLOAD_BYTES_MAX} bytes",
        )
    try:
        document = _JSON.decode(payload.decode())
    except (ValueError, RecursionError) as error:
        # Both UnicodeDecodeError and JSONDecodeError are ValueErrors and say where.
        raise InvalidRequest(f"the payload is not JSON in UTF-8: {error}", field=field) from error
    if not isinstance(document, dict):
        raise InvalidRequest('the payload is not a JSON object; wrap it: {"value": …}', field=field)


def _check_provenance(provenance: Provenance, field: str) -> None:
    for name in ("source_id", "source_version"):
        size_bytes = len(getattr(provenance, name).encode())
        if size_bytes > SOURCE_BYTES_MAX:
            raise InvalidRequest(
                f"{name} has {size_bytes} bytes",
                field=f"{field}.{name}",
                limit=f"{SOURCE_BYTES_MAX} bytes",
            )
    for name in ("source_changed_at_ms", "embedded_at_ms"):
        value = getattr(provenance, name)
        if not INT64_MIN <= value <= INT64_MAX:
            raise InvalidRequest(
                f"{name} is out of range", field=f"{field}.{name}", limit="signed 64-bit integer"
            )
