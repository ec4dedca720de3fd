"""Range, groups, diverse, recommend, facets and ordered scroll end to end, against brute force.

One collection for all of them, with rows in segments, in memtables and deleted ones.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shoal
from chaos.cluster import wait_until
from shoal import F, Point
from shoal_cluster.bootstrap import RunningCluster

DIMENSION = 8
ROWS = 5000
LATER = 300
COLORS = ("red", "green", "blue", "black", "white")

Attributes = dict[str, Any]


def _points(start: int, stop: int) -> list[Point]:
    rng = np.random.default_rng(start)
    points = []
    for n in range(start, stop):
        attributes: Attributes = {"number": n, "even": n % 2 == 0, "weight": n % 17 / 4}
        if n % 7:
            attributes["color"] = COLORS[int(rng.integers(0, 5))]
        if n % 3:
            attributes["size"] = int(rng.integers(0, 40))
        points.append(
            Point(
                id=f"p{n:05}",
                vector=rng.standard_normal(DIMENSION).astype(np.float32),
                attributes=attributes,
                payload={"n": n},
            )
        )
    return points


class Model:
    """What the collection holds, in plain Python."""

    def __init__(self) -> None:
        self.points = {p.id: p for p in [*_points(0, ROWS), *_points(ROWS, ROWS + LATER)]}
        for number in range(0, ROWS + LATER, 11):
            del self.points[f"p{number:05}"]

    def ranked(self, query: Any, keep: Any = None) -> list[tuple[str, float]]:
        """(id, distance) of every point that `keep` accepts, nearest first."""
        kept = [p for p in self.points.values() if keep is None or keep(p.attributes)]
        vectors = np.stack([p.vector for p in kept])
        distances = np.sqrt(((vectors - np.asarray(query, np.float32)) ** 2).sum(axis=1))
        pairs = [(p.id, float(d)) for p, d in zip(kept, distances, strict=True)]
        return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def collection(cluster: RunningCluster) -> Iterator[shoal.Collection]:
    with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
        made = client.create_collection(
            "more-search",
            dimension=DIMENSION,
            metric="l2",
            attributes={
                "color": "keyword",
                "size": "int",
                "number": "int",
                "even": "bool",
                "weight": "float",
            },
            shards=3,
            replicas=2,
        )
        made.bulk_upsert(_points(0, ROWS))
        wait_until(
            lambda: all(s.segments for s in client.status("more-search").collections[0].shards),
            timeout_s=60,
            what="every shard sealed a segment",
        )
        made.upsert(_points(ROWS, ROWS + LATER))
        made.delete([f"p{n:05}" for n in range(0, ROWS + LATER, 11)])
        yield made
        client.drop_collection("more-search")


QUERY = np.linspace(-1, 1, DIMENSION, dtype=np.float32)


def test_a_range_is_everything_within_it_nearest_first(
    collection: shoal.Collection, model: Model
) -> None:
    wanted = [(i, d) for i, d in model.ranked(QUERY, lambda a: a.get("size", 99) < 30) if d <= 4.0]
    assert len(wanted) > 1500
    found = collection.search_range(QUERY, distance_max=4.0, filter=F("size") < 30, explain=True)
    hits = list(found)
    assert [hit.id for hit in hits] == [i for i, _ in wanted]
    np.testing.assert_allclose([hit.score for hit in hits], [d for _, d in wanted], rtol=1e-4)
    assert hits[0].payload == {"n": int(hits[0].id[1:])}
    assert not found.truncated and set(found.as_of.positions) == {0, 1, 2}
    assert found.explain is not None and len(found.explain.shards) == 3
    assert {segment.plan.rsplit(": ")[-1] for s in found.explain.shards for segment in s.segments
            if segment.searched} == {"exact"}  # fmt: skip
    first = collection.search_range(QUERY, distance_max=4.0, filter=F("size") < 30, limit=1200)
    assert [hit.id for hit in first] == [i for i, _ in wanted[:1200]]
    assert first.truncated
    near = collection.search_range("p00001", distance_max=2.0, with_vector=True)
    ids = [hit.id for hit in near]
    expected = model.ranked(model.points["p00001"].vector)
    assert ids == [i for i, d in expected if d <= 2.0 and i != "p00001"]


def test_groups_are_those_of_grouping_everything(
    collection: shoal.Collection, model: Model
) -> None:
    for attribute, filter, keep in (
        ("color", None, lambda a: True),
        ("size", F("number") < 900, lambda a: a["number"] < 900),
        ("even", None, lambda a: True),
    ):
        wanted: dict[Any, list[str]] = {}
        for point_id, _ in model.ranked(QUERY, lambda a, at=attribute, k=keep: at in a and k(a)):
            value = model.points[point_id].attributes[attribute]
            wanted.setdefault(value, []).append(point_id)
        found = collection.search_groups(
            QUERY, group_by=attribute, groups=6, group_size=4, filter=filter, exact=True
        )
        assert not found.bounded
        assert [(g.value, [hit.id for hit in g]) for g in found] == [
            (value, ids[:4]) for value, ids in list(wanted.items())[:6]
        ]


def test_diverse_hits_spread_out_and_lambda_one_does_not(
    collection: shoal.Collection, model: Model
) -> None:
    plain = collection.search_diverse(QUERY, k=10, mmr_lambda=1.0, exact=True)
    assert plain.ids == [i for i, _ in model.ranked(QUERY)[:10]]
    spread = collection.search_diverse(
        QUERY, k=10, mmr_lambda=0.3, candidates=200, exact=True, with_vector=True
    )
    candidates = [model.points[i].vector for i, _ in model.ranked(QUERY)[:200]]
    chosen = [spread.hits[0].vector]
    np.testing.assert_allclose(chosen[0], candidates[0], rtol=1e-6)
    for hit in spread.hits[1:]:
        # By the definition each hit is a best choice after those before it.
        values = [
            -0.3 * math.dist(QUERY, c) + 0.7 * min(math.dist(c, o) for o in chosen)
            for c in candidates
        ]
        value = -0.3 * math.dist(QUERY, hit.vector) + 0.7 * min(
            math.dist(hit.vector, o) for o in chosen
        )
        assert value >= max(values) - 1e-4
        chosen.append(hit.vector)


def test_a_recommendation_is_the_search_by_the_mean(
    collection: shoal.Collection, model: Model
) -> None:
    def stored(point_id: str) -> Any:
        return model.points[point_id].vector

    positive, negative = ["p00001", "p00002"], ["p00003", [0.5] * DIMENSION]
    mean = (stored("p00001") + stored("p00002")) / 2
    query = 2 * mean - (stored("p00003") + np.full(DIMENSION, 0.5)) / 2
    wanted = [i for i, _ in model.ranked(query) if i not in ("p00001", "p00002", "p00003")]
    found = collection.recommend(positive, negative, k=20, exact=True)
    assert found.ids == wanted[:20]
    with pytest.raises(shoal.NotFound) as refused:
        collection.recommend(["p00001", "p00011"])
    assert refused.value.field == "positive[1]"


def test_facets_count_what_is_there(collection: shoal.Collection, model: Model) -> None:
    rows = [p.attributes for p in model.points.values() if p.attributes["number"] >= 1000]
    for attribute in ("color", "size", "even"):
        counted = Counter(a[attribute] for a in rows if attribute in a)
        found = collection.facets(attribute, filter=F("number") >= 1000, limit=3, explain=True)
        wanted = sorted(counted.items(), key=lambda entry: (-entry[1], entry[0]))[:3]
        assert [(facet.value, facet.count) for facet in found] == wanted
        assert (found.rows, found.distinct) == (len(rows), len(counted))
        assert found.missing == sum(attribute not in a for a in rows)
        assert found.explain is not None and len(found.explain.shards) == 3
    with pytest.raises(shoal.InvalidRequest) as refused:
        collection.facets("weight")
    assert refused.value.field == "attribute" and refused.value.limit


@pytest.mark.parametrize("descending", [False, True])
def test_an_ordered_scroll_is_everything_in_order(
    descending: bool, collection: shoal.Collection, model: Model
) -> None:
    for attribute in ("color", "size", "weight"):
        kept = [p for p in sorted(model.points) if model.points[p].attributes["number"] < 2000]
        present = [p for p in kept if attribute in model.points[p].attributes]
        present.sort(key=lambda p: model.points[p].attributes[attribute], reverse=descending)
        wanted = present + [p for p in kept if attribute not in model.points[p].attributes]
        found = collection.scroll(
            F("number") < 2000, order_by=attribute, descending=descending, page_size=333
        )
        assert [point.id for point in found] == wanted
    page = collection.scroll_page(order_by="size", descending=descending, explain=True)
    assert page.explain is not None and page.cursor


def test_a_scroll_goes_on_when_its_last_row_is_deleted(collection: shoal.Collection) -> None:
    points = [
        Point(id=f"x{n}", vector=QUERY + 50, attributes={"number": 1_000_000 + n}) for n in range(9)
    ]
    collection.upsert(points)
    first = collection.scroll_page(F("number") >= 1_000_000, order_by="number", page_size=4)
    collection.delete(first.points[-1].id)
    rest = collection.scroll_page(
        F("number") >= 1_000_000, order_by="number", page_size=100, cursor=first.cursor
    )
    assert [p.id for p in first] + [p.id for p in rest] == [p.id for p in points]
    collection.delete([p.id for p in points])


def test_the_async_client_does_the_same(
    collection: shoal.Collection, cluster: RunningCluster
) -> None:
    async def ask() -> None:
        async with shoal.AsyncClient(cluster.grpc_address, timeout_s=60.0) as client:
            same = client.collection("more-search")
            stream = same.search_range(QUERY, distance_max=2.0)
            hits = [hit.id async for hit in stream]
            assert hits == [h.id for h in collection.search_range(QUERY, distance_max=2.0)]
            assert hits and not stream.truncated
            groups = await same.search_groups(QUERY, group_by="color", exact=True)
            assert [g.value for g in groups] == [
                g.value for g in collection.search_groups(QUERY, group_by="color", exact=True)
            ]
            found = await same.recommend("p00001", k=5, exact=True)
            assert found.ids == collection.recommend("p00001", k=5, exact=True).ids
            diverse = await same.search_diverse("p00001", k=5, exact=True)
            assert diverse.ids == collection.search_diverse("p00001", k=5, exact=True).ids
            counts = await same.facets("color", consistency="strong")
            assert counts.as_dict() == collection.facets("color").as_dict()
            ordered = [p.id async for p in same.scroll(F("number") < 50, order_by="size")]
            assert ordered == [p.id for p in collection.scroll(F("number") < 50, order_by="size")]

    asyncio.run(ask())


BAD: dict[str, tuple[Any, str]] = {
    "range of the other metric": (lambda c: list(c.search_range(QUERY, score_min=0.5)), "score"),
    "negative distance": (lambda c: list(c.search_range(QUERY, distance_max=-1)), "distance_max"),
    "range over the limit": (lambda c: c.search_range(QUERY, distance_max=1, limit=10**6), "limit"),
    "groups of a float": (lambda c: c.search_groups(QUERY, group_by="weight"), "group_by"),
    "too many groups": (lambda c: c.search_groups(QUERY, group_by="size", groups=101), "groups"),
    "candidates below k": (lambda c: c.search_diverse(QUERY, k=10, candidates=5), "candidates"),
    "lambda over 1": (lambda c: c.search_diverse(QUERY, mmr_lambda=2.0), "mmr_lambda"),
    "no examples": (lambda c: c.recommend([]), "positive"),
    "an example of another dimension": (lambda c: c.recommend([[1.0, 2.0]]), "positive[0]"),
    "facets of nothing": (lambda c: c.facets("wrod"), "attribute"),
    "order of nothing": (lambda c: list(c.scroll(order_by="wrod")), "order_by"),
    "a cursor of nothing": (lambda c: c.scroll_page(order_by="size", cursor=b"x"), "cursor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_naming_the_field(name: str, collection: shoal.Collection) -> None:
    ask, field = BAD[name]
    with pytest.raises(shoal.InvalidRequest) as refused:
        ask(collection)
    assert field in (refused.value.field or ""), refused.value
