"""Finds groups of rows that share an attribute's value, and the best rows of given groups.

Both are searches of search.py on one snapshot. Thread-safe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal_cluster.domain.limits import GROUP_ROUNDS_MAX, SEARCH_K_MAX
from shoal_cluster.domain.point import Vectors, decode_tail
from shoal_cluster.domain.schema import Metric
from shoal_cluster.filtering.expression import (
    And,
    Comparison,
    Exists,
    Expression,
    In,
    Not,
    Operator,
)
from shoal_cluster.filtering.literals import Scalar
from shoal_cluster.index.distances import Keys
from shoal_cluster.shard import search
from shoal_cluster.shard.rows import Place, tails_of
from shoal_cluster.shard.search import SearchOrder, ShardHits
from shoal_cluster.shard.state import Snapshot

_ROUND_HITS_PER_GROUP = 4
_ROUND_HITS_MIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOrder:
    """What to look for. query: (1, dimension). excluded: a point that is no hit."""

    query: Vectors
    group_by: str
    filter: Expression | None
    exact: bool
    recall_target: float
    excluded: bytes | None = None
    explain: bool = False

    def search(self, k: int, *conditions: Expression, explain: bool = False) -> SearchOrder:
        """Returns a search for the k nearest rows that satisfy filter and conditions."""
        parts = conditions if self.filter is None else (self.filter, *conditions)
        return SearchOrder(
            queries=self.query,
            k=k,
            filter=And(parts),
            exact=self.exact,
            recall_target=self.recall_target,
            explain=explain,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundGroups:
    """best: (key, id) of each group's best hit by its value, in ascending order.

    bounded: rounds ran out. explain: of the first round.
    """

    best: dict[Scalar, tuple[float, bytes]]
    bounded: bool
    explain: dict[str, Any] = field(default_factory=dict)


def find_groups(
    snapshot: Snapshot,
    order: GroupOrder,
    groups: int,
    metric: Metric,
    *,
    rounds_max: int = GROUP_ROUNDS_MAX,
) -> FoundGroups:
    """Returns the `groups` groups whose best hits are nearest; rows without a value have none.

    Each round searches the rows of no group found so far, so it finds the next groups in order, or
    that there are no more. Rounds grow, because one large group may fill several.
    """
    best: dict[Scalar, tuple[float, bytes]] = {}
    explain: dict[str, Any] = {}
    k = min(max(_ROUND_HITS_PER_GROUP * groups, _ROUND_HITS_MIN), SEARCH_K_MAX)
    for number in range(rounds_max):
        conditions: list[Expression] = [Exists(order.group_by)]
        if best:
            conditions.append(Not(In(order.group_by, tuple(best))))
        asked = order.search(k, *conditions, explain=order.explain and number == 0)
        hits = search.execute(search.bind(snapshot, asked), metric)
        if number == 0:
            explain = hits.explain
        tails = tails_of(snapshot, hits.places)
        for key, point_id, tail in zip(hits.keys.tolist(), hits.ids, tails, strict=True):
            if point_id == order.excluded:
                continue
            value = decode_tail(tail)[1][order.group_by]
            assert not isinstance(value, list), "keyword lists do not group"
            best.setdefault(value, (key, point_id))
            if len(best) == groups:
                return FoundGroups(best=best, bounded=False, explain=explain)
        if len(hits.ids) < k:
            return FoundGroups(best=best, bounded=False, explain=explain)
        k = min(2 * k, SEARCH_K_MAX)
    return FoundGroups(best=best, bounded=True, explain=explain)


def group_hits(
    snapshot: Snapshot, order: GroupOrder, values: Sequence[Scalar], size: int, metric: Metric
) -> ShardHits:
    """Returns the `size` best hits of each group; values stand in the place of queries."""
    counts: list[int] = []
    keys: list[Keys] = [np.empty(0, dtype=np.float32)]
    ids: list[bytes] = []
    seqs: list[int] = []
    places: list[Place] = []
    for value in values:
        k = size if order.excluded is None else size + 1
        asked = order.search(k, Comparison(order.group_by, Operator.EQ, value))
        hits = search.execute(search.bind(snapshot, asked), metric)
        kept = [i for i, point_id in enumerate(hits.ids) if point_id != order.excluded][:size]
        counts.append(len(kept))
        keys.append(hits.keys[kept])
        ids.extend(hits.ids[i] for i in kept)
        seqs.extend(hits.seqs[i] for i in kept)
        places.extend(hits.places[i] for i in kept)
    return ShardHits(
        counts=counts,
        ids=ids,
        keys=np.concatenate(keys),
        seqs=seqs,
        places=places,
    )
