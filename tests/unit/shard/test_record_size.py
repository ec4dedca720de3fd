"""A WAL record, and what waits to become one, is bounded in bytes, whatever the requests make."""

import asyncio

import numpy as np
import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import InvalidRequest, Outcome, Overloaded
from shoal_cluster.domain.ids import Epoch, Seq, Slot
from shoal_cluster.domain.point import NO_PROVENANCE, encode_tail
from shoal_cluster.filtering.attributes import ATTRIBUTE_BYTES_MAX
from shoal_cluster.shard.calls import WriteCall, WriteKind
from shoal_cluster.shard.composition import BATCH_BYTES_MAX, Composition
from shoal_cluster.shard.state import ShardState
from shoal_cluster.wal.record import RecordKind, WalIdentity, WalRecord, encode_record
from tests.unit.shard.nodes import (
    CLUSTER_UUID,
    DIMENSION,
    KEYS,
    SCHEMA,
    SHARD,
    Shard,
    delete,
    patch,
    run,
    tail,
    upsert,
)

EPOCH = Epoch(1)
LARGE = 250_000
ROWS_IN_A_RECORD = limits.WAL_RECORD_BYTES_MAX // LARGE


def large(request_no: int, names: list[str], size_bytes: int = LARGE) -> WriteCall:
    return WriteCall(
        collection=SCHEMA.id,
        shard=SHARD,
        client_id="client",
        request_no=request_no,
        kind=WriteKind.UPSERT,
        ids=[name.encode() for name in names],
        tails=[tail(payload=b"x" * size_bytes)] * len(names),
        body=np.zeros((len(names), DIMENSION), np.float32).tobytes(),
    )


def record_of(state: ShardState, composition: Composition) -> WalRecord:
    slot = Slot(state.slot + 1)
    return WalRecord(
        slot=slot,
        epoch=EPOCH,
        kind=RecordKind.DATA,
        put_id=slot.to_bytes(16, "big"),
        prev_put_id=state.last_put_id,
        first_seq=Seq(state.seq + 1),
        memtable_start=state.active.start_slot,
        batch=composition.batch(),
    )


def size_of(record: WalRecord) -> int:
    identity = WalIdentity(cluster_uuid=CLUSTER_UUID, collection=SCHEMA.id, shard=SHARD)
    return len(encode_record(record, identity))


def state_of_large_rows(names: list[str]) -> ShardState:
    state = ShardState(SCHEMA)
    for no, start in enumerate(range(0, len(names), 30), start=1):
        composition = Composition(state, EPOCH)
        assert composition.add(large(no, names[start : start + 30])) is not None
        state.apply(record_of(state, composition))
    return state


def test_patches_fill_a_record_by_what_they_write_not_by_what_they_say():
    names = [f"p{i:02}" for i in range(40)]
    state = state_of_large_rows(names)
    composition = Composition(state, EPOCH)
    answers = [
        composition.add(patch(100 + i, {name: {"color": "blue"}})) for i, name in enumerate(names)
    ]
    taken = [answer for answer in answers if answer is not None]
    assert len(taken) == composition.requests == ROWS_IN_A_RECORD
    assert answers[ROWS_IN_A_RECORD:] == [None] * (40 - ROWS_IN_A_RECORD)
    assert size_of(record_of(state, composition)) <= limits.WAL_RECORD_BYTES_MAX
    later = Composition(state, EPOCH)
    assert later.add(patch(139, {names[39]: {"color": "blue"}})) is not None


def test_a_patch_that_makes_more_than_a_record_is_refused_and_adds_nothing():
    names = [f"p{i:02}" for i in range(40)]
    state = state_of_large_rows(names)
    composition = Composition(state, EPOCH)
    with pytest.raises(InvalidRequest, match="send fewer than 34 points") as refused:
        composition.add(patch(100, {name: {"color": "blue"} for name in names}))
    assert (refused.value.field, refused.value.outcome) == ("ids", Outcome.NOT_APPLIED)
    assert refused.value.limit == f"{BATCH_BYTES_MAX} bytes for one shard"
    assert composition.requests == composition.operations == 0
    half = composition.add(patch(101, {name: {"color": "blue"} for name in names[:33]}))
    assert half is not None and half.affected == 33


def test_patches_cannot_add_up_to_a_row_that_an_upsert_would_refuse():
    words = ["w" * 1024] * 255  # as "size", which only has to be declared here
    composition = Composition(ShardState(SCHEMA), EPOCH)
    composition.add(large(1, ["a"], 0))
    assert composition.add(patch(2, {"a": {"color": "c" * 1024}})) is not None
    assert len(words) * 1024 + 1024 == ATTRIBUTE_BYTES_MAX
    assert composition.add(patch(3, {"a": {"size": words}})) is not None
    with pytest.raises(InvalidRequest, match="'a', once patched, have 262145 bytes") as refused:
        composition.add(patch(4, {"a": {"size": [*words, "x"]}}))
    assert (refused.value.field, composition.requests) == ("set", 3)


