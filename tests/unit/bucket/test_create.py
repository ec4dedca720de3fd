"""`create` tells the truth whatever the store does: 300 seeds of rivals on a faulty bucket.

Invariants B-1, B-2, B-3.
"""

import asyncio
import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest

from shoal_cluster.bucket.create import BACKOFF_S_MAX, create, create_file_once
from shoal_cluster.bucket.envelope import EnvelopeKind, encode, put_id_of
from shoal_cluster.bucket.faults import FaultPlan, FaultStore, draw_legal_plan
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import PutOutcome, Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import (
    Corrupt,
    Indeterminate,
    Outcome,
    PermissionDenied,
    ShoalError,
    Unavailable,
)
from tests.contract.fakes import SeededIds, VirtualClock

SEEDS = 300
WRITERS_MAX = 4
SLOTS = 5


def body_of(put_id: bytes, payload: bytes = b"") -> bytes:
    return encode(EnvelopeKind.WAL, {"put_id": put_id}, payload)


async def put(
    store: Store, key: str, put_id: bytes, *, clock: Clock, deadline_s: float | None = None
) -> bytes | None:
    return await create(
        store,
        key,
        body_of(put_id),
        put_id=put_id,
        read_put_id=put_id_of,
        clock=clock,
        deadline_s=deadline_s,
    )


def race(seed: int, plan: FaultPlan | None = None) -> Counter[str]:
    """Lets 1 to 4 writers race for 5 slots through faulty handles and checks every claim made.

    Returns how often each fault and each ending occurred.
    """
    rng, ids, clock = random.Random(seed), SeededIds(seed), VirtualClock()
    plan = plan or draw_legal_plan(rng)
    bucket: dict[str, bytes] = {}
    handles = [
        FaultStore(MemoryStore(bucket), plan=plan, rng=random.Random(rng.random()), clock=clock)
        for _ in range(rng.randint(1, WRITERS_MAX))
    ]
    endings: Counter[str] = Counter()

    async def write(writer: int, key: str, put_id: bytes) -> tuple[bytes, bytes | str | None]:
        deadline_s = clock.now_s + 60.0 if rng.random() < 0.5 else None
        try:
            other = await put(handles[writer], key, put_id, clock=clock, deadline_s=deadline_s)
        except (Indeterminate, Corrupt) as error:
            assert error.outcome is Outcome.MAYBE_APPLIED
            return put_id, "unknown"
        except Unavailable:
            return put_id, "refused"
        return put_id, other

    async def run() -> None:
        claims = {}
        for slot in range(SLOTS):
            key = f"wal/{slot}"
            claims[key] = await asyncio.gather(
                *(write(writer, key, ids.put_id()) for writer in range(len(handles)))
            )
        said = dict(bucket)
        for handle in handles:
            await handle.settle()
        for key, told in claims.items():
            winners = [put_id for put_id, other in told if other is None]
            assert len(winners) <= 1
            for put_id, other in told:
                if other is None:
                    assert bucket[key] == said[key] == body_of(put_id)
                    endings["won"] += 1
                elif isinstance(other, bytes):
                    assert bucket[key] == other != body_of(put_id)
                    endings["lost"] += 1
                elif other == "refused":
                    assert bucket.get(key) != body_of(put_id)
                    endings["refused"] += 1
                else:
                    endings["unknown"] += 1

    asyncio.run(run())
    return sum((handle.counts for handle in handles), endings)


def test_every_claim_is_true_over_300_seeds_of_legal_faults() -> None:
    totals: Counter[str] = Counter()
    for seed in range(SEEDS):
        totals += race(seed)
    for name in ("won", "lost", "refused", "lost_reply", "applied_late", "conflict_not_stored"):
        assert totals[name] > SEEDS / 10, totals


def test_damaged_reads_never_turn_into_a_false_claim() -> None:
    plan = FaultPlan(lost_reply=0.2, conflict_not_stored=0.2, torn_read=0.2, bit_flip=0.2)
    totals: Counter[str] = Counter()
    for seed in range(50):
        totals += race(seed, plan)
    assert totals["bit_flip"] > 50 and totals["torn_read"] > 50


def test_the_same_seed_gives_the_same_run() -> None:
    assert [race(seed) for seed in range(10)] == [race(seed) for seed in range(10)]


