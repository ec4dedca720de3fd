"""What the SDK cuts for a bulk upload fits one record of one shard, whatever the rows."""

from collections.abc import Callable

import numpy as np
import pytest

from shoal import Point, Provenance
from shoal.bulk import CHUNK_BYTES_MAX
from shoal.calls import Calls
from shoal_cluster.domain.ids import CollectionId
from shoal_cluster.domain.limits import DIMENSION_MAX, PAYLOAD_BYTES_MAX, POINT_ID_BYTES_MAX
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.edge.points import decode_upsert
from shoal_cluster.ingest.route import route_upsert
from shoal_cluster.ingest.validate import SOURCE_BYTES_MAX, Tails, check_batch, encode_tails

ATTRIBUTES_MAX = {f"a{i:063}": AttributeType.KEYWORD_LIST for i in range(64)}

_PAYLOAD_MAX = b'{"t":"%s"}' % (b"x" * (PAYLOAD_BYTES_MAX - 8))
_WORDS_OF_ONE_BYTE = {name: [chr(i) for i in range(128)] for name in ATTRIBUTES_MAX}
_LONG_WORDS = {name: [f"{i}" + "é" * 511 for i in range(4)] for name in list(ATTRIBUTES_MAX)[:62]}

ROWS: dict[str, tuple[int, int, Callable[[int], Point]]] = {
    "payloads of 17 kB": (500, 4, lambda i: _point(i, payload={"t": "x" * 17_000})),
    "largest payloads": (36, 4, lambda i: _point(i, payload=_PAYLOAD_MAX)),
    "many short keywords": (60, 4, lambda i: _point(i, attributes=_WORDS_OF_ONE_BYTE)),
    "long keywords": (36, 4, lambda i: _point(i, attributes=_LONG_WORDS)),
    "largest vectors": (500, DIMENSION_MAX, lambda i: _point(i, dimension=DIMENSION_MAX)),
    "everything": (
        20,
        DIMENSION_MAX,
        lambda i: _point(
            i,
            dimension=DIMENSION_MAX,
            payload=_PAYLOAD_MAX,
            attributes=_LONG_WORDS,
            provenance=Provenance(
                source_id="é" * (SOURCE_BYTES_MAX // 2), source_version="v" * SOURCE_BYTES_MAX
            ),
        ),
    ),
}
"""Rows to upload, their dimension, and how to make row i; together more than one record holds."""


def _point(number: int, *, dimension: int = 4, **fields: object) -> Point:
    wide = "é" * (POINT_ID_BYTES_MAX // 2 - 2)
    return Point(
        id=f"{number:04}{wide}",
        vector=np.ones(dimension, dtype=np.float32),
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ROWS)
def test_every_chunk_of_rows_within_the_limits_fits_one_record(kind: str) -> None:
    count, dimension, row = ROWS[kind]
    schema = CollectionSchema(
        id=CollectionId("c" * 32),
        name="docs",
        dimension=dimension,
        metric=Metric.L2,
        attributes=ATTRIBUTES_MAX,
    )
    upload = Calls().bulk_upsert(
        "docs", map(row, range(count)), model=None, batch_size=500, progress=None
    )
    rows = 0
    for message in upload.requests:
        request = decode_upsert(message)
        batch, tails = check_batch(request, schema), Tails()
        encode_tails(request, schema, batch, rows=range(len(batch.ids)), tails=tails)
        [part] = route_upsert(request, schema, batch, tails)
        written = len(part.call.body) + sum(map(len, part.call.tails))
        assert written <= CHUNK_BYTES_MAX
        rows += len(batch.ids)
    assert rows == count
