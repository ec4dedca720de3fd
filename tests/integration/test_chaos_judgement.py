"""What `make chaos` calls a violation: broken histories and damaged buckets are told by name."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import shoal
from chaos.run import damages
from chaos.workloads.recorded import COLLECTION, POINTS, RecordedClients
from shoal_cluster.bootstrap import RunningCluster
from tests.simulation.history import Level

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHARDS = 2


@pytest.fixture(scope="module")
def recorded(cluster: RunningCluster) -> RecordedClients:
    """Sessions that ran until each kind of operation was recorded."""
    clients = RecordedClients(cluster.grpc_address, shards=SHARDS, seed=3)
    with shoal.Client(cluster.grpc_address, timeout_s=60.0) as client:
        RecordedClients.create(client, shards=SHARDS, replicas=1)
        clients.start()
        done = asyncio.run(_until_busy(clients))
        clients.stop()
        clients.rest(client.status(COLLECTION))
    assert done
    return clients


async def _until_busy(clients: RecordedClients) -> bool:
    async with asyncio.timeout(60):
        while len({write.type for write in clients.history.writes}) < 3 or (
            clients.history.operations() < 100
        ):
            await asyncio.sleep(0.05)
    return True


def test_a_healthy_cluster_breaks_no_promise(recorded: RecordedClients) -> None:
    assert recorded.violations() == []
    last = recorded.history.reads[-1]
    assert last.level is Level.STRONG and len(last.asked) == POINTS and last.rows
    assert len(recorded.history.resting) == SHARDS


def test_a_row_that_the_last_read_lacks_is_a_lost_write(recorded: RecordedClients) -> None:
    *others, last = recorded.history.reads
    recorded.history.reads[:] = [*others, replace(last, rows=last.rows[1:])]
    try:
        found = recorded.violations()
    finally:
        recorded.history.reads[:] = [*others, last]
    assert any("lost" in violation or "torn" in violation for violation in found), found


def test_a_damaged_bucket_is_told_by_its_object(
    cluster: RunningCluster, recorded: RecordedClients, tmp_path: Path
) -> None:
    copied = next(Path(cluster.bucket).glob("c/*/s/0000/wal/*1"))
    target = tmp_path / "bucket" / copied.relative_to(cluster.bucket)
    target.parent.mkdir(parents=True)
    body = bytearray(copied.read_bytes())
    body[np.argmax(body)] ^= 1
    target.write_bytes(bytes(body))
    found = asyncio.run(damages(tmp_path / "bucket"))
    assert any(str(copied.relative_to(cluster.bucket)) in problem for problem in found), found
