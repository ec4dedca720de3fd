"""Searches are decoded apart from their vectors, and to the same as protobuf says."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.edge.search_decoder import TEMPLATES_MAX, SearchDecoder, _asked
from shoal_protos.v1 import search_pb2 as pb
from shoal_protos.v1 import types_pb2

DIMENSION = 3
VECTORS = np.arange(6, dtype=np.float32)
TOKEN = types_pb2.SessionToken(
    collection_id="c" * 32,
    positions=[types_pb2.ShardPosition(shard=1, epoch=2, seq=300)],
)
FILTER = types_pb2.Filter(
    comparison=types_pb2.Comparison(
        attribute="color",
        op=types_pb2.COMPARISON_OP_EQ,
        value=types_pb2.FilterValue(keyword="red"),
    )
)


def a_decoder() -> SearchDecoder:
    return SearchDecoder(SystemClock())


def a_message(**changes: object) -> pb.SearchRequest:
    fields: dict[str, object] = {
        "collection": "docs",
        "vectors": VECTORS.tobytes(),
        "dimension": DIMENSION,
        "k": 10,
        "consistency": types_pb2.CONSISTENCY_SESSION,
    }
    return pb.SearchRequest(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [
        a_message(),
        a_message(session=TOKEN, with_payload=True, exact=True, recall_target=0.9, explain=True),
        a_message(filter=FILTER, with_vector=True),
        a_message(consistency=types_pb2.CONSISTENCY_STRONG),
        a_message(model=types_pb2.EmbeddingModel(name="m", version="1")),
        a_message(collection=""),
        a_message(collection="d" * 127),
        a_message(collection="d" * 128),
        a_message(collection="d" * 300),
        a_message(vectors=b""),
        a_message(vectors=b"", ids=["a", "b"]),
        a_message(ids=["a", "b"]),
        a_message(vectors=np.zeros(3 * 50_000, np.float32).tobytes()),
        a_message(
            filter=types_pb2.Filter(
                member_of=types_pb2.Membership(
                    attribute="color",
                    values=[types_pb2.FilterValue(keyword="x" * 99) for _ in range(50)],
                )
            )
        ),
    ],
)
def test_bytes_decode_to_what_the_message_says(message: pb.SearchRequest) -> None:
    decoder = a_decoder()
    raw = message.SerializeToString()
    said = _asked(message, 0.0)
    for _ in range(2):  # the second time from memory
        asked = decoder.decode(memoryview(raw))
        assert asked.template.request == said.template.request
        if said.vectors is None:
            assert asked.vectors is None
        else:
            assert asked.vectors is not None
            np.testing.assert_array_equal(asked.vectors, said.vectors)


def test_searches_that_differ_in_vectors_only_share_a_template() -> None:
    decoder = a_decoder()
    first = decoder.decode(a_message().SerializeToString())
    other = decoder.decode(a_message(vectors=(VECTORS + 1).tobytes()).SerializeToString())
    assert other.template is first.template
    assert other.vectors is not None
    np.testing.assert_array_equal(other.vectors, (VECTORS + 1).reshape(2, 3))
    for different in (
        a_message(k=11),
        a_message(vectors=VECTORS[:3].tobytes()),
        a_message(collection="dogs"),
        a_message(session=TOKEN),
    ):
        assert decoder.decode(different.SerializeToString()).template is not first.template


def test_templates_are_bounded_and_the_oldest_goes_first() -> None:
    decoder = a_decoder()
    first = decoder.decode(a_message(k=1).SerializeToString())
    second = decoder.decode(a_message(k=2).SerializeToString())
    for k in range(3, TEMPLATES_MAX + 2):
        decoder.decode(a_message(k=k).SerializeToString())
    assert len(decoder._templates) == TEMPLATES_MAX
    again = decoder.decode(a_message(k=2).SerializeToString())
    assert again.template is second.template
    assert decoder.decode(a_message(k=1).SerializeToString()).template is not first.template


def test_vectors_given_twice_are_what_protobuf_makes_of_them() -> None:
    raw = a_message().SerializeToString()
    raw += pb.SearchRequest(vectors=(VECTORS + 1).tobytes()).SerializeToString()
    asked = a_decoder().decode(raw)
    assert asked.vectors is not None
    np.testing.assert_array_equal(asked.vectors, (VECTORS + 1).reshape(2, 3))


def test_fields_in_another_order_are_read_all_the_same() -> None:
    raw = pb.SearchRequest(k=10, dimension=DIMENSION).SerializeToString()
    raw += pb.SearchRequest(vectors=VECTORS.tobytes()).SerializeToString()
    raw += pb.SearchRequest(collection="docs").SerializeToString()
    asked = a_decoder().decode(raw)
    assert (asked.template.request.collection, asked.template.request.k) == ("docs", 10)
    assert asked.vectors is not None and asked.vectors.shape == (2, 3)


def test_bytes_cut_anywhere_are_refused_or_read_as_protobuf_does() -> None:
    raw = a_message(session=TOKEN).SerializeToString()
    for size in range(len(raw)):
        decoder = a_decoder()
        try:
            said = _asked(pb.SearchRequest.FromString(raw[:size]), 0.0)
        except (DecodeError, InvalidRequest) as error:
            with pytest.raises(type(error)):
                decoder.decode(raw[:size])
        else:
            assert decoder.decode(raw[:size]).template.request == said.template.request


def test_bytes_that_are_no_whole_vectors_are_refused_by_name() -> None:
    decoder = a_decoder()
    for wrong in (a_message(vectors=b"1234567"), a_message(dimension=0), a_message(dimension=4)):
        for _ in range(2):
            with pytest.raises(InvalidRequest) as caught:
                decoder.decode(wrong.SerializeToString())
            assert caught.value.field in ("vectors", "dimension")
