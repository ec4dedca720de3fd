"""Replica: loading, following by push and by poll, and the three read levels."""

import asyncio

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import ObjectEntry
from shoal_cluster.domain.errors import Corrupt, NotFound, Outcome, Unavailable
from shoal_cluster.domain.ids import Epoch, Seq, Slot
from shoal_cluster.domain.limits import PUSHES_MAX
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.shard.calls import ReadLevel
from shoal_cluster.shard.replica import POLL_S
from tests.unit.shard.nodes import KEYS, Shard, delete, points_of, run, upsert

STRONG = ReadLevel(consistency=Consistency.STRONG)


def session(epoch: int, seq: int) -> ReadLevel:
    return ReadLevel(consistency=Consistency.SESSION, at_least=Position(Epoch(epoch), Seq(seq)))


class Watched(MemoryStore):
    """A bucket that writes down what is asked of it, and may run something before answering."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.asked: list[str] = []
        self.before_get: dict[str, object] = {}

    async def get(self, key: str) -> bytes | None:
        self.asked.append(f"GET {key.removeprefix(KEYS.prefix)}")
        action = self.before_get.pop(key, None)
        if action is not None:
            await action()  # type: ignore[operator]
        return await super().get(key)

    async def list(self, prefix: str) -> list[ObjectEntry]:
        self.asked.append(f"LIST {prefix.removeprefix(KEYS.prefix)}")
        return await super().list(prefix)


def collect_below_floor(shard: Shard, floor: int) -> None:
    """Deletes data records as garbage collection would; fences stay for ever."""
    for slot in range(1, floor + 1):
        key = KEYS.slot(Slot(slot))
        if b"\xa4kind\xa4data" in shard.objects.get(key, b""):
            del shard.objects[key]


def test_a_shard_that_was_never_created_cannot_be_loaded(tmp_path):
    async def scenario():
        with pytest.raises(NotFound, match="never created"):
            await Shard(tmp_path).node().load()

    run(scenario())


def test_a_pushed_record_is_visible_at_once(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await shard.lead(), await shard.follow()
        await leader.write(upsert(1, {"a": 1}))
        assert points_of(follower.replica) == {"a": 1}
        assert follower.replica.state.sum == leader.replica.state.sum
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_a_follower_that_is_pushed_nothing_polls(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await shard.lead(), await shard.follow()
        shard.network.connected = False
        await leader.write(upsert(1, {"a": 1}))
        assert points_of(follower.replica) == {}
        await asyncio.sleep(1.1 * POLL_S)
        assert points_of(follower.replica) == {"a": 1}
        assert follower.replica.as_of().staleness_ms <= 1100 * POLL_S
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_records_pushed_out_of_order_are_applied_in_order(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await shard.lead(), await shard.follow()
        shard.network.connected = False
        for number in range(1, 6):
            await leader.write(upsert(number, {"same": number, f"p{number}": number}))
        first = follower.replica.state.slot + 1
        bodies = {slot: shard.objects[KEYS.slot(Slot(slot))] for slot in range(first, first + 5)}
        for slot in reversed(bodies):
            follower.replica.offer(Slot(slot), bodies[slot])
            follower.replica.offer(Slot(slot), bodies[slot])  # twice is no harm
        await asyncio.sleep(0.01)  # far less than POLL_S: the pushes themselves woke it
        assert points_of(follower.replica) == points_of(leader.replica)
        assert follower.replica.state.sum == leader.replica.state.sum
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_pushes_that_cannot_be_applied_yet_are_bounded(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await shard.lead(), await shard.follow()
        shard.network.connected = False
        for number in range(PUSHES_MAX + 20):
            await leader.write(upsert(number + 1, {f"p{number}": number}))
        first = follower.replica.state.slot + 1
        async with follower.replica.advancing:
            for slot in range(first + 1, first + PUSHES_MAX + 20):
                follower.replica.offer(Slot(slot), shard.objects[KEYS.slot(Slot(slot))])
            assert len(follower.replica._pushed) == PUSHES_MAX
        await follower.replica.wait_for(STRONG)
        assert points_of(follower.replica) == points_of(leader.replica)
        assert not follower.replica._pushed
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_pushes_that_cannot_be_applied_yet_are_bounded_in_bytes(tmp_path, monkeypatch):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await shard.lead(), await shard.follow()
        shard.network.connected = False
        for number in range(20):
            await leader.write(upsert(number + 1, {f"p{number}": number}))
        first = follower.replica.state.slot + 1
        bodies = {slot: shard.objects[KEYS.slot(Slot(slot))] for slot in range(first, first + 20)}
        bound = 5 * max(map(len, bodies.values()))
        monkeypatch.setattr("shoal_cluster.shard.replica.PUSH_BYTES_MAX", bound)
        async with follower.replica.advancing:
            for slot in range(first + 1, first + 20):
                follower.replica.offer(Slot(slot), bodies[slot])
            kept = follower.replica._pushed
            assert len(kept) >= 5
            assert sum(map(len, kept.values())) <= bound
        await follower.replica.wait_for(STRONG)
        assert points_of(follower.replica) == points_of(leader.replica)
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_a_session_read_waits_for_what_the_session_saw(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await shard.lead(), await shard.follow()
        shard.network.connected = False
        reply = await leader.write(upsert(1, {"a": 1}))
        await follower.replica.wait_for(session(*reply.position))
        assert points_of(follower.replica) == {"a": 1}
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_a_token_ahead_of_the_log_is_refused(tmp_path):
    async def scenario():
        leader = await (await Shard(tmp_path).create()).lead()
        with pytest.raises(Unavailable, match="token is of another bucket"):
            await leader.replica.wait_for(session(1, 99))
        await leader.crash()

    run(scenario())


def test_a_strong_read_asks_for_the_next_slot_first_and_then_for_manifests(tmp_path):
    """The other order would miss a slot that was collected between the two questions."""

    async def scenario():
        shard = await Shard(tmp_path).create()
        leader = await shard.lead()
        await leader.write(upsert(1, {"a": 1}))
        watched = Watched(shard.objects)
        follower = await shard.node(store=watched).load()
        watched.asked.clear()
        await follower.replica.wait_for(STRONG)
        slot = follower.replica.state.slot + 1
        assert watched.asked == [f"GET wal/{slot:020d}", "LIST man/"]
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_a_strong_read_sees_a_slot_that_is_sealed_and_collected_while_it_asks(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader = await shard.lead()
        watched = Watched(shard.objects)
        follower = await shard.node(store=watched).load()
        shard.network.connected = False
        await leader.write(upsert(1, {"a": 1}))

        async def seal_and_collect() -> None:
            await leader.seal()
            collect_below_floor(shard, leader.replica.manifest.floor_slot)

        watched.before_get[KEYS.slot(Slot(follower.replica.state.slot + 1))] = seal_and_collect
        await follower.replica.wait_for(STRONG)
        assert points_of(follower.replica) == {"a": 1}
        assert follower.replica.state.position == leader.replica.state.position
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_reads_that_wait_share_a_probe_and_later_ones_do_not(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader = await shard.lead()
        watched = Watched(shard.objects)
        follower = await shard.node(store=watched).load()
        watched.asked.clear()
        await asyncio.gather(*(follower.replica.wait_for(STRONG) for _ in range(50)))
        assert len(watched.asked) == 2

        late: list[asyncio.Future[None]] = []

        async def start_another_read() -> None:
            late.append(asyncio.ensure_future(follower.replica.wait_for(STRONG)))

        watched.asked.clear()
        watched.before_get[KEYS.slot(Slot(follower.replica.state.slot + 1))] = start_another_read
        await follower.replica.wait_for(STRONG)
        await late[0]
        assert len(watched.asked) == 4, "it began after the probe had, so it needs its own"
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_a_load_that_garbage_collection_overtakes_begins_again(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader = await shard.lead()
        await leader.write(upsert(1, {"a": 1, "b": 2}))
        await leader.seal()
        watched = Watched(shard.objects)
        gone = leader.replica.manifest.segments[0]
        fetches = 0
        get_range = watched.get_range

        async def get_range_while_collecting(key: str, start: int, length: int) -> bytes | None:
            nonlocal fetches
            fetches += 1
            if fetches == 2:
                await leader.write(delete(2, "a", "b"))
                await leader.seal()  # kills every row: the compaction drops the segment
                for file in gone.files:
                    del shard.objects[file.key]
                collect_below_floor(shard, leader.replica.manifest.floor_slot)
            return await get_range(key, start, length)

        watched.get_range = get_range_while_collecting  # type: ignore[method-assign]
        follower = await shard.node(store=watched).load()
        assert gone.id not in {entry.id for entry in leader.replica.manifest.segments}
        assert points_of(follower.replica) == points_of(leader.replica) == {}
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_a_damaged_record_stops_a_follower_with_the_name_of_the_object(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await shard.lead(), await shard.follow()
        shard.network.connected = False
        await leader.write(upsert(1, {"a": 1}))
        key = KEYS.slot(leader.replica.state.slot)
        sound = shard.objects[key]
        shard.objects[key] = sound[:-1] + bytes([sound[-1] ^ 1])
        with pytest.raises(Corrupt, match=key):
            await follower.replica.wait_for(STRONG)
        await asyncio.sleep(2 * POLL_S)
        assert key in (follower.replica.failure or "")
        shard.objects[key] = sound
        await asyncio.sleep(2 * POLL_S)
        assert follower.replica.failure is None
        assert points_of(follower.replica) == {"a": 1}
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_a_damaged_copy_in_the_cache_is_fetched_again(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader = await shard.lead()
        await leader.write(upsert(1, {"a": 1}))
        await leader.seal()
        follower = await shard.node().load()
        files = follower.ports.files
        entry = leader.replica.manifest.segments[0]
        path = files._cache / entry.id / "vectors"
        path.write_bytes(bytes(path.stat().st_size))
        reader = await files.open_reader(entry, follower.replica.schema)
        assert reader.vector(0).tolist() == [1.0] * 4
        await leader.crash()
        await follower.crash()

    run(scenario())


def test_a_damaged_segment_is_refused_by_name(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        leader = await shard.lead()
        await leader.write(upsert(1, {"a": 1}))
        await leader.seal()
        key = leader.replica.manifest.segments[0].files[0].key
        shard.objects[key] = bytes(len(shard.objects[key]))
        with pytest.raises(Corrupt, match=key):
            await shard.node().load()
        await leader.crash()

    run(scenario())


def test_a_read_that_waits_when_the_replica_is_closed_may_be_asked_elsewhere(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        watched = Watched(shard.objects)
        follower = await shard.node(store=watched).load()
        asked = asyncio.Event()

        async def never_answer() -> None:
            asked.set()
            await asyncio.Event().wait()

        watched.before_get[KEYS.slot(Slot(1))] = never_answer
        reads = [asyncio.ensure_future(follower.replica.wait_for(STRONG)) for _ in range(2)]
        await asked.wait()
        reads[1].cancel()
        await follower.replica.close()
        ended = await asyncio.gather(*reads, return_exceptions=True)
        assert isinstance(ended[0], Unavailable)
        assert ended[0].outcome is Outcome.NOT_APPLIED
        assert isinstance(ended[1], asyncio.CancelledError), "its own caller left"

    run(scenario())


def test_a_follower_closes_even_when_it_is_woken_at_the_same_moment(tmp_path):
    """asyncio.wait_for of Python 3.11 loses the cancellation then, and the follower lived on."""

    async def scenario():
        follower = await (await Shard(tmp_path).create()).follow()
        await asyncio.sleep(0.1)
        follower.replica.wake()
        async with asyncio.timeout(60):
            await follower.replica.close()

    run(scenario())


def test_a_memtable_that_the_log_cut_elsewhere_is_rebuilt_without_going_back(tmp_path):
    """R-4: a primary froze its memtable, was fenced, and its successor froze at another slot."""

    async def scenario():
        shard = await Shard(tmp_path).create()
        leader, follower = await shard.lead(), await shard.follow()
        await leader.write(upsert(1, {"a": 1}))
        follower.replica.state.rotate()  # what a primary that was fenced right then has done
        await leader.write(upsert(2, {"b": 2, "a": 3}))
        floor = leader.replica.state.slot
        point = leader.replica.state.rotate()
        assert point.floor_slot == floor
        shard.network.connected = False
        leader.primary._sealer._seal = asyncio.ensure_future(
            leader.primary._sealer._run_seal(point)
        )
        await leader.settle()
        await leader.write(delete(3, "b"))
        # Ahead of the floor, in a memtable that started before it.
        state = follower.replica.state
        body = shard.objects[KEYS.slot(leader.replica.state.slot)]
        record = follower.replica.wal.decode(leader.replica.state.slot, body)
        state.memtables[-1].start_slot = Slot(state.memtables[-1].start_slot)
        state.apply(record)
        while len(state.memtables) > 1 and state.memtables[-1].start_slot == floor + 1:
            state.memtables[-1].start_slot = Slot(floor)
        assert not state.can_install(leader.replica.manifest)
        before = state.position
        await follower.replica.wait_for(STRONG)
        assert follower.replica.state is not state
        assert follower.replica.state.position >= before
        assert points_of(follower.replica) == points_of(leader.replica) == {"a": 3}
        assert follower.replica.state.sum == leader.replica.state.sum
        await leader.crash()
        await follower.crash()

    run(scenario())
