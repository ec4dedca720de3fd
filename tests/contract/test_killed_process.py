"""After a kill in mid-put, what was acknowledged is there and all there is, is whole (B-6)."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_cluster.bucket.envelope import EnvelopeKind, decode
from shoal_cluster.bucket.filesystem import TEMPORARY_PREFIX
from shoal_cluster.bucket.local import LocalStore

ROUNDS = 5
ACKNOWLEDGED_PER_ROUND = 40

WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from shoal_cluster.bucket.envelope import EnvelopeKind, encode
from shoal_cluster.bucket.local import LocalStore

async def write(store, lane):
    for number in itertools.count():
        key = f"wal/{sys.argv[2]}/{lane}/{number:06}"
        await store.create(key, encode(EnvelopeKind.WAL, {"key": key}, bytes(20_000)))
        print(key, flush=True)

async def run():
    store = LocalStore(Path(sys.argv[1]))
    await asyncio.gather(*(write(store, lane) for lane in range(4)))

asyncio.run(run())
"""


@pytest.mark.slow
def test_killed_writer_leaves_whole_objects_and_all_it_acknowledged(tmp_path: Path) -> None:
    root = tmp_path / "bucket"
    acknowledged: set[str] = set()
    for number in range(ROUNDS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert writer.stdout is not None
        with writer.stdout:
            for _ in range(ACKNOWLEDGED_PER_ROUND + number):
                acknowledged.add(writer.stdout.readline().strip())
            writer.send_signal(signal.SIGKILL)
            # The last line may be cut short: then it acknowledges nothing.
            rest = writer.stdout.read().split("\n")[:-1]
        acknowledged.update(rest)
        writer.wait()

    async def check() -> None:
        store = LocalStore(root)
        keys = {entry.key for entry in await store.list("")}
        assert acknowledged - keys == set()
        assert len(acknowledged) >= ROUNDS * ACKNOWLEDGED_PER_ROUND
        for key in keys:
            body = await store.get(key)
            assert body is not None
            assert decode(body, EnvelopeKind.WAL, key=key).header["key"] == key
        await store.close()

    asyncio.run(check())
    assert [name for name in os.listdir(root) if name.startswith(TEMPORARY_PREFIX)] == []
