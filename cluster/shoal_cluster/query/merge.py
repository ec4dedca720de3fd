"""Merges the hits of shards into one top k per query. Pure; last step of the search path.

Hits stay parallel arrays all the way; only the merge itself looks at single hits.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.point import Tail, Vectors
from shoal_cluster.shard.calls import SearchReply

T = TypeVar("T")


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
    tails: Sequence[Tail] | None = None
    vectors: Vectors | None = None


def hits_of(reply: SearchReply, body: memoryview, *, dimension: int, with_vector: bool) -> Hits:
    """Returns a shard's reply as arrays, without copying keys or vectors."""
    vectors = None
    if with_vector:
        vectors = np.frombuffer(body, np.float32, len(reply.ids) * dimension)
        vectors = vectors.reshape(len(reply.ids), dimension)
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
    counts once, with its better key. O(hits log shards).

    Invariant Q-2: every returned hit came from one of `per_shard`, and no better one was left out.
    """
    if len(per_shard) == 1 and excluded is None:
        return per_shard[0]  # a shard never returns more than k, nor an id twice
    keys: list[float] = _joined([hits.keys.tolist() for hits in per_shard])
    ids = _joined([hits.ids for hits in per_shard])
    chosen: list[int] = []
    counts: list[int] = []
    # Where the next query's hits of each shard begin, in the joined lists.
    begins = list(itertools.accumulate((len(hits.ids) for hits in per_shard[:-1]), initial=0))
    for query in range(len(per_shard[0].counts)):
        candidates: list[tuple[float, bytes, int]] = []
        for shard, hits in enumerate(per_shard):
            begin = begins[shard]
            end = begins[shard] = begin + hits.counts[query]
            candidates += zip(keys[begin:end], ids[begin:end], range(begin, end), strict=True)
        # Tuples order by key, then id, and timsort merges the shards' runs as they are. Measured
        # against numpy's lexsort with ties broken apart: 30 to 48 µs for one query of four shards
        # and k 10, the same within a tenth for 64 queries or k 1,000.
        candidates.sort()
        seen = set() if excluded is None else {excluded[query]}
        before = len(chosen)
        for _, point_id, i in candidates:
            if len(chosen) - before == k:
                break
            if point_id not in seen:
                seen.add(point_id)
                chosen.append(i)
        counts.append(len(chosen) - before)
    seqs = _joined([hits.seqs for hits in per_shard])
    tails = None
    if all(hits.tails is not None for hits in per_shard):
        joined_tails = _joined([hits.tails or () for hits in per_shard])
        tails = [joined_tails[i] for i in chosen]
    return Hits(
        counts=counts,
        ids=[ids[i] for i in chosen],
        keys=np.array([keys[i] for i in chosen], np.float32),
        seqs=[seqs[i] for i in chosen],
        tails=tails,
        vectors=_picked_vectors(per_shard, np.array(chosen, np.int64)),
    )


def _joined(parts: Sequence[Sequence[T]]) -> list[T]:
    return list(itertools.chain.from_iterable(parts))


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
