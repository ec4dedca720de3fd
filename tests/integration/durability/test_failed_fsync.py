"""A process whose fsync fails ends, whatever it was doing; the next one reads the disk again.

One real process forks a server for each kind of write, so that FAISS is loaded once.
"""

import asyncio
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_cluster.bucket.filesystem import PosixFileSystem
from shoal_cluster.bucket.local import LocalStore, end_process
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.shard.host import ShardHost
from tests.unit.shard.nodes import (
    KEYS,
    SCHEMA,
    SHARD,
    LoopClock,
    Shard,
    delete,
    points_of,
    upsert,
    write,
)

NAME = (SCHEMA.id, SHARD)
PLACES = ("append", "seal", "tombstones", "manifest", "takeover")
LIVED_ON = 7
PATIENCE_S = 60.0

FORK_SERVERS = """
import json, os, sys
from tests.integration.durability.test_failed_fsync import serve
statuses = {}
for place in sys.argv[3:]:
    pid = os.fork()
    if pid == 0:
        os._exit(serve(sys.argv[1], place, ends=sys.argv[2] == "ends"))
    statuses[place] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
json.dump(statuses, sys.stdout)
"""


class FailingDisk(PosixFileSystem):
    """Fails the sync of a file once its bytes, and of a directory once its path, hold `failing`."""

    failing = ""

    def fsync_directory(self, path: Path) -> None:
        if self.failing and self.failing in f"{path}/":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync_directory(path)


def serve(folder: str, place: str, *, ends: bool) -> int:
    """Leads a shard, has an fsync of `place` fail; returns LIVED_ON if the process gets that far.

    ends: whether the store ends the process, as the actors' stores do.
    """
    disk = FailingDisk()
    root = Path(folder) / place

    async def lead() -> None:
        store = LocalStore(root / "b", filesystem=disk, on_broken=end_process if ends else None)
        shard = Shard(root / "servers")
        await Manifests(store, KEYS, LoopClock()).create_first()
        host = ShardHost(shard.node(store=store).ports, lambda name: shard.network)
        host.open(SCHEMA, SHARD)
        while host.reports()[0].state.value != "ready":
            await asyncio.sleep(0.01)
        await host.promote(NAME)
        primary = host._hosted[NAME].primary
        assert primary is not None
        await write(host, upsert(1, {"a": 1.0, "b": 2.0}))
        primary._sealer.start()
        await asyncio.gather(primary._sealer._seal)
        await write(host, delete(2, "a"))
        disk.failing = {"append": "/wal/", "manifest": "/man/", "takeover": "/wal/"}.get(
            place, "/seg/"
        )
        if place == "takeover":
            await primary.close()
            await asyncio.gather(host.promote(NAME), return_exceptions=True)
        elif place == "append":
            await asyncio.gather(write(host, upsert(3, {"c": 3.0})), return_exceptions=True)
        elif place == "tombstones":  # the only object of a seal without rows
            primary._sealer.start()
            await asyncio.gather(primary._sealer._seal)
        else:
            disk.failing, due = "", disk.failing
            await write(host, upsert(3, {"c": 3.0}))
            disk.failing = due
            primary._sealer.start()
            await asyncio.gather(primary._sealer._seal)

    asyncio.run(lead())
    return LIVED_ON


def forked(folder: Path, *, ends: bool, places: tuple[str, ...]) -> dict[str, int]:
    """Returns each server's exit status."""
    command = [sys.executable, "-c", FORK_SERVERS, str(folder), "ends" if ends else "goes on"]
    done = subprocess.run(
        [*command, *places],
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    statuses: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return statuses


@pytest.mark.slow
def test_failed_fsync_ends_the_process_whatever_was_writing(tmp_path):
    assert forked(tmp_path, ends=True, places=PLACES) == dict.fromkeys(PLACES, 1)

    async def take_over(place: str) -> None:
        shard = Shard(tmp_path / place / "heirs")
        heir = await shard.node(store=LocalStore(tmp_path / place / "b")).load()
        await heir.promote()
        assert points_of(heir.replica).keys() - {"c"} == {"b"}
        await heir.write(upsert(9, {"d": 4.0}))
        await heir.crash()

    for place in PLACES:
        asyncio.run(take_over(place))


@pytest.mark.slow
def test_a_store_that_tells_nobody_would_be_caught_here(tmp_path):
    statuses = forked(tmp_path, ends=False, places=("seal", "takeover"))
    assert statuses == {"seal": LIVED_ON, "takeover": LIVED_ON}
