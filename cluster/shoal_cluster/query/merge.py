"""Merges the hits of shards into one top k per query. Pure; last step of the search path.

Hits stay parallel arrays all the way: nothing here makes a Python object per hit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.point import Vectors
from shoal_cluster.shard.calls import SearchReply


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """Hits of all queries laid end to end; query i owns the next counts[i] of them.

    keys: float32, ascending within a query (smaller is better), ties by id. ids: UTF-8. tails:
    domain/point.py tails, or None. vectors: (hits, dimension) float32 as stored, or None. All
    parallel.
    """

    counts: Sequence[int]
    ids: Sequence[bytes]
    keys: npt.NDArray[np.float32]
    seqs: Sequence[int]
    tails: Sequence[bytes] | None = None
    vectors: Vectors | None = None


def hits_of(reply: SearchReply, body: memoryview, *, dimension: int, with_vector: bool) -> Hits:
    """Returns a shard's reply as arrays, without copying keys or vectors."""
    vectors = None
    if with_vector:
        vectors = np.frombuffer(body, np.float32).reshape(len(reply.ids), dimension)
    return Hits(
        counts=reply.counts,
        ids=reply.ids,
        keys=np.frombuffer(reply.keys, np.float32),
        seqs=reply.seqs,
        tails=reply.tails,
        vectors=vectors,
    )


def no_hits(queries: int) -> Hits:
    """Returns the answer of a search that no shard had to be asked for."""
    return Hits(counts=[0] * queries, ids=(), keys=np.empty(0, np.float32), seqs=())


def merge_top_k(
    per_shard: Sequence[Hits], k: int, *, excluded: Sequence[bytes] | None = None
) -> Hits:
    """Returns the k best hits of each query over all shards.

    per_shard: for the same queries, at least one; ascending by (key, id) within a query. excluded:
    one id per query that it must not find. Ties break by id, so the result does not depend on the
    order of the shards. An id that two shards return (a point on its way to another partition)
    counts once, with its better key. O(hits log hits).

    Invariant Q-2: every returned hit came from one of `per_shard`, and no better one was left out.
    """
    if len(per_shard) == 1 and excluded is None:
        return per_shard[0]  # a shard never returns more than k, nor an id twice
    queries = len(per_shard[0].counts)
    counts = np.array([hits.counts for hits in per_shard], np.int64)
    owner = np.concatenate([np.repeat(np.arange(queries), of_shard) for of_shard in counts])
    keys = np.concatenate([hits.keys for hits in per_shard])
    ids = _joined([hits.ids for hits in per_shard])
    order = np.lexsort((keys, owner)).tolist()
    _break_ties(order, keys, owner, ids)
    chosen, chosen_counts = _first_k(order, owner.tolist(), ids, k, queries, excluded)
    tails = None
    if all(hits.tails is not None for hits in per_shard):
        joined_tails = _joined([hits.tails or () for hits in per_shard])
        tails = [joined_tails[i] for i in chosen]
    seqs = _joined([hits.seqs for hits in per_shard])
    picked = np.array(chosen, np.int64)
    return Hits(
        counts=chosen_counts,
        ids=[ids[i] for i in chosen],
        keys=keys[picked],
        seqs=[seqs[i] for i in chosen],
        tails=tails,
        vectors=_picked_vectors(per_shard, picked),
    )


def _joined(parts: Sequence[Sequence[Any]]) -> list[Any]:
    joined: list[Any] = []
    for part in parts:
        joined.extend(part)
    return joined


def _break_ties(
    order: list[int],
    keys: npt.NDArray[np.float32],
    owner: npt.NDArray[np.int64],
    ids: Sequence[bytes],
) -> None:
    """Sorts runs of equal (query, key) by id, in place. numpy cannot sort bytes of any length."""
    ordered_keys, ordered_owner = keys[order], owner[order]
    equal = (ordered_keys[1:] == ordered_keys[:-1]) & (ordered_owner[1:] == ordered_owner[:-1])
    if not equal.any():
        return
    # A run of r equal hits is r - 1 successive True; its ends are where `equal` changes.
    edges = np.flatnonzero(np.diff(np.concatenate(([False], equal, [False])).astype(np.int8)))
    for start, end in edges.reshape(-1, 2).tolist():
        order[start : end + 1] = sorted(order[start : end + 1], key=ids.__getitem__)


def _first_k(
    order: Sequence[int],
    owner: Sequence[int],
    ids: Sequence[bytes],
    k: int,
    queries: int,
    excluded: Sequence[bytes] | None,
) -> tuple[list[int], list[int]]:
    """Returns the first k positions of each query in `order`, each id once, and how many."""
    chosen: list[int] = []
    counts = [0] * queries
    seen: set[bytes] = set()
    current = -1
    for i in order:
        query = owner[i]
        if query != current:
            current = query
            seen = set() if excluded is None else {excluded[query]}
        if counts[query] < k and ids[i] not in seen:
            seen.add(ids[i])
            counts[query] += 1
            chosen.append(i)
    return chosen, counts


def _picked_vectors(per_shard: Sequence[Hits], picked: npt.NDArray[np.int64]) -> Vectors | None:
    """Returns the rows `picked` of the shards' vectors laid end to end, copying only those."""
    if any(hits.vectors is None for hits in per_shard):
        return None
    starts = np.cumsum([0] + [len(hits.ids) for hits in per_shard])
    dimension = next(hits.vectors.shape[1] for hits in per_shard if hits.vectors is not None)
    vectors = np.empty((len(picked), dimension), np.float32)
    for hits, start, end in zip(per_shard, starts[:-1], starts[1:], strict=True):
        here = np.flatnonzero((picked >= start) & (picked < end))
        if hits.vectors is not None and len(here):
            vectors[here] = hits.vectors[picked[here] - start]
    return vectors
