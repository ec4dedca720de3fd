"""Turns a search's result into a serialised SearchResponse."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Position
from shoal_cluster.edge.explain_codec import fill_explain, fill_stages
from shoal_cluster.edge.rows_codec import fill_rows, scores_of
from shoal_cluster.edge.schema_codec import fill_token, whole_ms
from shoal_cluster.query.execute import MICROSECONDS, SearchExplain, SearchResult
from shoal_protos.v1 import search_pb2 as pb
from shoal_protos.v1 import types_pb2

TOKENS_MAX: Final = 64
"""Serialised positions kept: between writes, every answer of a collection has the same."""


class SearchEncoder:
    """For one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tokens: dict[tuple[Any, ...], bytes] = {}

    def finish_of(
        self, *, with_payload: bool, explain: bool, began_s: float
    ) -> Callable[[SearchResult], bytes]:
        """Returns what makes the answer. began_s: when the request began to be decoded."""
        if not explain:
            return self._with_payload if with_payload else self._without_payload
        decode_us = (self._clock.monotonic_s() - began_s) * MICROSECONDS

        def finish(result: SearchResult) -> bytes:
            started_s = self._clock.monotonic_s()
            encoded = self._encode(result, with_payload=with_payload)
            assert result.explain is not None, "it was asked for"
            encode_us = (self._clock.monotonic_s() - started_s) * MICROSECONDS
            return encoded + _explain(result.explain, decode_us, encode_us)

        return finish

    def _with_payload(self, result: SearchResult) -> bytes:
        return self._encode(result, with_payload=True)

    def _without_payload(self, result: SearchResult) -> bytes:
        return self._encode(result, with_payload=False)

    def _encode(self, result: SearchResult, *, with_payload: bool) -> bytes:
        hits, schema = result.hits, result.schema
        scores = scores_of(hits.keys, schema.metric)
        response = pb.SearchResponse(staleness_ms=whole_ms(result.staleness_ms))
        if hits.tails is None and hits.vectors is None:
            start = 0
            for count in hits.counts:
                end = start + count
                # In one call: a third of the time of filling the fields one after the other.
                response.results.add(
                    scores=scores[start:end],
                    # Protobuf takes UTF-8 bytes for strings, so ids need no decoding here.
                    rows=types_pb2.Rows(ids=hits.ids[start:end], seqs=hits.seqs[start:end]),  # type: ignore[arg-type]
                )
                start = end
        else:
            _fill_results(response, result, scores, with_payload=with_payload)
        # Messages laid end to end are their union: the encoding of protobuf is defined so.
        return response.SerializeToString() + self._token(schema, result.as_of)

    def _token(self, schema: CollectionSchema, as_of: Mapping[ShardNumber, Position]) -> bytes:
        key = (schema.id, *as_of.items())
        known = self._tokens.get(key)
        if known is None:
            response = pb.SearchResponse()
            fill_token(response.as_of, schema, as_of)
            if len(self._tokens) >= TOKENS_MAX:
                del self._tokens[next(iter(self._tokens))]
            known = self._tokens[key] = response.SerializeToString()
        return known


def _fill_results(
    response: pb.SearchResponse, result: SearchResult, scores: list[float], *, with_payload: bool
) -> None:
    hits = result.hits
    start = 0
    for count in hits.counts:
        end = start + count
        of_query = response.results.add()
        of_query.scores.extend(scores[start:end])
        fill_rows(
            of_query.rows,
            result.schema,
            ids=hits.ids[start:end],
            seqs=hits.seqs[start:end],
            tails=None if hits.tails is None else hits.tails[start:end],
            vectors=None if hits.vectors is None else hits.vectors[start:end],
            with_payload=with_payload,
        )
        start = end


def _explain(explain: SearchExplain, decode_us: float, encode_us: float) -> bytes:
    response = pb.SearchResponse()
    fill_explain(response.explain, explain)
    stages_us = {"decode": decode_us, **explain.stages_us, "encode": encode_us}
    fill_stages(response.explain.stages, stages_us)
    return response.SerializeToString()