@pytest.mark.parametrize("id_bytes", [1, limits.POINT_ID_BYTES_MAX])
@pytest.mark.parametrize("tail_bytes", [0, 300, 70_000])
@pytest.mark.parametrize("rows", [1, 40])
def test_no_record_is_larger_than_its_bound_however_small_or_large_its_parts(
    id_bytes: int, tail_bytes: int, rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shoal_cluster.shard.composition.BATCH_BYTES_MAX", 1 << 20)
    state = ShardState(SCHEMA)
    composition = Composition(state, EPOCH)
    body = np.zeros((rows, DIMENSION), np.float32).tobytes()
    row_tail = encode_tail(1.0, {}, b"x" * tail_bytes, NO_PROVENANCE)
    for no in range(10_000):
        call = WriteCall(
            collection=SCHEMA.id,
            shard=SHARD,
            client_id="c" * 70,
            request_no=(1 << 62) + no,
            kind=WriteKind.UPSERT,
            ids=[f"{no % 10}".encode() * id_bytes] * rows,
            tails=[row_tail] * rows,
            body=body,
        )
        if len(row_tail) * rows > 1 << 20:
            with pytest.raises(InvalidRequest):
                composition.add(call)
            return
        if composition.full or composition.add(call) is None:
            break
    size_bytes = size_of(record_of(state, composition))
    assert size_bytes <= (1 << 20) + 4 * limits.KIB
    if not composition.operations >= limits.WAL_RECORD_OPS_MAX:
        assert size_bytes > 1 << 18, "the allowances are not far from the truth"


def test_requests_that_do_not_fit_one_record_go_into_the_next_in_their_order(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        names = [f"p{i:02}" for i in range(40)]
        await node.write(large(1, names[:20]))
        await node.write(large(2, names[20:]))
        before = node.primary.appends
        calls = [patch(10 + i, {name: {"color": "blue"}}) for i, name in enumerate(names)]
        calls.append(delete(50, names[-1]))
        calls.append(upsert(51, {names[0]: 7}))
        replies = await asyncio.gather(*(node.write(call) for call in calls))
        assert [reply.first_seq for reply in replies] == list(range(41, 83))
        assert node.primary.appends == before + 2, "33 patches, then 7 and the rest"
        records = [body for key, body in shard.objects.items() if key.startswith(KEYS.wal)]
        assert max(map(len, records)) <= limits.WAL_RECORD_BYTES_MAX
        assert max(map(len, records)) > limits.WAL_RECORD_BYTES_MAX // 2
        await node.crash()

    run(scenario())


class SlowBucket(MemoryStore):
    """A bucket whose appends take as long as `append_s` says."""

    append_s = 0.0

    async def create(self, key: str, body: bytes) -> PutOutcome:
        if key.startswith(KEYS.wal):
            await asyncio.sleep(self.append_s)
        return await super().create(key, body)


@pytest.mark.parametrize(
    ("append_s", "retry_after_ms"), [(0.0, 20), (0.3, 600), (1.0, 2000), (60.0, 5000)]
)
def test_a_full_queue_refuses_more_and_says_when_half_of_it_will_have_drained(
    tmp_path, monkeypatch, append_s, retry_after_ms
):
    monkeypatch.setattr(limits, "WAL_QUEUE_BYTES_MAX", 64_000)
    monkeypatch.setattr(limits, "WAL_RECORD_BYTES_MAX", 16_000)

    async def scenario():
        shard = await Shard(tmp_path).create()
        bucket = SlowBucket(shard.objects)
        node = await shard.node(store=bucket).load()
        await node.promote()
        bucket.append_s = append_s
        await node.write(upsert(1, {"first": 1}))
        row = [large(10 + i, [f"p{i:02}"], 999 - 30) for i in range(64)]
        size_bytes = node.primary._size_of(row[0])
        row = row[: -(-64_000 // size_bytes)]
        writing = [asyncio.ensure_future(node.write(call)) for call in row]
        await asyncio.sleep(0)  # all are queued, none is composed
        with pytest.raises(Overloaded, match="bytes of writes queued; nothing was") as refused:
            await node.write(upsert(2, {"late": 1}))
        assert refused.value.limit == "64000 bytes"
        assert refused.value.retry_after_ms == pytest.approx(retry_after_ms, rel=0.02)
        await asyncio.gather(*writing)
        await node.write(upsert(2, {"late": 1}))
        assert node.replica.state.live == len(row) + 2
        await node.crash()

    run(scenario())


def test_what_patches_say_counts_in_the_queue(tmp_path):
    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        words = {"color": "c" * 1000}
        call = patch(1, {f"p{i}": words for i in range(50)})
        assert node.primary._size_of(call) > 50_000
        await node.crash()

    run(scenario())


def test_a_memtable_full_in_bytes_slows_writers_while_it_is_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MEMTABLE_BYTES_MAX", 20_000)
    monkeypatch.setattr("shoal_cluster.shard.sealing.SEAL_BYTES", 5_000)

    async def scenario():
        node = await (await Shard(tmp_path).create()).lead()
        release = asyncio.Event()
        build = node.ports.builds.build

        async def slow_build(order):
            await release.wait()
            return await build(order)

        monkeypatch.setattr(node.ports.builds, "build", slow_build)
        taken = 0
        with pytest.raises(Overloaded, match="wait for a segment to be built") as refused:
            for number in range(1, 60):
                await node.write(large(number, [f"p{number}"], 1000))
                taken = number
        assert "20000 bytes" in refused.value.limit
        assert refused.value.retry_after_ms > 0
        assert 20 <= taken <= 30, "a sealed part of 5 kB, and 20 kB that wait"
        release.set()
        await node.settle()
        await node.write(large(taken + 1, [f"p{taken + 1}"], 1000))
        assert node.replica.state.live == taken + 1
        await node.crash()

    run(scenario())
