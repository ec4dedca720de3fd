"""The Search service: translates, delegates, translates back. First and last step of a search."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from shoal_cluster.domain.clock import Clock, SystemClock
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.edge.filter_codec import decode_filter
from shoal_cluster.edge.guard import Context, timeout_s
from shoal_cluster.edge.ports import Searching
from shoal_cluster.edge.rows_codec import decode_vectors, fill_rows, scores_of
from shoal_cluster.edge.schema_codec import decode_freshness, decode_model, fill_token, whole_ms
from shoal_cluster.query.execute import (
    MICROSECONDS,
    SearchedShard,
    SearchExplain,
    SearchResult,
)
from shoal_cluster.query.plan import SearchRequest
from shoal_protos.v1 import search_pb2 as pb
from shoal_protos.v1.search_pb2_grpc import SearchServicer


class SearchService(SearchServicer):
    def __init__(self, searching: Searching, clock: Clock | None = None) -> None:
        self._searching = searching
        self._clock = clock or SystemClock()

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:  # noqa: N802
        started_s = self._clock.monotonic_s()
        decoded = decode_search(request)
        decoded_s = self._clock.monotonic_s()
        result = await self._searching.search(decoded, timeout_s=timeout_s(context))
        found_s = self._clock.monotonic_s()
        response = encode_result(result, with_payload=request.with_payload)
        if result.explain is not None:
            encoded_s = self._clock.monotonic_s()
            stages_us = {
                "decode": (decoded_s - started_s) * MICROSECONDS,
                **result.explain.stages_us,
                "encode": (encoded_s - found_s) * MICROSECONDS,
            }
            _fill_stages(response.explain.stages, stages_us)
        return response


def decode_search(message: pb.SearchRequest) -> SearchRequest:
    """Returns the request; only its form is checked here, the rest by query/plan.py."""
    queries = None
    if message.vectors:
        queries = decode_vectors(message.vectors, message.dimension, field="vectors")
    return SearchRequest(
        collection=message.collection,
        k=message.k,
        queries=queries,
        ids=tuple(point_id.encode() for point_id in message.ids),
        filter=decode_filter(message.filter) if message.HasField("filter") else None,
        exact=message.exact,
        recall_target=message.recall_target if message.HasField("recall_target") else None,
        freshness=decode_freshness(message.consistency, message.session),
        with_payload=message.with_payload,
        with_vector=message.with_vector,
        explain=message.explain,
        model=decode_model(message.model) if message.HasField("model") else None,
    )


def encode_result(result: SearchResult, *, with_payload: bool) -> pb.SearchResponse:
    """Returns the answer as a message, without the stages of explain: this is one of them."""
    response = pb.SearchResponse(staleness_ms=whole_ms(result.staleness_ms))
    fill_token(response.as_of, result.schema, result.as_of)
    hits = result.hits
    scores = scores_of(hits.keys, result.schema.metric)
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
    if result.explain is not None:
        _fill_explain(response.explain, result.explain)
    return response


def _fill_explain(message: pb.Explain, explain: SearchExplain) -> None:
    message.recall_target = explain.recall_target
    for shard in explain.searched:
        _fill_shard(message.shards.add(), shard)
    for pruned in explain.pruned:
        message.shards.add(shard=pruned.shard, searched=False, reason=pruned.reason)
    message.shards.sort(key=_shard_number)
    promised = [
        segment.expected_recall
        for shard in message.shards
        for segment in shard.segments
        if segment.searched
    ]
    message.expected_recall = min(promised, default=1.0)


def _shard_number(message: pb.ShardExplain) -> ShardNumber:
    return ShardNumber(message.shard)


def _fill_shard(message: pb.ShardExplain, shard: SearchedShard) -> None:
    """Translates the map that shard/search.py explains itself with."""
    message.shard = shard.shard
    message.searched = True
    message.reason = shard.reason
    message.server = shard.server
    message.primary = shard.primary
    message.as_of.shard = shard.shard
    message.as_of.epoch, message.as_of.seq = shard.position
    for segment in shard.explain.get("segments", ()):
        _fill_segment(message.segments.add(), segment)
    memtable_rows = shard.explain.get("memtable_rows")
    if memtable_rows is not None:
        message.segments.add(
            segment="memtable",
            searched=True,
            reason="rows that are not indexed yet are compared one by one",
            plan="exact",
            expected_recall=1.0,
            rows=memtable_rows,
            rows_passing=memtable_rows,
            rows_scanned=memtable_rows,
        )
    _fill_stages(message.stages, shard.explain.get("stages_us", {}))


def _fill_segment(message: pb.SegmentExplain, segment: Mapping[str, Any]) -> None:
    message.segment = segment["segment"]
    message.searched = not segment.get("pruned", False)
    message.reason = segment.get("reason") or ""
    message.rows = segment.get("live", segment.get("rows", 0))
    if not message.searched:
        return
    family = segment.get("family")
    plan = str(segment.get("plan", ""))
    message.plan = f"{family}: {plan}" if family else plan
    message.expected_recall = segment.get("expected_recall", 0.0)
    message.rows_passing = segment.get("rows_passing", 0)
    message.rows_scanned = segment.get("rows_scanned", 0)
    message.rows_rescored = segment.get("rows_rescored", 0)
    factor = segment.get("rescore_factor")
    if factor is not None and np.isfinite(factor):
        message.settings.add(name="rescore_factor", value=factor)


def _fill_stages(stages: Any, stages_us: Mapping[str, float]) -> None:
    for stage, duration_us in stages_us.items():
        stages.add(stage=stage, duration_us=max(0, round(duration_us)))