class ScriptedStore(MemoryStore):
    """Answers creates from a script: an outcome, an error, or None for what a bucket would do."""

    def __init__(self, script: list[PutOutcome | ShoalError | None]) -> None:
        super().__init__()
        self.script = script
        self.bodies: list[bytes] = []
        self.read_errors: list[ShoalError] = []

    async def create(self, key: str, body: bytes) -> PutOutcome:
        self.bodies.append(body)
        step = self.script.pop(0) if self.script else None
        if isinstance(step, ShoalError):
            raise step
        return await super().create(key, body) if step is None else step

    async def get(self, key: str) -> bytes | None:
        if self.read_errors:
            raise self.read_errors.pop(0)
        return await super().get(key)


def test_absent_after_a_doubt_is_not_final_and_the_same_body_is_put_again() -> None:
    store = ScriptedStore([PutOutcome.UNRESOLVED] * 5)
    assert asyncio.run(put(store, "k", b"a" * 16, clock=VirtualClock())) is None
    assert store.bodies == [body_of(b"a" * 16)] * 6


def test_waits_grow_to_a_second_and_end_at_the_deadline() -> None:
    clock = VirtualClock()
    store = ScriptedStore([PutOutcome.UNRESOLVED] * 100)
    with pytest.raises(Indeterminate, match="k at its deadline"):
        asyncio.run(put(store, "k", b"a" * 16, clock=clock, deadline_s=30.0))
    assert 30.0 <= clock.now_s <= 30.0 + BACKOFF_S_MAX
    assert 30 <= len(store.bodies) <= 40


def test_refusal_is_passed_on_only_while_nothing_is_in_doubt() -> None:
    full = Unavailable("disk full")
    with pytest.raises(Unavailable, match="disk full"):
        asyncio.run(put(ScriptedStore([full]), "k", b"a" * 16, clock=VirtualClock()))
    store = ScriptedStore([PutOutcome.UNRESOLVED, full, full])
    assert asyncio.run(put(store, "k", b"a" * 16, clock=VirtualClock())) is None


def test_forbidden_read_back_leaves_the_put_indeterminate() -> None:
    store = ScriptedStore([PutOutcome.UNRESOLVED] * 2)
    store.read_errors = [Unavailable("503"), PermissionDenied("403")]
    with pytest.raises(Indeterminate, match="403"):
        asyncio.run(put(store, "k", b"a" * 16, clock=VirtualClock()))


def test_damaged_object_at_the_key_is_corrupt_and_maybe_applied() -> None:
    store = MemoryStore({"k": body_of(b"a" * 16)[:-1]})
    with pytest.raises(Corrupt) as damaged:
        asyncio.run(put(store, "k", b"a" * 16, clock=VirtualClock()))
    assert damaged.value.outcome is Outcome.MAYBE_APPLIED


def test_our_id_around_another_body_is_corrupt() -> None:
    store = MemoryStore({"k": body_of(b"a" * 16, b"not what was put")})
    with pytest.raises(Corrupt, match="another body"):
        asyncio.run(put(store, "k", b"a" * 16, clock=VirtualClock()))


async def put_file(store: Store, path: Path, sha256: str) -> None:
    await create_file_once(
        store,
        "seg/vectors",
        path,
        sha256=sha256,
        size_bytes=path.stat().st_size,
        clock=VirtualClock(),
        deadline_s=100.0,
    )


def test_file_is_created_whatever_legal_fault_befalls_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"segment" * 99)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    plan = FaultPlan(
        lost_reply=0.2, applied_late=0.2, conflict_not_stored=0.2, unavailable=0.1, torn_read=0.1
    )
    for seed in range(50):
        inner = MemoryStore()
        store = FaultStore(inner, plan=plan, rng=random.Random(seed), clock=VirtualClock())
        asyncio.run(put_file(store, path, sha256))
        assert inner.objects == {"seg/vectors": path.read_bytes()}


def test_other_contents_under_a_unique_name_are_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"ours")
    store = MemoryStore({"seg/vectors": b"what"})
    with pytest.raises(Corrupt, match="seg/vectors has 4 bytes"):
        asyncio.run(put_file(store, path, hashlib.sha256(b"ours").hexdigest()))
