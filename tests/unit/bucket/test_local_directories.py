"""Directories of a local bucket: made when needed, gone when empty, never missed by a put."""

import asyncio
from pathlib import Path

from shoal_cluster.bucket.create import create
from shoal_cluster.bucket.envelope import EnvelopeKind, encode, put_id_of
from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.domain.clock import SystemClock

ROUNDS = 50


def directories(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir())


def test_deleted_segments_leave_no_directories(tmp_path):
    async def scenario():
        store = LocalStore(tmp_path / "bucket")
        for number in range(20):
            for name in ("vectors", "meta"):
                await store.create(f"seg/{number}/{name}", b"x")
        for number in range(19):
            for name in ("vectors", "meta"):
                await store.delete(f"seg/{number}/{name}")
        await store.delete("seg/3/vectors")  # again: no error, nothing there
        assert directories(store.root) == ["seg", "seg/19"]
        assert await store.get("seg/19/meta") == b"x"
        await store.close()

    asyncio.run(scenario())


def test_a_put_into_a_directory_that_empties_meanwhile_is_stored(tmp_path):
    """Two processes' handles: one puts, the other deletes what makes the directory stay."""

    async def scenario():
        putting, deleting = (LocalStore(tmp_path / "bucket") for _ in range(2))
        clock = SystemClock()
        for number in range(ROUNDS):
            await putting.create("d/old", b"x")
            put_id = number.to_bytes(16, "big")
            body = encode(EnvelopeKind.MANIFEST, {"put_id": put_id}, b"")
            key = f"d/{number}"
            other, _ = await asyncio.gather(
                create(
                    putting,
                    key,
                    body,
                    put_id=put_id,
                    read_put_id=put_id_of,
                    clock=clock,
                    deadline_s=clock.monotonic_s() + 10.0,
                ),
                deleting.delete("d/old"),
            )
            assert other is None
            assert await deleting.get(key) == body
            await deleting.delete(key)
        await putting.close()
        await deleting.close()

    asyncio.run(scenario())
