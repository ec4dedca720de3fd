"""The merge against brute force, on hits with many ties and ids on two shards."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal_cluster.query.merge import Hits, merge_top_k

KEYS = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0])
IDS = st.integers(0, 30).map(lambda n: f"p{n}".encode())
OneQuery = dict[bytes, float]
HITS_OF_QUERY = st.dictionaries(IDS, KEYS, max_size=12)


def as_hits(queries: list[OneQuery], shard: int) -> Hits:
    """Lays the hits of one shard end to end, as a shard sends them."""
    ordered = [sorted(query.items(), key=lambda hit: (hit[1], hit[0])) for query in queries]
    ids = [point_id for query in ordered for point_id, _ in query]
    keys = np.array([key for query in ordered for _, key in query], np.float32)
    return Hits(
        counts=[len(query) for query in ordered],
        ids=ids,
        keys=keys,
        seqs=[shard * 1000 + i for i in range(len(ids))],
        tails=[b"%d:%s" % (shard, point_id) for point_id in ids],
        vectors=np.array([[shard, i] for i in range(len(ids))], np.float32).reshape(-1, 2),
    )


@st.composite
def shards_of_queries(draw: st.DrawFn) -> list[list[OneQuery]]:
    queries = draw(st.integers(1, 4))
    of_shard = st.lists(HITS_OF_QUERY, min_size=queries, max_size=queries)
    return draw(st.lists(of_shard, min_size=1, max_size=5))


@given(shards=shards_of_queries(), k=st.integers(1, 15), exclude=st.booleans())
def test_merge_equals_sorting_everything(
    shards: list[list[OneQuery]], k: int, exclude: bool
) -> None:
    queries = len(shards[0])
    excluded = [b"p1"] * queries if exclude else None
    if len(shards) == 1:  # a shard never returns more than k
        shards = [[dict(sorted(q.items(), key=lambda h: (h[1], h[0]))[:k]) for q in shards[0]]]
    parts = [as_hits(of_shard, number) for number, of_shard in enumerate(shards)]
    merged = merge_top_k(parts, k, excluded=excluded)
    start = 0
    for query in range(queries):
        best: OneQuery = {}
        for of_shard in shards:
            for point_id, key in of_shard[query].items():
                if not exclude or point_id != b"p1":
                    best[point_id] = min(key, best.get(point_id, key))
        expected = sorted(best.items(), key=lambda hit: (hit[1], hit[0]))[:k]
        end = start + merged.counts[query]
        found = zip(merged.ids[start:end], merged.keys[start:end].tolist(), strict=True)
        assert list(found) == expected
        start = end
    assert start == len(merged.ids) == len(merged.seqs)


@given(shards=shards_of_queries(), k=st.integers(1, 15))
def test_parallel_arrays_stay_parallel(shards: list[list[OneQuery]], k: int) -> None:
    parts = [as_hits(of_shard, number) for number, of_shard in enumerate(shards)]
    merged = merge_top_k(parts, k)
    assert merged.tails is not None and merged.vectors is not None
    for i, point_id in enumerate(merged.ids):
        shard, within = (int(x) for x in merged.vectors[i])
        assert parts[shard].ids[within] == point_id
        assert merged.seqs[i] == shard * 1000 + within
        assert merged.tails[i] == b"%d:%s" % (shard, point_id)


@given(shards=shards_of_queries(), k=st.integers(1, 15))
def test_the_order_of_shards_does_not_matter(shards: list[list[OneQuery]], k: int) -> None:
    parts = [as_hits(of_shard, number) for number, of_shard in enumerate(shards)]
    if len(parts) == 1:
        return
    forwards, backwards = merge_top_k(parts, k), merge_top_k(parts[::-1], k)
    assert list(forwards.ids) == list(backwards.ids)
    assert forwards.keys.tolist() == backwards.keys.tolist()
