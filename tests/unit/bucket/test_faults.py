"""The faulty store does each thing its plan names, at the rate the plan names."""

import asyncio
import random

import pytest

from shoal_cluster.bucket.faults import FaultPlan, FaultStore
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain.errors import Unavailable
from tests.contract.fakes import VirtualClock

UNRESOLVED = PutOutcome.UNRESOLVED


def faulty(plan: FaultPlan, objects: dict[str, bytes] | None = None, seed: int = 1) -> FaultStore:
    return FaultStore(
        MemoryStore(objects), plan=plan, rng=random.Random(seed), clock=VirtualClock()
    )


@pytest.mark.parametrize(
    ("plan", "stored"),
    [
        (FaultPlan(lost_reply=1.0), True),
        (FaultPlan(not_applied=1.0), False),
        (FaultPlan(conflict_not_stored=1.0), False),
        (FaultPlan(unavailable=1.0), False),
    ],
)
def test_doubtful_create_is_unresolved_and_stored_as_planned(plan: FaultPlan, stored: bool) -> None:
    objects: dict[str, bytes] = {}
    assert asyncio.run(faulty(plan, objects).create("k", b"x")) is UNRESOLVED
    assert objects == ({"k": b"x"} if stored else {})


def test_late_put_lands_after_other_operations_and_never_over_another() -> None:
    async def run() -> None:
        objects: dict[str, bytes] = {}
        store = faulty(FaultPlan(applied_late=1.0, late_operations_max=5), objects)
        assert await store.create("k", b"late") is UNRESOLVED
        assert objects == {}
        for _ in range(5):
            await store.get("other")
        assert objects == {"k": b"late"}
        assert await store.create("k2", b"late") is UNRESOLVED
        objects["k2"] = b"first"
        await store.settle()
        assert objects["k2"] == b"first"

    asyncio.run(run())


def test_burst_refuses_that_many_operations() -> None:
    async def run() -> None:
        store = faulty(FaultPlan(unavailable=1.0, burst_operations=3))
        with pytest.raises(Unavailable):
            await store.get("k")
        store.plan = FaultPlan()
        for _ in range(2):
            with pytest.raises(Unavailable):
                await store.list("")
        assert await store.get("k") is None

    asyncio.run(run())


def test_reads_are_damaged_as_planned() -> None:
    body = bytes(range(200))
    torn = asyncio.run(faulty(FaultPlan(torn_read=1.0), {"k": body}).get("k"))
    assert torn is not None and len(torn) < 200 and body.startswith(torn)
    flipped = asyncio.run(faulty(FaultPlan(bit_flip=1.0), {"k": body}).get("k"))
    assert flipped is not None and len(flipped) == 200
    assert sum((a ^ b).bit_count() for a, b in zip(body, flipped, strict=True)) == 1


def test_stale_listing_repeats_the_previous_one() -> None:
    async def run() -> None:
        store = faulty(FaultPlan(stale_list=1.0))
        assert await store.list("") == []
        await store.create("k", b"x")
        assert await store.list("") == []
        store.plan = FaultPlan()
        assert len(await store.list("")) == 1

    asyncio.run(run())


def test_no_space_refuses_and_slowness_takes_time() -> None:
    store = faulty(FaultPlan(no_space=1.0))
    with pytest.raises(Unavailable, match="space"):
        asyncio.run(store.create("k", b"x"))
    clock = VirtualClock()
    slow = FaultStore(MemoryStore(), plan=FaultPlan(slow=1.0), rng=random.Random(1), clock=clock)
    assert asyncio.run(slow.create("k", b"x")) is PutOutcome.CREATED
    assert 0.0 < clock.now_s <= 1.0


def test_unanswered_delete_is_applied_or_not_as_planned() -> None:
    for plan, left in ((FaultPlan(lost_reply=1.0), 0), (FaultPlan(not_applied=1.0), 1)):
        objects = {"k": b"x"}
        with pytest.raises(Unavailable):
            asyncio.run(faulty(plan, objects).delete("k"))
        assert len(objects) == left


def test_counts_follow_the_probabilities() -> None:
    async def run() -> None:
        store = faulty(FaultPlan(lost_reply=0.3, not_applied=0.1))
        for number in range(2000):
            await store.create(f"k{number}", b"x")
        assert store.counts["lost_reply"] == pytest.approx(600, abs=80)
        assert store.counts["not_applied"] == pytest.approx(200, abs=60)
        assert store.counts.total() == 2000

    asyncio.run(run())


def test_probabilities_over_one_are_refused() -> None:
    with pytest.raises(AssertionError):
        FaultPlan(lost_reply=0.6, not_applied=0.6)
