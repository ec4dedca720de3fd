"""Writes against a fake cluster: routing, retries, outcomes, moves between partitions."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from shoal_cluster.domain.errors import (
    Conflict,
    Corrupt,
    Indeterminate,
    NotFound,
    NotPrimary,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import PointId, ServerId, ShardNumber
from shoal_cluster.domain.partition import shard_of_id, shard_of_value
from shoal_cluster.domain.point import decode_tail
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.filtering.expression import Comparison, Operator
from shoal_cluster.ingest.execute import Writer
from shoal_cluster.ingest.parts import combined_failure
from shoal_cluster.ingest.validate import (
    DeleteRequest,
    DeleteWhereRequest,
    PatchRequest,
    UpsertRequest,
)
from shoal_cluster.shard.calls import WriteKind
from tests.unit.query.fake_cluster import Behaviour, FakeClock, FakeCluster, a_schema


def a_cluster(
    shards: int = 1, replicas: Sequence[str] | None = None, **changes: Any
) -> tuple[FakeCluster, CollectionSchema, Writer]:
    """Shard n has its primary on server n, and its follower on server f, unless `replicas`."""
    cluster = FakeCluster(FakeClock())
    schema = a_schema(shards=shards, metric=Metric.DOT, **changes)
    cluster.add_collection(schema, [replicas or [str(n), "f"] for n in range(shards)])
    return cluster, schema, Writer(caller=cluster, topology=cluster, clock=cluster.clock)


def upsert(*ids: str, no: int = 1, section: str = "", **changes: Any) -> UpsertRequest:
    fields: dict[str, Any] = {
        "collection": "docs",
        "name": RequestName("client", no),
        "ids": list(ids),
        "vectors": np.arange(len(ids) * 4, dtype=np.float32).reshape(-1, 4),
        "attributes": [{"section": section}] * len(ids) if section else (),
    }
    return UpsertRequest(**{**fields, **changes})


def where(cluster: FakeCluster, schema: CollectionSchema, point_id: str) -> list[int]:
    return [
        number
        for number in range(schema.shards)
        if point_id.encode() in cluster.shard(schema, number).rows
    ]


def test_points_reach_the_shard_of_their_id_and_get_their_seqs_in_request_order() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(shards=3)
        ids = [f"p{i}" for i in range(12)]
        result = await writer.upsert(upsert(*ids), timeout_s=5)
        for i, point_id in enumerate(ids):
            shard = shard_of_id(PointId(point_id), 3)
            row = cluster.shard(schema, shard).rows[point_id.encode()]
            assert row.vector.tolist() == [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]
            assert result.seqs[i] == row.seq
        assert result.affected == 12
        assert {s: p.seq for s, p in result.token.items()} == {
            n: cluster.shard(schema, n).seq for n in range(3)
        }
        assert {(c.message.client_id, c.message.request_no) for c in cluster.calls} == {
            ("client", 1)
        }

    asyncio.run(scenario())


def test_a_lost_reply_is_resolved_by_the_same_request_id() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster()
        cluster.scripts[ServerId("0")] += [Behaviour.LOSE_REPLY, Behaviour.LOSE_REPLY]
        result = await writer.upsert(upsert("a", "b"), timeout_s=5)
        assert result.seqs == [1, 2]
        assert cluster.shard(schema, 0).seq == 2, "applied once"
        assert len(cluster.calls) == 3
        assert len({(c.message.client_id, c.message.request_no) for c in cluster.calls}) == 1

    asyncio.run(scenario())


def test_a_write_follows_the_primary() -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster(replicas=("a", "b"))
        cluster.scripts[ServerId("a")].append(NotPrimary("fenced"))
        cluster.on_wait.append(lambda: cluster.move_primary("docs", 0, "b"))
        await writer.upsert(upsert("x"), timeout_s=5)
        assert [call.server for call in cluster.calls] == ["a", "b"]

    asyncio.run(scenario())


def test_a_write_waits_while_a_takeover_is_under_way() -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster(replicas=("a", "b"))
        cluster.move_primary("docs", 0, None)
        cluster.on_wait += [lambda: None, lambda: cluster.move_primary("docs", 0, "b")]
        await writer.upsert(upsert("x"), timeout_s=5)
        assert [call.server for call in cluster.calls] == ["b"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("failure", "kind", "outcome"),
    [
        (Unavailable("no link"), Unavailable, Outcome.NOT_APPLIED),
        (NotPrimary("fenced"), Unavailable, Outcome.NOT_APPLIED),
        (NotFound("not loaded"), Unavailable, Outcome.NOT_APPLIED),
        (Indeterminate("lost"), Indeterminate, Outcome.MAYBE_APPLIED),
        (Overloaded("full", retry_after_ms=200), Overloaded, Outcome.NOT_APPLIED),
    ],
)
def test_a_write_nobody_answers_ends_at_its_deadline_with_the_right_outcome(
    failure: ShoalError, kind: type[ShoalError], outcome: Outcome
) -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster()
        cluster.scripts[ServerId("0")] += [failure] * 1000
        with pytest.raises(kind) as caught:
            await writer.upsert(upsert("x"), timeout_s=3)
        assert caught.value.outcome is outcome
        assert len(cluster.calls) > 3, "it tried"
        assert 1002.5 < cluster.clock.now_s < 1003.5

    asyncio.run(scenario())


def test_one_lost_reply_makes_every_later_failure_unknown() -> None:
    async def scenario(later: ShoalError) -> None:
        cluster, _, writer = a_cluster()
        cluster.scripts[ServerId("0")] += [Behaviour.LOSE_REPLY, *[later] * 1000]
        with pytest.raises(Indeterminate, match="same request id"):
            await writer.upsert(upsert("x"), timeout_s=3)

    asyncio.run(scenario(NotPrimary("fenced")))
    asyncio.run(scenario(Overloaded("full", retry_after_ms=100)))


def test_a_primary_that_hangs_does_not_use_up_the_deadline() -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster(replicas=("a", "b"))
        cluster.hanging.add(ServerId("a"))
        cluster.on_wait.append(lambda: cluster.move_primary("docs", 0, "b"))
        await writer.upsert(upsert("x"), timeout_s=60)
        assert cluster.clock.now_s < 1010

    asyncio.run(scenario())


def test_overload_is_waited_for_as_long_as_asked() -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster()
        cluster.scripts[ServerId("0")].append(Overloaded("full", retry_after_ms=700))
        await writer.upsert(upsert("x"), timeout_s=5)
        assert cluster.clock.now_s == pytest.approx(1000.7)
        cluster.scripts[ServerId("0")].append(Overloaded("full", retry_after_ms=7000))
        with pytest.raises(Overloaded) as caught:
            await writer.upsert(upsert("y", no=2), timeout_s=5)
        assert caught.value.retry_after_ms == 7000
        assert cluster.clock.now_s == pytest.approx(1000.7), "waiting could not have helped"

    asyncio.run(scenario())


def test_a_shards_own_verdict_that_a_request_is_unknown_is_not_retried() -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster()
        cluster.scripts[ServerId("0")].append(
            Indeterminate("older than remembered", field="request_id.request_no")
        )
        with pytest.raises(Indeterminate, match="older"):
            await writer.upsert(upsert("x"), timeout_s=5)
        assert len(cluster.calls) == 1

    asyncio.run(scenario())


def test_a_dropped_collection_ends_a_waiting_write() -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster()
        cluster.dead.add(ServerId("0"))
        cluster.on_wait.append(lambda: cluster.publish({}))
        with pytest.raises(NotFound, match="dropped"):
            await writer.upsert(upsert("x"), timeout_s=5)

    asyncio.run(scenario())


def test_a_partly_applied_batch_says_where() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(shards=3)
        cluster.dead.add(ServerId("1"))
        ids = [f"p{i}" for i in range(12)]
        with pytest.raises(Indeterminate) as caught:
            await writer.upsert(upsert(*ids), timeout_s=2)
        assert caught.value.outcome is Outcome.MAYBE_APPLIED
        assert "applied on shard 0, 2; not applied on shard 1" in caught.value.message
        # Sending the same request again completes it and applies nothing twice.
        cluster.dead.clear()
        before = cluster.shard(schema, 0).seq
        result = await writer.upsert(upsert(*ids), timeout_s=2)
        assert cluster.shard(schema, 0).seq == before
        assert all(where(cluster, schema, i) for i in ids)
        assert 0 not in result.seqs

    asyncio.run(scenario())


def test_combined_failures() -> None:
    zero, one, two = ShardNumber(0), ShardNumber(1), ShardNumber(2)
    nothing = combined_failure([], {zero: Unavailable("x"), one: Overloaded("y")})
    assert type(nothing) is Unavailable and nothing.outcome is Outcome.NOT_APPLIED
    maybe = combined_failure([], {zero: Unavailable("x"), one: Indeterminate("y")})
    assert type(maybe) is Indeterminate
    assert "maybe applied on shard 1; not applied on shard 0" in maybe.message
    refused = combined_failure([zero], {one: Unavailable("x"), two: Conflict("y", field="f")})
    assert type(refused) is Conflict and refused.outcome is Outcome.MAYBE_APPLIED
    assert refused.field == "f" and "shard 2 said: y" in refused.message
    corrupt = combined_failure([], {zero: Corrupt("x")})
    assert type(corrupt) is Corrupt and corrupt.outcome is Outcome.NOT_APPLIED


def test_a_failed_condition_names_the_point_of_the_request() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(shards=2)
        ids = [f"p{i}" for i in range(8)]
        await writer.upsert(upsert(ids[5]), timeout_s=5)
        seq = cluster.shard(schema, shard_of_id(PointId(ids[5]), 2)).rows[b"p5"].seq
        seqs = [0] * 8
        with pytest.raises(Conflict) as caught:
            await writer.upsert(upsert(*ids, no=2, if_seqs=seqs), timeout_s=5)
        assert caught.value.field == "conditions[5]"
        seqs[5] = seq
        await writer.upsert(upsert(ids[5], no=3, if_seqs=[seq]), timeout_s=5)
        with pytest.raises(Conflict):
            await writer.upsert(upsert(ids[5], no=4, if_absent=True), timeout_s=5)

    asyncio.run(scenario())


def test_a_large_batch_lets_other_work_run() -> None:
    async def scenario() -> None:
        _, _, writer = a_cluster()
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count_turns())
        await writer.upsert(upsert(*[str(i) for i in range(1000)]), timeout_s=5)
        counting.cancel()
        assert turns > 10

    asyncio.run(scenario())


PARTITIONED = {"shards": 4, "partition_by": "section"}
HERE, THERE = "s0", next(
    f"s{i}" for i in range(1, 50) if shard_of_value(f"s{i}", 4) != shard_of_value("s0", 4)
)  # fmt: skip


def test_a_point_that_changes_its_partition_leaves_its_former_shard() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(**PARTITIONED)
        await writer.upsert(upsert("a", "b", section=HERE), timeout_s=5)
        assert where(cluster, schema, "a") == [shard_of_value(HERE, 4)]
        result = await writer.upsert(upsert("a", no=2, section=THERE), timeout_s=5)
        assert where(cluster, schema, "a") == [shard_of_value(THERE, 4)]
        assert where(cluster, schema, "b") == [shard_of_value(HERE, 4)]
        assert set(result.token) == {shard_of_value(HERE, 4), shard_of_value(THERE, 4)}

    asyncio.run(scenario())


def test_a_load_that_moves_nothing_costs_one_get_per_other_shard() -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster(**PARTITIONED)
        await writer.upsert(upsert("a", "b", section=HERE), timeout_s=5)
        assert len(cluster.methods("get")) == 3
        assert len(cluster.methods("write")) == 1
        one_shard, _, writer = a_cluster(shards=1, partition_by="section")
        await writer.upsert(upsert("a", "b", section=HERE), timeout_s=5)
        assert len(one_shard.calls) == 1

    asyncio.run(scenario())


def test_a_version_written_meanwhile_elsewhere_is_not_deleted() -> None:
    """Two upserts of one id under two values at once: neither may delete what the other wrote."""

    async def scenario() -> None:
        cluster, schema, writer = a_cluster(**PARTITIONED)
        await writer.upsert(upsert("a", section=HERE), timeout_s=5)
        former = cluster.shard(schema, shard_of_value(HERE, 4))
        owner = cluster.shard(schema, shard_of_value(THERE, 4))
        inner = owner.write

        def somebody_writes_the_former_shard_first(call: Any) -> Any:
            former.seq += 1
            former.rows[b"a"].seq = former.seq
            return inner(call)

        fate = FakeCluster._fate

        def spy(self: FakeCluster, server: Any, call: Any) -> Any:
            if call.kind is WriteKind.UPSERT:
                return somebody_writes_the_former_shard_first(call)
            return fate(self, server, call)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeCluster, "_fate", spy)
            await writer.upsert(upsert("a", no=2, section=THERE), timeout_s=5)
        assert b"a" in former.rows

    asyncio.run(scenario())


def test_a_late_retry_deletes_nothing_that_came_after_it() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(**PARTITIONED)
        first = upsert("a", section=HERE)
        await writer.upsert(first, timeout_s=5)
        await writer.upsert(upsert("a", no=2, section=THERE), timeout_s=5)
        await writer.upsert(first, timeout_s=5)  # the same request id: applied long ago
        assert where(cluster, schema, "a") == [shard_of_value(THERE, 4)]

    asyncio.run(scenario())


def test_a_late_retry_whose_row_was_written_again_deletes_nothing_elsewhere() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(**PARTITIONED)
        first = upsert("a", section=HERE)
        await writer.upsert(first, timeout_s=5)
        owner = cluster.shard(schema, shard_of_value(HERE, 4))
        owner.seq += 1
        owner.rows[b"a"].seq = owner.seq  # somebody wrote it again
        elsewhere = cluster.shard(schema, shard_of_value(THERE, 4))
        elsewhere.rows[b"a"] = owner.rows[b"a"]  # and somebody else, at the same time, there
        await writer.upsert(first, timeout_s=5)
        assert b"a" in elsewhere.rows

    asyncio.run(scenario())


def test_a_move_that_could_not_finish_is_unknown_and_a_retry_finishes_it() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(**PARTITIONED)
        await writer.upsert(upsert("a", section=HERE), timeout_s=5)
        former = ServerId(str(shard_of_value(HERE, 4)))
        # None answers the look-up before the write; then the shard's primary is gone.
        cluster.scripts[former] += [None, *[Unavailable("gone")] * 1000]
        with pytest.raises(Indeterminate, match="former versions"):
            await writer.upsert(upsert("a", no=2, section=THERE), timeout_s=2)
        assert len(where(cluster, schema, "a")) == 2
        cluster.scripts[former].clear()
        await writer.upsert(upsert("a", no=2, section=THERE), timeout_s=2)
        assert where(cluster, schema, "a") == [shard_of_value(THERE, 4)]

    asyncio.run(scenario())


def test_a_condition_sees_versions_under_another_partition_value() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(**PARTITIONED)
        await writer.upsert(upsert("a", section=HERE), timeout_s=5)
        for changes in ({"if_absent": True}, {"if_seqs": [0, 0]}):
            with pytest.raises(Conflict, match="another partition value") as caught:
                await writer.upsert(upsert("b", "a", no=2, section=THERE, **changes), timeout_s=5)
            assert caught.value.field == "conditions[1]"
        assert where(cluster, schema, "b") == []

    asyncio.run(scenario())


@pytest.mark.parametrize("partition_by", [None, "section"])
def test_delete_removes_by_id_wherever_the_point_is(partition_by: str | None) -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(shards=4, partition_by=partition_by)
        await writer.upsert(upsert("a", "b", "c", section=HERE), timeout_s=5)
        request = DeleteRequest(
            collection="docs", name=RequestName("client", 2), ids=["a", "c", "nope"]
        )
        result = await writer.delete(request, timeout_s=5)
        assert result.affected == 2
        assert [where(cluster, schema, i) != [] for i in "abc"] == [False, True, False]
        assert (await writer.delete(request, timeout_s=5)).affected == 2, "the first answer"

    asyncio.run(scenario())


@pytest.mark.parametrize("partition_by", [None, "section"])
def test_patch_sets_removes_and_reports_missing_ids(partition_by: str | None) -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(shards=4, partition_by=partition_by)
        await writer.upsert(
            upsert("a", "b", attributes=[{"section": HERE, "size": 1, "tags": ["x"]}] * 2),
            timeout_s=5,
        )
        result = await writer.patch(
            PatchRequest(
                collection="docs",
                name=RequestName("client", 2),
                ids=["a", "nope", "b"],
                attributes=[{"size": 5}, {}, {"tags": ["y"]}],
                remove=["tags"],
            ),
            timeout_s=5,
        )
        assert result.missing == ["nope"] and result.affected == 2
        rows = {
            point_id: decode_tail(row.tail)[1]
            for number in range(4)
            for point_id, row in cluster.shard(schema, number).rows.items()
        }
        assert rows[b"a"] == {"section": HERE, "size": 5}
        assert rows[b"b"] == {"section": HERE, "size": 1, "tags": ["y"]}

    asyncio.run(scenario())


def test_delete_by_filter_goes_on_until_nothing_matches() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster(shards=2)
        ids = [f"p{i}" for i in range(40)]
        await writer.upsert(upsert(*ids, attributes=[{"size": i} for i in range(40)]), timeout_s=5)
        for number in range(2):
            cluster.shard(schema, number).delete_where_max = 3
        cluster.scripts[ServerId("0")] += [None, Behaviour.LOSE_REPLY]
        request = DeleteWhereRequest(
            collection="docs",
            name=RequestName("client", 2),
            filter=Comparison("size", Operator.LT, 30),
        )
        result = await writer.delete_where(request, timeout_s=5)
        assert result.affected == 30
        assert sum(len(cluster.shard(schema, n).rows) for n in range(2)) == 10
        writes = cluster.methods("write")[2:]
        names = {(call.message.client_id, call.message.request_no) for call in writes}
        assert names >= {("client", 2), RequestName("client", 2).part("w", 1)}
        assert len({client for client, _ in names}) == 2, "however many passes, one more client"

    asyncio.run(scenario())


def test_delete_by_filter_that_stops_half_way_is_unknown() -> None:
    async def scenario() -> None:
        cluster, schema, writer = a_cluster()
        await writer.upsert(upsert(*[f"p{i}" for i in range(9)], section="x"), timeout_s=5)
        cluster.shard(schema, 0).delete_where_max = 3
        cluster.scripts[ServerId("0")] += [None, *[Unavailable("gone")] * 1000]
        request = DeleteWhereRequest(
            collection="docs",
            name=RequestName("client", 2),
            filter=Comparison("section", Operator.EQ, "x"),
        )
        with pytest.raises(Indeterminate, match="3 points of shard 0 were removed"):
            await writer.delete_where(request, timeout_s=2)
        cluster.scripts.clear()
        assert (await writer.delete_where(request, timeout_s=5)).affected == 9

    asyncio.run(scenario())


def test_delete_by_filter_on_the_partition_attribute_reaches_only_its_shard() -> None:
    async def scenario() -> None:
        cluster, _, writer = a_cluster(**PARTITIONED)
        request = DeleteWhereRequest(
            collection="docs",
            name=RequestName("client", 1),
            filter=Comparison("section", Operator.EQ, HERE),
        )
        await writer.delete_where(request, timeout_s=5)
        assert [call.message.shard for call in cluster.calls] == [shard_of_value(HERE, 4)]

    asyncio.run(scenario())
