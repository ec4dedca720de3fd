"""Bulk loads: all or nothing, once, newer than what was there, whoever dies in between.

The steps are those of docs/design/bulk-load.md.
"""

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest

from shoal_cluster.bucket.faults import LEGAL_FAULTS, FaultStore, draw_legal_plan
from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import (
    Conflict,
    Corrupt,
    Indeterminate,
    InvalidRequest,
    NotPrimary,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.ingest.loads import Loader
from shoal_cluster.shard import load_commit, loading
from shoal_cluster.shard.calls import ReadLevel
from tests.unit.shard.loads import (
    AFTER,
    ALL,
    BEFORE,
    CHUNKS,
    COLLECTION,
    LOAD_KEYS,
    OneShard,
    Stoppable,
    after_grace,
    catalogued,
    chunk_of,
    commit,
    loader_of,
    prepared_and_decided,
    problems_of,
    run_load,
    shard_with_rows,
    stage,
)
from tests.unit.shard.nodes import (
    KEYS,
    SCHEMA,
    SHARD,
    LoopClock,
    Shard,
    colored,
    delete,
    points_of,
    run,
    upsert,
)

STRONG = ReadLevel(consistency=Consistency.STRONG)
CLOCK = LoopClock()


def test_loaded_rows_replace_those_in_segments_and_memory_and_come_after_them(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        before = node.replica.state.position
        await stage(loader_of(node), "l1", CHUNKS)
        assert points_of(node.replica) == BEFORE, "staged rows are seen by nobody"
        progress = await commit(loader_of(node), "l1", list(CHUNKS))
        assert progress.rows == len(ALL)
        assert points_of(node.replica) == AFTER
        assert points_of(node.replica, colored("red")) == AFTER, "attributes are indexed"
        state, manifest = node.replica.state, node.replica.manifest
        assert progress.token == {SHARD: state.position}
        assert state.position == Position(before.epoch, before.seq + len(ALL))
        loaded = [entry for entry in manifest.segments if entry.seq_base]
        assert [(e.min_seq, e.max_seq) for e in loaded] == [(before.seq + 1, state.seq)]
        assert manifest.sum == state.sum and manifest.loads == ("l1",)
        assert state.unsealed_rows == 0 and state.live == len(AFTER)
        # What is written after it replaces it, and what follows the floor fits the log.
        await node.write(upsert(4, {"a": 99}))
        await node.write(delete(5, "m"))
        expected = {point: v for point, v in {**AFTER, "a": 99}.items() if point != "m"}
        assert points_of(node.replica) == expected
        await node.seal()
        assert points_of(node.replica) == expected
        assert await problems_of(shard) == []
        await node.crash()
        again = await shard.lead()
        assert points_of(again.replica) == expected
        assert again.replica.state.sum == state.sum
        await again.crash()

    run(scenario())


def test_compaction_merges_loaded_segments_like_others(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        await run_load(loader_of(node), "l1", CHUNKS)
        await node.write(upsert(4, {"n": 77}))
        await node.seal()
        before = node.replica.state.sum
        sealer = node.primary._sealer
        sealer._compact(node.replica.manifest.segments)
        await node.settle()
        (merged,) = node.replica.manifest.segments
        assert (merged.seq_base, merged.rows) == (0, len(AFTER))
        assert node.replica.state.sum == before
        assert points_of(node.replica) == {**AFTER, "n": 77}
        assert await problems_of(shard) == []
        await node.crash()

    run(scenario())


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_crash_before_any_put_leaves_nothing_or_all_and_the_same_load_finishes(
    tmp_path, with_rows
):
    """Coordinator and primary stop dead together before the n-th put, for every n."""

    async def one(number: int) -> bool:
        scratch = tmp_path / str(number)
        if with_rows:
            shard, node = await shard_with_rows(scratch)
            before, after = BEFORE, AFTER
            await node.crash()
        else:
            shard = await catalogued(await Shard(scratch).create())
            before, after = {}, dict(ALL)
        store = Stoppable(shard.objects)
        node = await shard.node(store=store).load()
        await node.promote()
        store.puts_left = store.puts + number
        running = asyncio.ensure_future(run_load(loader_of(node, store), "l1", CHUNKS))
        stopping = asyncio.ensure_future(store.stopped.wait())
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        finished = running.done()
        for task in (running, stopping):
            task.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)
        await node.crash()
        second = await shard.lead()
        assert points_of(second.replica) in (before, after)
        decided = LOAD_KEYS.decision in shard.objects
        assert decided or points_of(second.replica) == before
        assert await problems_of(shard) == []
        await run_load(loader_of(second), "l1", CHUNKS)
        assert points_of(second.replica) == after
        await run_load(loader_of(second), "l1", CHUNKS)
        assert points_of(second.replica) == after
        await after_grace(second)
        left = [key for key in shard.objects if "/load/" in key]
        assert left == [LOAD_KEYS.decision], "what was staged is collected"
        listed = {entry.id for entry in second.replica.manifest.segments}
        kept = {key.split("/")[5] for key in shard.objects if key.startswith(KEYS.segments)}
        assert kept == listed, "what was built in vain is collected"
        assert points_of(second.replica) == after
        assert await problems_of(shard) == []
        await second.crash()
        return finished

    async def scenario():
        for number in range(60):
            if await one(number):
                assert number > 10
                return
        raise AssertionError("it never finished")

    run(scenario())


def test_a_deposed_primary_cannot_commit(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        shard.network.connected = False
        await prepared_and_decided(shard, node)
        second = await shard.lead()
        with pytest.raises(NotPrimary):
            await node.primary.load(commit_call())
        assert not node.primary.serving
        await second.primary.load(commit_call())
        assert points_of(second.replica) == AFTER
        assert second.replica.manifest.loads == ("l1",)
        await node.replica.probe()
        assert (
            points_of(node.replica) == AFTER and node.replica.state.sum == second.replica.state.sum
        )
        assert await problems_of(shard) == []
        await node.crash()
        await second.crash()

    run(scenario())


def commit_call() -> loading.LoadCall:
    return loading.LoadCall(
        collection=SCHEMA.id, shard=SHARD, load="l1", step=loading.LoadStep.COMMIT, wait_s=60.0
    )


def test_followers_get_the_rows_with_the_position_whatever_they_are_told_first(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        told, deaf = await shard.follow(), await shard.follow()
        shard.network.nodes.remove(deaf)
        progress = await run_load(loader_of(node), "l1", CHUNKS)
        level = ReadLevel(consistency=Consistency.SESSION, at_least=progress.token[SHARD])
        await node.write(
            upsert(4, {"z": 1})
        )  # its record reaches `told` before or after the manifest
        for follower in (told, deaf):
            await follower.replica.wait_for(level)
            assert points_of(follower.replica).items() >= AFTER.items()
            await follower.replica.wait_for(STRONG)
            assert points_of(follower.replica) == {**AFTER, "z": 1}
            assert follower.replica.state.sum == node.replica.state.sum
            assert follower.replica.failure is None
        for each in (told, deaf, node):
            await each.crash()

    run(scenario())


def test_a_record_behind_a_load_fits_nobody_who_lacks_its_manifest(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        follower = await shard.follow()
        shard.network.connected = False
        await run_load(loader_of(node), "l1", CHUNKS)
        await node.write(upsert(4, {"z": 1}))
        record = await node.replica.wal.read(node.replica.state.slot)
        follower.replica.offer(record.slot, node.replica.wal.encode(record))
        assert points_of(follower.replica) == BEFORE, "not applied without the load"
        await follower.replica.probe()
        assert points_of(follower.replica) == {**AFTER, "z": 1}
        await follower.crash()
        await node.crash()

    run(scenario())


def test_writes_wait_while_a_load_is_committed_and_none_is_lost(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        loader = loader_of(node)
        await stage(loader, "l1", CHUNKS)
        stop = asyncio.Event()
        written: dict[str, float] = {}

        async def writer(number: int) -> None:
            request = 100
            while not stop.is_set():
                request += 1
                point = f"w{number}-{request % 7}"
                await node.write(upsert(request, {point: request}, client=f"w{number}"))
                written[point] = request
                await asyncio.sleep(0.001)

        writers = [asyncio.ensure_future(writer(number)) for number in range(3)]
        await asyncio.sleep(0.05)
        await commit(loader, "l1", list(CHUNKS))
        await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*writers)
        assert points_of(node.replica) == {**AFTER, **written}
        assert await problems_of(shard) == []
        await node.crash()
        again = await shard.lead()
        assert points_of(again.replica) == {**AFTER, **written}
        await again.crash()

    run(scenario())


@pytest.mark.parametrize("rows", [1, limits.LOAD_SEGMENT_ROWS], ids=["two segments", "one segment"])
def test_an_id_that_is_there_twice_is_refused_by_name(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(limits, "LOAD_SEGMENT_ROWS", rows)

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        chunks = {"0-0": {"x": 1.0, "y": 1.0}, "0-1": {"z": 1.0, "x": 2.0}}
        with pytest.raises(InvalidRequest, match="'x' is in the load twice"):
            await run_load(loader_of(node), "l1", chunks)
        assert points_of(node.replica) == BEFORE
        await loader_of(node).abort(COLLECTION, "l1")
        await after_grace(node)
        assert await problems_of(shard) == []
        await node.crash()

    run(scenario())


def test_several_segments_of_one_load_appear_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "LOAD_SEGMENT_ROWS", 1)

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        seen = []
        install = node.replica.install

        def watched(manifest, views):
            install(manifest, views)
            seen.append(points_of(node.replica))

        node.replica.install = watched
        await run_load(loader_of(node), "l1", CHUNKS)
        assert [one for one in seen if one not in (BEFORE, AFTER)] == []
        assert len([e for e in node.replica.manifest.segments if e.seq_base]) == len(CHUNKS)
        assert await problems_of(shard) == []
        await node.crash()

    run(scenario())


def test_a_chunk_staged_again_is_the_same_or_refused(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        loader = loader_of(node)
        await stage(loader, "l1", CHUNKS)
        objects = dict(shard.objects)
        await stage(loader, "l1", CHUNKS)
        assert shard.objects == objects
        with pytest.raises(Conflict, match="staged before with other rows"):
            await loader.stage(chunk_of("l1", "0-0", {"a": 7.0}))
        with pytest.raises(InvalidRequest, match="chunk 0-9 is not staged"):
            await loader.commit(COLLECTION, "l1", ["0-0", "0-9"], timeout_s=1)
        await node.crash()

    run(scenario())


def test_a_shard_that_has_not_heard_of_the_rows_schema_prepares_nothing(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        call = loading.LoadCall(
            collection=SCHEMA.id,
            shard=SHARD,
            load="l1",
            step=loading.LoadStep.PREPARE,
            wait_s=1.0,
            chunks=(("0-0", 2),),
            schema_version=2,
        )
        with pytest.raises(Unavailable, match="version 2"):
            await node.primary.load(call)
        assert not [key for key in shard.objects if "/load/" in key]
        await node.crash()

    run(scenario())


def test_two_coordinators_with_one_load_commit_it_once(tmp_path):
    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        await asyncio.gather(
            *(run_load(loader_of(node, seed=seed), "l1", CHUNKS) for seed in range(3))
        )
        assert points_of(node.replica) == AFTER
        assert node.replica.state.seq == 8 + len(ALL)
        assert await problems_of(shard) == []
        await node.crash()

    run(scenario())


@pytest.mark.parametrize("seed", range(20))
def test_a_load_survives_any_legal_faults_of_the_bucket_and_a_takeover(tmp_path, seed):
    """Lost, late and repeated replies, refusals and slowness, for primary and coordinator."""

    async def scenario():
        rng = random.Random(seed)
        shard, first = await shard_with_rows(tmp_path)
        await first.crash()
        drawn = draw_legal_plan(rng)
        # A load is some twenty objects in a row: at up to 0.6 an operation none would ever end.
        plan = replace(
            drawn, **{fault.value: drawn.probability(fault) / 3 for fault in LEGAL_FAULTS}
        )
        written: dict[str, float] = {}
        nodes = [await insistently(shard.node(plan).load)]
        await insistently(nodes[0].promote)
        loader = loader_of(nodes[0], FaultStore(shard.bucket, plan=plan, rng=rng, clock=CLOCK))
        calls = loader._caller
        assert isinstance(calls, OneShard)

        async def take_over_once() -> None:
            await asyncio.sleep(rng.random() * 4)
            calls.leader = None
            await nodes[0].crash()
            nodes.append(await insistently(shard.node(plan).load))
            await insistently(nodes[1].promote)
            calls.leader = nodes[1]

        async def writes() -> None:
            for number in range(8):
                leader = calls.leader
                if leader is not None:
                    with contextlib.suppress(ShoalError):
                        await leader.write(upsert(100 + number, {f"w{number}": number}))
                        written[f"w{number}"] = number
                await asyncio.sleep(rng.random())

        others = [asyncio.ensure_future(writes())]
        if seed % 2:
            others.append(asyncio.ensure_future(take_over_once()))
        await insistently(lambda: run_load(loader, "l1", CHUNKS))
        await asyncio.gather(*others)
        leader = nodes[-1]
        await insistently(lambda: commit(loader, "l1", []))
        found = points_of(leader.replica)
        assert found.items() >= {**AFTER, **written}.items()
        assert not set(found) - set(AFTER) - {f"w{number}" for number in range(8)}
        assert [e for e in leader.replica.manifest.loads] == ["l1"]
        assert await problems_of(shard) == []
        await leader.crash()
        again = await shard.lead()
        assert points_of(again.replica).items() >= {**AFTER, **written}.items()
        await again.crash()

    run(scenario())


async def insistently(work):
    """Repeats work that the bucket, or a takeover, kept from being done."""
    for _ in range(200):
        try:
            return await work()
        except (Unavailable, Indeterminate, Conflict, TimeoutError):
            await asyncio.sleep(0.5)
    raise AssertionError("given up after 200 attempts")


def test_a_load_that_would_change_the_sum_wrongly_is_not_committed(tmp_path, monkeypatch):
    """L-2 is seen to fail on a broken variant: one that forgets what it replaces."""
    monkeypatch.setattr(
        load_commit, "_replaced_rows", lambda reader, loaded: load_commit.np.array([0])
    )

    def wrong(reader, rows):
        return 0

    monkeypatch.setattr(load_commit, "_sum", wrong)

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        with pytest.raises((Corrupt, NotPrimary)):
            await run_load(loader_of(node), "l1", CHUNKS)
        assert not node.primary.serving
        await node.crash()
        again = await shard.lead()
        assert points_of(again.replica) == BEFORE
        await again.crash()

    run(scenario())


def test_a_collection_partitioned_over_shards_refuses_loads(tmp_path):
    async def scenario():
        _, node = await shard_with_rows(tmp_path)
        loader = loader_of(node)
        calls = loader._topology
        assert isinstance(calls, OneShard) and isinstance(loader, Loader)
        topology = calls.current()
        place = topology.collections[COLLECTION]
        schema = replace(SCHEMA, partition_by="color", shards=2)
        changed = replace(topology, collections={COLLECTION: replace(place, schema=schema)})
        calls.current = lambda: changed
        with pytest.raises(InvalidRequest, match="use bulk_upsert"):
            await loader.stage(chunk_of("l1", "0-0", {"a": 1.0}))
        await node.crash()

    run(scenario())


def test_a_strong_read_waits_for_a_load_that_others_may_show_already(tmp_path, monkeypatch):
    """The manifest has landed, its reply has not come: a follower shows the load, so we must."""
    landed, answered = asyncio.Event(), asyncio.Event()

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        await stage(loader_of(node), "l1", CHUNKS)
        manifests = node.replica.manifests
        committing = manifests.commit

        async def slow(parent, child):
            done = await committing(parent, child)
            if child.loads:
                landed.set()
                await answered.wait()
            return done

        monkeypatch.setattr(manifests, "commit", slow)
        load = asyncio.ensure_future(commit(loader_of(node), "l1", list(CHUNKS)))
        await landed.wait()
        follower = await shard.follow()
        await follower.replica.wait_for(STRONG)
        assert points_of(follower.replica) == AFTER
        reading = asyncio.ensure_future(node.replica.wait_for(STRONG))
        await asyncio.sleep(5.0)
        assert not reading.done()
        answered.set()
        await reading
        assert points_of(node.replica) == AFTER
        await load
        await node.crash()
        await follower.crash()

    run(scenario())


def test_a_shard_forgets_no_load_and_takes_no_more_than_it_remembers(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "LOADS_REMEMBERED", 2)

    async def scenario():
        shard, node = await shard_with_rows(tmp_path)
        for load in ("l1", "l2"):
            await run_load(loader_of(node), load, CHUNKS)
        await stage(loader_of(node), "l3", CHUNKS)
        with pytest.raises(InvalidRequest, match="has had 2 bulk loads") as caught:
            await commit(loader_of(node), "l3", list(CHUNKS))
        assert caught.value.field == "load_id"
        assert node.replica.manifest.loads == ("l1", "l2")
        await run_load(loader_of(node), "l1", CHUNKS)
        assert node.replica.manifest.loads == ("l1", "l2")
        assert await problems_of(shard) == []
        await node.crash()

    run(scenario())
