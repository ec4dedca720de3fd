"""Turns a serialised SearchRequest into what the query path takes: vectors apart from all else.

An application's searches differ in their vectors and little else. So the vectors are cut out of the
message's bytes, and what is left is decoded once: it is the key under which its template is found
again (query/prepared.py).
"""

from typing import Final, NamedTuple, cast

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.point import Vectors
from shoal_cluster.edge.filter_codec import decode_filter
from shoal_cluster.edge.rows_codec import decode_vectors
from shoal_cluster.edge.schema_codec import decode_freshness, decode_model
from shoal_cluster.query.plan import SearchRequest
from shoal_cluster.query.prepared import SearchTemplate
from shoal_protos.v1 import search_pb2 as pb

TEMPLATES_MAX: Final = 1024
"""Kept at a time; the oldest goes first. A client that writes between its searches makes a new one
each time, by its session token."""

KEY_BYTES_MAX: Final = 4096
"""Requests with more than that besides their vectors, long filters, are decoded each time."""

_COLLECTION_TAG: Final = 0x0A
_VECTORS_TAG: Final = 0x12
"""Fields 1 and 2 of SearchRequest, of bytes; serialisers write fields in the order of numbers."""
_VARINT_MORE: Final = 0x80


class AskedSearch(NamedTuple):
    """vectors: (n, dimension) float32 as the caller gave them, None in a search by ids.

    began_s: monotonic, when decoding began; for explain.
    """

    template: SearchTemplate
    vectors: Vectors | None
    began_s: float


class SearchDecoder:
    """For one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._templates: dict[bytes, tuple[SearchTemplate, int]] = {}

    def decode(self, raw: bytes | memoryview) -> AskedSearch:
        """Checks the form only, the rest is query/plan.py's.

        Raises: DecodeError when the bytes are no message; InvalidRequest naming the field.
        """
        began_s = self._clock.monotonic_s()
        place = _vectors_in(raw)
        if place is None or len(raw) - (place[1] - place[0]) > KEY_BYTES_MAX:
            # Protobuf reads any buffer, though it says bytes.
            return _asked(pb.SearchRequest.FromString(cast(bytes, raw)), began_s)
        start, end = place
        key = b"".join((raw[:start], raw[end:]))
        known = self._templates.get(key)
        if known is None:
            # Before the vectors are the collection, and their own tag and length.
            message = pb.SearchRequest.FromString(b"".join((raw[: 2 + raw[1]], raw[end:])))
            if message.vectors or message.ids:
                return _asked(pb.SearchRequest.FromString(cast(bytes, raw)), began_s)
            known = SearchTemplate(_request_of(message)), message.dimension
            if len(self._templates) >= TEMPLATES_MAX:
                del self._templates[next(iter(self._templates))]
            self._templates[key] = known
        template, dimension = known
        vectors = decode_vectors(raw[start:end], dimension, field="vectors")
        return AskedSearch(template, vectors, began_s)


def _asked(message: pb.SearchRequest, began_s: float) -> AskedSearch:
    vectors = None
    if message.vectors:
        vectors = decode_vectors(message.vectors, message.dimension, field="vectors")
    return AskedSearch(SearchTemplate(_request_of(message)), vectors, began_s)


def _request_of(message: pb.SearchRequest) -> SearchRequest:
    return SearchRequest(
        collection=message.collection,
        k=message.k,
        ids=tuple(point_id.encode() for point_id in message.ids),
        filter=decode_filter(message.filter) if message.HasField("filter") else None,
        exact=message.exact,
        recall_target=message.recall_target if message.HasField("recall_target") else None,
        max_cost_ms=message.max_cost_ms if message.HasField("max_cost_ms") else None,
        freshness=decode_freshness(message.consistency, message.session),
        with_payload=message.with_payload,
        with_vector=message.with_vector,
        explain=message.explain,
        model=decode_model(message.model) if message.HasField("model") else None,
    )


def _vectors_in(raw: bytes | memoryview) -> tuple[int, int] | None:
    """Returns where the vectors' bytes are, None in a message that does not begin as usual."""
    size = len(raw)
    if size < 2 or raw[0] != _COLLECTION_TAG or raw[1] >= _VARINT_MORE:
        return None
    at = 2 + raw[1]
    if at >= size or raw[at] != _VECTORS_TAG:
        return None
    length = shift = 0
    while (at := at + 1) < size:
        byte = raw[at]
        length |= (byte & ~_VARINT_MORE) << shift
        if byte < _VARINT_MORE:
            start = at + 1
            # An empty field is no vectors, and is decoded with the rest.
            return (start, start + length) if 0 < length <= size - start else None
        shift += 7
        if shift > 28:
            return None
    return None
