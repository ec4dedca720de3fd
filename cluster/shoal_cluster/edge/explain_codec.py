"""Translates how a read was answered into the Explain message."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.query.execute import SearchedShard, SearchExplain
from shoal_protos.v1 import search_pb2 as pb


def fill_explain(message: pb.Explain, explain: SearchExplain) -> None:
    """Writes everything but the stages, of which encoding may be one."""
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
    fill_stages(message.stages, shard.explain.get("stages_us", {}))


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
    if segment.get("lists", 0) > 1:
        message.settings.add(name="probes", value=segment["probes"])
        message.settings.add(name="lists", value=segment["lists"])
    message.index = segment.get("index", "")
    message.expected_cost_us = segment.get("expected_cost_us", 0.0)


def fill_stages(stages: Any, stages_us: Mapping[str, float]) -> None:
    """Adds stages in their order."""
    for stage, duration_us in stages_us.items():
        stages.add(stage=stage, duration_us=max(0, round(duration_us)))
