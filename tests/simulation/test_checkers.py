"""The checkers that look inside can say no. history.py has a test file of its own."""

import asyncio
from pathlib import Path

from shoal_cluster.domain.ids import CollectionId, Epoch, Seq, ShardNumber, Slot
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.wal.record import FIRST_PUT_ID, RecordKind, WalIdentity, WalRecord, encode_record
from tests.simulation.audit import Audit
from tests.simulation.bucket import WatchedObjects
from tests.simulation.catalog_ledger import ABSENT, ALTERED, CREATED, CatalogLedger
from tests.simulation.loop import SimulatedLoop, run
from tests.simulation.power_cuts import POINTS, Ledger
from tests.simulation.world import World

CLUSTER = bytes(16)
COLLECTION = CollectionId("c" * 32)
KEYS = ShardKeys(COLLECTION, ShardNumber(0))


def log_of_fences(*epochs: int) -> WatchedObjects:
    """Returns a bucket whose log holds one fence of each epoch."""
    objects = WatchedObjects()
    previous = FIRST_PUT_ID
    for slot, epoch in enumerate(epochs, start=1):
        fence = WalRecord(
            slot=Slot(slot),
            epoch=Epoch(epoch),
            kind=RecordKind.FENCE,
            put_id=bytes([slot]) * 16,
            prev_put_id=previous,
            first_seq=Seq(1),
            memtable_start=Slot(1),
        )
        identity = WalIdentity(cluster_uuid=CLUSTER, collection=COLLECTION, shard=0)
        objects[KEYS.slot(fence.slot)] = encode_record(fence, identity)
        previous = fence.put_id
    return objects


def test_two_fences_of_one_epoch_are_two_primaries() -> None:
    assert Audit(log_of_fences(1, 2, 3)).judge(CLUSTER) == []
    assert Audit(log_of_fences(1, 2, 2)).judge(CLUSTER) == [
        "shard 0: two primaries: epoch 2 fenced slot 2 and slot 3"
    ]


def judged(ledger: CatalogLedger, scratch: Path) -> list[str]:
    """Returns what a ledger says of an empty catalog."""

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        world = World(0, loop, scratch)
        await ledger.judge(world, WatchedObjects())
        return world.violations

    return run(main(), limit_s=10)


def test_an_acknowledged_collection_that_is_not_in_the_catalog_is_lost(tmp_path: Path) -> None:
    ledger = CatalogLedger()
    ledger.sent("a", CREATED)
    ledger.acknowledged("a", CREATED)
    ledger.sent("a", ALTERED)
    assert judged(ledger, tmp_path) == [
        "acknowledged change of the catalog lost: collection a is absent, "
        "should be altered or created"
    ]
    ledger.sent("a", ABSENT)
    assert judged(ledger, tmp_path) == []


def test_a_row_that_goes_back_after_a_power_cut_is_noticed() -> None:
    ledger = Ledger()
    point = POINTS[0]
    ledger.sent(point, 1)
    ledger.acknowledged(point, 1)
    ledger.sent(point, 2)
    ledger.shown({point: 2}, "after a start")
    assert not ledger.violations
    ledger.shown({point: 1}, "after a start")
    assert len(ledger.violations) == 1, "what a read has shown must stay"
