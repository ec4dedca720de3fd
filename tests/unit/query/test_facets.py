"""Facet counts over several shards, against counting all rows."""

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.errors import InvalidRequest, NotFound, Unavailable
from shoal_cluster.domain.ids import Epoch, Seq, ServerId, ShardNumber
from shoal_cluster.domain.partition import shard_of_id, shard_of_value
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.filtering.expression import Comparison, Expression, Operator, matches
from shoal_cluster.query import facets
from shoal_cluster.query.execute import Searcher
from shoal_cluster.query.explore import Explorer
from shoal_cluster.query.facets import FacetsRequest, FacetsResult
from shoal_cluster.query.plan import Freshness
from tests.unit.query.fake_cluster import FakeClock, FakeCluster, a_schema, store

WORDS = ("net", "web", "doc", "œuvre", "zz")
Attributes = dict[str, Any]


def a_cluster(shards: int = 3, **changes: Any) -> tuple[FakeCluster, Explorer, list[Attributes]]:
    """Rows without a section, with equal counts, with lists; several shards."""
    cluster = FakeCluster(FakeClock())
    schema = a_schema(shards=shards, **changes)
    cluster.add_collection(schema, [["a", "b"]] * shards)
    rng = np.random.default_rng(5)
    rows: list[Attributes] = []
    for number in range(120):
        attributes: Attributes = {"size": int(rng.integers(0, 8))}
        if schema.partition_by or rng.random() < 0.8:
            attributes["section"] = WORDS[int(rng.integers(0, 5))]
        if rng.random() < 0.6:
            attributes["tags"] = sorted(set(rng.choice(WORDS, 2).tolist()))
        point_id = f"p{number:03}"
        shard = (
            shard_of_value(attributes["section"], shards)
            if schema.partition_by
            else shard_of_id(point_id, shards)  # type: ignore[arg-type]
        )
        store(cluster, schema, shard, point_id, [1, number, 0, 0], **attributes)
        rows.append(attributes)
    searcher = Searcher(caller=cluster, topology=cluster, clock=cluster.clock)
    return cluster, Explorer(searcher.scatter), rows


def ask(explorer: Explorer, attribute: str, **changes: Any) -> FacetsResult:
    fields: dict[str, Any] = {"collection": "docs", "attribute": attribute, "limit": 1000}
    request = FacetsRequest(**{**fields, **changes})
    return asyncio.run(explorer.facets(request, timeout_s=5))


FILTERS: list[Expression | None] = [
    None,
    Comparison("size", Operator.LT, 3),
    Comparison("section", Operator.EQ, "web"),
    Comparison("section", Operator.EQ, "nobody"),
]


@pytest.mark.parametrize("attribute", ["section", "size", "tags"])
@pytest.mark.parametrize("expression", FILTERS)
@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_facets_equal_counting_every_row(
    attribute: str, expression: Expression | None, limit: int
) -> None:
    _, explorer, rows = a_cluster()
    passing = [row for row in rows if expression is None or matches(expression, row)]
    counted: Counter[Any] = Counter()
    for row in passing:
        value = row.get(attribute, [])
        counted.update(value if isinstance(value, list) else [value])
    wanted = sorted(counted.items(), key=lambda entry: (-entry[1], entry[0]))
    found = ask(explorer, attribute, filter=expression, limit=limit)
    assert list(found.counts) == wanted[:limit]
    assert (found.rows, found.distinct) == (len(passing), len(counted))
    assert found.missing == sum(attribute not in row for row in passing)
    assert set(found.as_of) == {0, 1, 2}


def test_a_pinned_partition_asks_its_shard_alone_and_explain_says_so() -> None:
    cluster, explorer, rows = a_cluster(4, partition_by="section")
    pinned = Comparison("section", Operator.EQ, "web")
    found = ask(explorer, "size", filter=pinned, explain=True)
    assert found.rows == sum(row["section"] == "web" for row in rows)
    assert len(cluster.calls) == 1
    assert found.explain is not None
    assert len(found.explain.searched) == 1 and len(found.explain.pruned) == 3
    assert all(pruned.reason for pruned in found.explain.pruned)
    assert set(found.explain.stages_us) == {"scatter", "merge"}


@pytest.mark.parametrize(
    ("attribute", "limit", "field"),
    [
        ("wrod", 10, "attribute"),
        ("size", 0, "limit"),
        ("size", 1001, "limit"),
        ("x", 1, "attribute"),
    ],
)
def test_bad_requests_name_field_and_limit(attribute: str, limit: int, field: str) -> None:
    _, explorer, _ = a_cluster()
    with pytest.raises(InvalidRequest) as caught:
        ask(explorer, attribute, limit=limit)
    assert caught.value.field == field


def test_floats_are_refused_naming_what_is_allowed() -> None:
    from shoal_cluster.domain.schema import AttributeType

    _, explorer, _ = a_cluster(
        attributes={
            "weight": AttributeType.FLOAT,
            "size": AttributeType.INT,
            "section": AttributeType.KEYWORD,
            "tags": AttributeType.KEYWORD_LIST,
        }
    )
    with pytest.raises(InvalidRequest) as caught:
        ask(explorer, "weight")
    assert caught.value.field == "attribute" and "keyword" in (caught.value.limit or "")


def test_too_many_values_are_refused_rather_than_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facets, "FACET_VALUES_MAX", 7)
    _, explorer, _ = a_cluster()
    with pytest.raises(InvalidRequest) as caught:
        ask(explorer, "size")
    assert caught.value.field == "attribute" and "narrow the filter" in caught.value.message


def test_levels_reach_the_shards_and_failures_fail_the_read() -> None:
    cluster, explorer, _ = a_cluster()
    position = Position(Epoch(7), Seq(3))
    session = Freshness(token={ShardNumber(1): position}, collection_id="c" * 32)
    ask(explorer, "size", freshness=session)
    by_shard = {call.message.shard: call.message.level for call in cluster.calls}
    assert by_shard[1].at_least == position
    ask(explorer, "size", freshness=Freshness(consistency=Consistency.STRONG))
    assert cluster.calls[-1].message.level.consistency is Consistency.STRONG
    cluster.dead.update(map(ServerId, "ab"))
    with pytest.raises(Unavailable):
        ask(explorer, "size")
    with pytest.raises(NotFound):
        ask(explorer, "size", collection="nobody")
