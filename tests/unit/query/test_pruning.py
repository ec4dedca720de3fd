"""Pruning never loses a row, and says why a shard was left out."""

from hypothesis import given
from hypothesis import strategies as st

from shoal_cluster.domain.ids import ServerId, ShardNumber
from shoal_cluster.domain.partition import shard_of_value
from shoal_cluster.domain.session import Consistency
from shoal_cluster.domain.topology import ShardPlace
from shoal_cluster.filtering.expression import (
    And,
    Comparison,
    Exists,
    Expression,
    In,
    Not,
    Operator,
    Or,
    matches,
)
from shoal_cluster.query.pruning import reachable_shards
from shoal_cluster.query.routing import order_replicas
from tests.unit.query.fake_cluster import EPOCH, a_schema

WORDS = st.sampled_from(["a", "b", "c", "d"])
LEAVES = st.one_of(
    st.builds(Comparison, st.just("section"), st.sampled_from([Operator.EQ, Operator.NE]), WORDS),
    st.builds(
        In, st.just("section"), st.lists(WORDS, min_size=1, max_size=3, unique=True).map(tuple)
    ),
    st.builds(Exists, st.sampled_from(["section", "size"])),
    st.builds(Comparison, st.just("size"), st.just(Operator.GT), st.integers(0, 3)),
)
FILTERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(And, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Or, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Not, inner),
    ),
    max_leaves=8,
)


@given(filter=FILTERS, section=WORDS, size=st.integers(0, 4), shards=st.integers(1, 6))
def test_a_matching_row_lives_on_a_reachable_shard(
    filter: Expression, section: str, size: int, shards: int
) -> None:
    """Invariant Q-3."""
    schema = a_schema(shards=shards, partition_by="section")
    reached, pruned = reachable_shards(schema, filter)
    if matches(filter, {"section": section, "size": size}):
        assert shard_of_value(section, shards) in reached
    assert sorted([*reached, *(p.shard for p in pruned)]) == list(range(shards))


def test_the_reason_names_attribute_values_and_shard() -> None:
    schema = a_schema(shards=8, partition_by="section")
    reached, pruned = reachable_shards(schema, Comparison("section", Operator.EQ, "net"))
    assert pruned[0].reason == f'the filter pins section to "net": shard {reached[0]}'


def test_without_a_partition_attribute_nothing_is_pruned() -> None:
    schema = a_schema(shards=8)
    reached, pruned = reachable_shards(schema, Comparison("section", Operator.EQ, "net"))
    assert len(reached) == 8 and not pruned


A, B, C = ServerId("a"), ServerId("b"), ServerId("c")


def place(shard: int = 0, primary: ServerId | None = A) -> ShardPlace:
    return ShardPlace(shard=ShardNumber(shard), primary=primary, epoch=EPOCH, replicas=(A, B, C))


def order(
    of: ShardPlace,
    in_flight: dict[ServerId, int] | None = None,
    failed: tuple[ServerId, ...] = (),
    consistency: Consistency = Consistency.EVENTUAL,
) -> tuple[ServerId, ...]:
    return order_replicas(
        of, in_flight=in_flight or {}, failed_recently=failed, consistency=consistency
    )


def test_the_least_loaded_replica_is_asked_first() -> None:
    assert order(place(), {A: 3, B: 1, C: 2}) == (B, C, A)


def test_a_server_that_failed_is_asked_last_but_asked() -> None:
    assert order(place(), {A: 0, B: 5, C: 9}, failed=(A,)) == (B, C, A)


def test_ties_rotate_by_shard_for_eventual_reads() -> None:
    assert [order(place(shard))[0] for shard in range(4)] == [A, B, C, A]


def test_ties_go_to_the_primary_for_session_and_strong_reads() -> None:
    for level in (Consistency.SESSION, Consistency.STRONG):
        assert order(place(1, primary=C), consistency=level)[0] == C
    assert order(place(1, primary=None), consistency=Consistency.SESSION)[0] == B
