import pytest

from shoal_cluster.cli.demo.corpus import COLLECTION
from shoal_cluster.cli.demo.observation import (
    choose_victim,
    is_whole,
    rows_not_indexed,
    sealing_is_due,
)
from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.domain.limits import SETTLE_OPERATIONS
from shoal_protos.v1 import admin_pb2
from tests.unit.cli.fakes import status_report

PIDS = {"server-0": 10, "server-1": 11}


def report(shards: int = 3) -> admin_pb2.StatusResponse:
    return status_report({COLLECTION: (shards, 30), "other": (1, 5)}, pids=PIDS)


def test_victim_leads_most_shards_and_carries_its_pid() -> None:
    victim = choose_victim(report(3))
    assert (victim.server, victim.pid, victim.leads) == ("server-0", 10, (0, 2))


def test_of_equal_servers_the_first_by_name_is_chosen() -> None:
    assert choose_victim(report(4)).server == "server-0"


def test_no_leader_is_no_victim() -> None:
    with pytest.raises(Unavailable):
        choose_victim(status_report({}, pids=PIDS))


def test_healthy_collection_is_whole() -> None:
    assert is_whole(report(), shards=3, replicas=2)


def test_report_that_still_counts_on_the_killed_process_is_not_whole() -> None:
    assert not is_whole(report(), shards=3, replicas=2, without_pid=10)
    assert is_whole(report(), shards=3, replicas=2, without_pid=12)


@pytest.mark.parametrize("state", ["opening", "failed", "lagging"])
def test_replica_that_is_not_ready_is_missing(state: str) -> None:
    broken = report()
    broken.collections[0].shards[1].replicas[1].state = state
    assert not is_whole(broken, shards=3, replicas=2)


def test_replica_of_a_suspected_server_is_missing() -> None:
    broken = report()
    broken.actors[1].state = "suspect"
    assert not is_whole(broken, shards=3, replicas=2)


def test_shard_without_a_primary_is_not_whole() -> None:
    broken = report()
    for replica in broken.collections[0].shards[0].replicas:
        replica.role = admin_pb2.REPLICA_ROLE_FOLLOWER
    assert not is_whole(broken, shards=3, replicas=2)


def test_missing_shard_is_not_whole() -> None:
    assert not is_whole(report(2), shards=3, replicas=2)


def test_rows_not_indexed_are_those_of_the_demo_only() -> None:
    filled = report()
    filled.collections[0].shards[0].memtable_rows = 5
    filled.collections[0].shards[1].memtable_rows = 6
    filled.collections[1].shards[0].memtable_rows = 100
    assert rows_not_indexed(filled) == 11


def test_sealing_is_due_when_one_shard_has_a_segment_full() -> None:
    filled = report()
    filled.collections[0].shards[0].memtable_rows = SETTLE_OPERATIONS - 1
    assert not sealing_is_due(filled)
    filled.collections[0].shards[1].memtable_rows = SETTLE_OPERATIONS
    assert sealing_is_due(filled)
