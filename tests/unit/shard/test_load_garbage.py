"""What collection does with bulk loads: it keeps what may still be committed, and ends the rest."""

from dataclasses import replace

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.domain.errors import Conflict
from shoal_cluster.shard import garbage
from shoal_cluster.shard.load_garbage import find_loads, plan_loads
from shoal_cluster.shard.load_objects import read_prepared
from shoal_cluster.shard.loading import Loads
from tests.unit.shard.loads import (
    AFTER,
    ALL,
    BEFORE,
    CHUNKS,
    COLLECTION,
    LOAD_KEYS,
    after_grace,
    commit,
    loader_of,
    prepared_and_decided,
    prepared_only,
    problems_of,
    shard_with_rows,
    stage,
)
from tests.unit.shard.nodes import KEYS, SHARD, points_of, run


def test_a_takeover_between_the_decision_and_the_commit_commits_what_was_prepared(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        await prepared_and_decided(shard, node)
        await node.crash()
        second = await shard.lead()
        assert points_of(second.replica) == BEFORE
        # Nobody asks: the shard's own collector finds the decision and finishes.
        await after_grace(second)
        assert points_of(second.replica) == AFTER
        assert await problems_of(shard) == []
        progress = await commit(loader_of(second), "l1", [])
        assert progress.rows == len(ALL)
        await second.crash()

    run(scenario())


def test_staged_segments_survive_collection_in_later_epochs_until_it_is_decided(tmp_path):
    """G-3, L-3."""

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        epochs = await prepared_only(node)
        await after_grace(node)
        await node.crash()
        second = await shard.lead()
        await after_grace(second)
        key = LOAD_KEYS.prepared_by(epochs[SHARD])
        prepared = await read_prepared(shard.bucket, LOAD_KEYS, key)
        assert all(f.key in shard.objects for entry in prepared.segments for f in entry.files)
        await loader_of(second).abort(COLLECTION, "l1")
        with pytest.raises(Conflict, match="aborted"):
            await loader_of(second).commit(COLLECTION, "l1", list(CHUNKS), timeout_s=1)
        await after_grace(second)
        assert not any(f.key in shard.objects for e in prepared.segments for f in e.files)
        assert [key for key in shard.objects if "/load/" in key] == [LOAD_KEYS.decision]
        assert points_of(second.replica) == BEFORE
        assert await problems_of(shard) == []
        await second.crash()

    run(scenario())


def test_an_abandoned_load_is_aborted_after_a_day_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setattr(garbage, "LOAD_ABANDONED_S", 500.0)  # the tests' day

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        await stage(loader_of(node), "l1", CHUNKS)
        await after_grace(node, 100.0)
        assert (await loader_of(node).status(COLLECTION, "l1")).decided is None
        await after_grace(node, 300.0)
        assert (await loader_of(node).status(COLLECTION, "l1")).decided is False
        await after_grace(node)
        assert [key for key in shard.objects if "/load/" in key] == [LOAD_KEYS.decision]
        await node.crash()

    run(scenario())


def test_what_is_prepared_after_the_collector_listed_is_not_taken_for_committed(tmp_path):
    """G-3: the decision comes between the listing and the reading of it."""

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        await stage(loader_of(node), "l1", CHUNKS)
        listing = await shard.bucket.list(KEYS.loads)
        epochs = await prepared_and_decided(shard, node)

        class Stale(MemoryStore):
            async def list(self, prefix):
                return listing

        found = await find_loads(Stale(shard.objects), KEYS)
        plan = plan_loads(found, node.replica.manifest, KEYS)
        assert (plan.garbage, plan.ended, plan.unfinished) == ((), (), ("l1",))
        prepared = await read_prepared(
            shard.bucket, LOAD_KEYS, LOAD_KEYS.prepared_by(epochs[SHARD])
        )
        assert plan.staged == {entry.id for entry in prepared.segments}
        await node.crash()

    run(scenario())


def test_a_collector_that_forgets_what_is_staged_is_noticed(tmp_path, monkeypatch):
    """G-3, on a broken variant."""

    def forgetful(found, manifest, keys):
        return replace(plan_loads(found, manifest, keys), staged=frozenset())

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        await prepared_and_decided(shard, node)
        await node.crash()
        monkeypatch.setattr(garbage, "plan_loads", forgetful)
        monkeypatch.setattr(Loads, "finish", lambda self, load: None)
        second = await shard.lead()
        await after_grace(second)
        with pytest.raises(Conflict, match="is gone"):
            await commit(loader_of(second), "l1", [])
        assert points_of(second.replica) == BEFORE
        await second.crash()

    run(scenario())
