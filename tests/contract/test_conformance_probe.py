"""The probe refuses stores that break a requirement, and says which."""

import asyncio

import pytest

from shoal_cluster.bucket.conformance import probe
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.domain.errors import Conflict
from tests.contract.broken_stores import (
    CachedAbsenceStore,
    CheckThenPutStore,
    LateListingStore,
    OverwritingStore,
    UndeletingStore,
)
from tests.contract.fakes import SeededIds, VirtualClock


@pytest.mark.parametrize(
    ("broken", "requirement"),
    [
        (OverwritingStore, "R1"),
        (CheckThenPutStore, "R1"),
        (CachedAbsenceStore, "R2"),
        (LateListingStore, "R2"),
        (UndeletingStore, "delete"),
    ],
)
def test_broken_store_is_refused_naming_the_requirement(
    broken: type[MemoryStore], requirement: str
) -> None:
    objects: dict[str, bytes] = {}
    first, second = broken(objects), broken(objects)
    with pytest.raises(Conflict, match=f"cannot hold Shoal: .*{requirement}"):
        asyncio.run(probe(first, second, clock=VirtualClock(), ids=SeededIds(1)))


def test_two_buckets_taken_for_one_are_refused() -> None:
    with pytest.raises(Conflict, match="R2"):
        asyncio.run(probe(MemoryStore(), MemoryStore(), clock=VirtualClock(), ids=SeededIds(1)))
