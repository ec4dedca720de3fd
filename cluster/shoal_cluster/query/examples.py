"""Vectors to search by that are given, or are those of stored points."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal_cluster.domain.errors import InvalidRequest, NotFound
from shoal_cluster.domain.limits import POINT_ID_BYTES_MAX
from shoal_cluster.domain.point import Vector, Vectors
from shoal_cluster.domain.vectors import prepare_vectors
from shoal_cluster.query.plan import Freshness
from shoal_cluster.query.scatter import Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One of the two. vector: as the caller gave it. id: UTF-8. field: names it in an error."""

    vector: Vector | None = None
    id: bytes | None = None
    field: str


async def example_vectors(
    reading: Reading, examples: Sequence[Example], freshness: Freshness
) -> Vectors:
    """Returns (n, dimension) float32 as the index wants them: unit length under cosine.

    Raises: InvalidRequest naming the example; NotFound naming an id that does not exist; what a
    read by id raises.
    """
    schema = reading.schema
    for example in examples:
        _check(example, schema.dimension, schema.name)
    vectors = np.empty((len(examples), schema.dimension), np.float32)
    given = [i for i, example in enumerate(examples) if example.vector is not None]
    if given:
        vectors[given] = [examples[i].vector for i in given]
        prepared, _ = prepare_vectors(
            vectors[given], schema.metric, field=lambda row: examples[given[row]].field
        )
        vectors[given] = prepared
    stored = [(i, example.id) for i, example in enumerate(examples) if example.id is not None]
    if stored:
        began_s = reading.scatter.clock.monotonic_s()
        found = await reading.scatter.rows.get(
            schema.name,
            list(dict.fromkeys(point_id for _, point_id in stored)),
            with_vector=True,
            with_payload=False,
            freshness=freshness,
            timeout_s=reading.remaining_s(),
        )
        assert found.vectors is not None, "asked for"
        position = {point_id: i for i, point_id in enumerate(found.ids)}
        for i, point_id in stored:
            if point_id not in position:
                raise NotFound(
                    f"point {point_id.decode()!r} does not exist in {schema.name!r}",
                    field=examples[i].field,
                )
            vectors[i] = found.vectors[position[point_id]]
        reading.note("get", began_s)
    return vectors


def excluded_ids(examples: Sequence[Example]) -> frozenset[bytes]:
    """Returns the stored points among the examples, which are no hits of their own search."""
    return frozenset(example.id for example in examples if example.id is not None)


def _check(example: Example, dimension: int, collection: str) -> None:
    if example.vector is None and example.id is None:
        raise InvalidRequest("neither a vector nor an id is given", field=example.field)
    if example.vector is not None and len(example.vector) != dimension:
        raise InvalidRequest(
            f"the vector has {len(example.vector)} values, collection {collection!r} has "
            f"dimension {dimension}",
            field=example.field,
            limit=f"dimension {dimension}",
        )
    if example.id is not None and not 1 <= len(example.id) <= POINT_ID_BYTES_MAX:
        raise InvalidRequest(
            f"the id has {len(example.id)} bytes",
            field=example.field,
            limit=f"1 to {POINT_ID_BYTES_MAX} bytes",
        )
