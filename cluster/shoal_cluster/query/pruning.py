"""Chooses the shards a filter can reach. Pure; the first of the three levels that prune."""

from dataclasses import dataclass

from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.partition import shard_of_value
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.filtering.expression import Expression, pinned_values
from shoal_cluster.filtering.literals import show

_VALUES_SHOWN_MAX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedShard:
    shard: ShardNumber
    reason: str


def reachable_shards(
    schema: CollectionSchema, filter: Expression | None
) -> tuple[tuple[ShardNumber, ...], tuple[PrunedShard, ...]]:
    """Returns the shards that can hold a matching row, ascending, and the others with a reason.

    filter: validated, or None for every row. Invariant Q-3: a row that matches lives on one of the
    returned shards.
    """
    everywhere = tuple(map(ShardNumber, range(schema.shards)))
    if filter is None or schema.partition_by is None:
        return everywhere, ()
    values = pinned_values(filter, schema.partition_by)
    if values is None:
        return everywhere, ()
    reached = {shard_of_value(value, schema.shards) for value in values}
    if len(reached) == schema.shards:
        return everywhere, ()
    if values:
        shown = ", ".join(show(value) for value in sorted(values)[:_VALUES_SHOWN_MAX])
        rest = (
            ""
            if len(values) <= _VALUES_SHOWN_MAX
            else f" and {len(values) - _VALUES_SHOWN_MAX} more"
        )
        where = ", ".join(str(shard) for shard in sorted(reached)[:_VALUES_SHOWN_MAX])
        dots = "" if len(reached) <= _VALUES_SHOWN_MAX else ", …"
        reason = f"the filter pins {schema.partition_by} to {shown}{rest}: shard {where}{dots}"
    else:
        reason = f"no value of {schema.partition_by} satisfies the filter"
    pruned = tuple(
        PrunedShard(shard=shard, reason=reason) for shard in everywhere if shard not in reached
    )
    return tuple(sorted(reached)), pruned
