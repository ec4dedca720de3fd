"""Groups over several shards, against ranking every row and grouping it in plain Python."""

import asyncio
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.errors import InvalidRequest, NotFound
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.domain.session import Consistency
from shoal_cluster.filtering.expression import Comparison, Operator
from shoal_cluster.query.examples import Example
from shoal_cluster.query.explore import Explorer
from shoal_cluster.query.grouping import GroupsRequest, GroupsResult
from shoal_cluster.query.plan import Freshness
from tests.unit.query.exploring_cases import NOBODY, SMALL, a_cluster, a_search, ranked, stored
from tests.unit.query.fake_cluster import FakeCluster
from tests.unit.query.fake_exploring import attributes_of

QUERY = np.array([3, 1, 1, 0], np.float32)
Groups = list[tuple[Any, list[tuple[float, bytes]]]]


def ask(explorer: Explorer, *, groups: int = 5, size: int = 3, **changes: Any) -> GroupsResult:
    query = changes.pop("query", Example(vector=QUERY, field="query"))
    group_by = changes.pop("group_by", "section")
    request = GroupsRequest(
        search=a_search(k=size, **changes), query=query, group_by=group_by, groups=groups
    )
    return asyncio.run(explorer.search_groups(request, timeout_s=5))


def as_pairs(result: GroupsResult) -> Groups:
    return [
        (value, list(zip(hits.keys.tolist(), hits.ids, strict=True)))
        for value, hits in result.groups
    ]


def by_brute_force(
    cluster: FakeCluster,
    schema: CollectionSchema,
    ordered: list[tuple[float, bytes]],
    groups: int,
    size: int,
) -> Groups:
    """ordered: every matching (key, id), nearest first."""
    found: dict[Any, list[tuple[float, bytes]]] = {}
    for hit in ordered:
        for number in range(schema.shards):
            shard = cluster.shard(schema, number)
            if hit[1] in shard.rows:
                value = attributes_of(shard, hit[1]).get("section")
                if value is not None:
                    found.setdefault(value, []).append(hit)
    return [(value, hits[:size]) for value, hits in list(found.items())[:groups]]


@pytest.mark.parametrize("metric", [Metric.DOT, Metric.L2])
@pytest.mark.parametrize("partition_by", [None, "section"])
@pytest.mark.parametrize("filter", [None, SMALL, NOBODY])
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (3, 4), (100, 10)])
def test_groups_equal_grouping_every_row(
    metric: Metric, partition_by: str | None, filter: Any, groups: int, size: int
) -> None:
    cluster, schema, explorer = a_cluster(metric, partition_by=partition_by)
    found = ask(explorer, groups=groups, size=size, filter=filter)
    ordered = ranked(cluster, schema, QUERY, filter)
    assert as_pairs(found) == by_brute_force(cluster, schema, ordered, groups, size)
    assert not found.bounded


def test_a_stored_point_is_in_no_group_of_its_own_search() -> None:
    cluster, schema, explorer = a_cluster(Metric.DOT)
    found = ask(explorer, query=Example(id=b"p007", field="query"), groups=100, size=10)
    ordered = ranked(cluster, schema, stored(cluster, schema, b"p007"), None, {b"p007"})
    assert as_pairs(found) == by_brute_force(cluster, schema, ordered, 100, 10)
    with pytest.raises(NotFound) as caught:
        ask(explorer, query=Example(id=b"nobody", field="query"))
    assert caught.value.field == "query"


def test_the_second_round_asks_only_shards_that_can_hold_the_groups() -> None:
    cluster, _, explorer = a_cluster(shards=4, partition_by="section")
    ask(explorer, groups=2)
    first = cluster.methods("find_groups")
    second = cluster.methods("group_hits")
    assert len(first) == 4
    assert sum(len(call.message.values) for call in second) == 2
    pinned = Comparison("section", Operator.EQ, "s3")
    cluster.calls.clear()
    found = ask(explorer, filter=pinned, explain=True)
    assert [value for value, _ in found.groups] == ["s3"]
    assert len(cluster.calls) == 2
    assert found.explain is not None
    assert (len(found.explain.searched), len(found.explain.pruned)) == (1, 3)
    assert {"find", "fill"} <= set(found.explain.stages_us)


def test_a_shard_that_gave_up_makes_the_answer_bounded() -> None:
    cluster, schema, explorer = a_cluster()
    cluster.shard(schema, 1).bounded_shards.add(1)
    assert ask(explorer).bounded


def test_hits_come_with_what_was_asked_for() -> None:
    _, _, explorer = a_cluster()
    found = ask(explorer, with_payload=True, with_vector=True)
    for _, hits in found.groups:
        assert hits.tails is not None and len(hits.tails) == len(hits.ids) == len(hits.seqs)
        assert hits.vectors is not None and hits.vectors.shape == (len(hits.ids), 4)


def test_the_second_round_shows_no_older_state_and_asks_the_bucket_no_more() -> None:
    cluster, _, explorer = a_cluster()
    found = ask(explorer, freshness=Freshness(consistency=Consistency.STRONG))
    first = cluster.methods("find_groups")
    assert all(call.message.level.consistency is Consistency.STRONG for call in first)
    for call in cluster.methods("group_hits"):
        assert call.message.level.consistency is Consistency.SESSION
        assert call.message.level.at_least == found.as_of[call.message.shard]
    cluster.calls.clear()
    ask(explorer, freshness=Freshness(consistency=Consistency.EVENTUAL))
    assert {call.message.level.consistency for call in cluster.calls} == {Consistency.EVENTUAL}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"group_by": "wrod"}, "group_by"),
        ({"group_by": "tags"}, "group_by"),
        ({"groups": 0}, "groups"),
        ({"groups": 101}, "groups"),
        ({"size": 0}, "group_size"),
        ({"groups": 100, "size": 11}, "group_size"),
        ({"recall_target": 2.0}, "recall_target"),
        ({"query": Example(vector=np.ones(3, np.float32), field="query")}, "query"),
    ],
)
def test_bad_requests_name_the_field(changes: dict[str, Any], field: str) -> None:
    _, _, explorer = a_cluster()
    with pytest.raises(InvalidRequest) as caught:
        ask(explorer, **changes)
    assert caught.value.field == field
