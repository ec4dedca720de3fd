"""Tells how a read of explore.py was answered, in the form of a search's explanation."""

from collections.abc import Sequence

from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.query.execute import SearchedShard, SearchExplain
from shoal_cluster.query.pruning import PrunedShard
from shoal_cluster.query.replica_reads import ShardAnswer
from shoal_cluster.query.scatter import Reading, Reply


def explained(
    reading: Reading,
    shards: Sequence[ShardNumber],
    answers: Sequence[ShardAnswer[Reply]],
    pruned: Sequence[PrunedShard],
    *,
    recall_target: float = 1.0,
) -> SearchExplain:
    """shards, answers: parallel; the round that explain is about. recall_target: 1 when exact."""
    return SearchExplain(
        recall_target=recall_target,
        searched=tuple(
            SearchedShard(
                shard=shard,
                server=answer.server,
                primary=answer.primary,
                reason=answer.reason,
                position=answer.reply.as_of.position,
                explain=answer.reply.explain or {},
            )
            for shard, answer in zip(shards, answers, strict=True)
        ),
        pruned=tuple(pruned),
        stages_us=reading.stages_us or {},
    )
