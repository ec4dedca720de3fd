"""A full disk under the directory store: refused by name, reads go on, all goes on afterwards."""

import asyncio
import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shoal_cluster.bucket.filesystem import TEMPORARY_PREFIX, PosixFileSystem
from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Outcome, Overloaded, Unavailable
from shoal_cluster.domain.session import Consistency
from shoal_cluster.shard import garbage, sealing
from shoal_cluster.shard.calls import ReadLevel, WriteCall
from tests.unit.shard.nodes import KEYS, Node, Shard, delete, points_of, upsert

STRONG = ReadLevel(consistency=Consistency.STRONG)
PATIENCE_S = 20.0
"""For what happens within milliseconds on an idle machine."""


class FullDisk(PosixFileSystem):
    """Says "no space left" at one step of the puts whose key contains `refused`.

    refused: None lets everything through. step: `open_temporary`, `write` (after half of the
    bytes), `fsync` (delayed allocation), `link` or `make_directory`.
    """

    def __init__(self, step: str = "write") -> None:
        self.step = step
        self.refused: str | None = None
        self.refusals = 0
        self.putting = threading.local()

    def open_temporary(self, path: Path) -> int:
        self._refuse_at("open_temporary")
        return super().open_temporary(path)

    def write(self, descriptor: int, piece: memoryview) -> int:
        if self._is_full("write"):
            super().write(descriptor, piece[: piece.nbytes // 2])
        self._refuse_at("write")
        return super().write(descriptor, piece)

    def fsync(self, descriptor: int) -> None:
        self._refuse_at("fsync")
        super().fsync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        self._refuse_at("link")
        super().link(source, target)

    def make_directory(self, path: Path) -> None:
        self._refuse_at("make_directory")
        super().make_directory(path)

    def _is_full(self, step: str) -> bool:
        key = getattr(self.putting, "key", "")
        return self.step == step and self.refused is not None and self.refused in key

    def _refuse_at(self, step: str) -> None:
        if self._is_full(step):
            self.refusals += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk(LocalStore):
    """The directory store; tells the file system which key a step is for."""

    def __init__(self, root: Path, filesystem: FullDisk) -> None:
        super().__init__(root, filesystem=filesystem)
        self.filesystem = filesystem

    def _put(self, key: str, pieces: Iterator[memoryview]) -> PutOutcome:
        self.filesystem.putting.key = key
        return super()._put(key, pieces)


@dataclass
class Served:
    """A leading node over a disk, what was acknowledged, and the requests so far."""

    node: Node
    shard: Shard
    disk: FullDisk
    root: Path
    model: dict[str, float] = field(default_factory=dict)
    requests: int = 0

    async def upsert(self, points: dict[str, float]) -> None:
        self.requests += 1
        await self.node.write(upsert(self.requests, points))
        self.model.update(points)

    async def delete(self, *points: str) -> None:
        self.requests += 1
        await self.node.write(delete(self.requests, *points))
        for point in points:
            self.model.pop(point, None)

    def refuse(self, keys: str | None) -> None:
        self.disk.refused = keys

    async def until_refused(self) -> None:
        """Waits until the disk has refused something twice: it was tried again."""
        before = self.disk.refusals
        await until(lambda: self.disk.refusals >= before + 2)

    async def assert_serves(self) -> None:
        """Reads of all levels show what was acknowledged, and the epoch has not ended."""
        assert self.node.primary is not None and self.node.primary.serving
        await self.node.replica.wait_for(STRONG)
        assert points_of(self.node.replica) == self.model

    async def assert_nothing_lost(self) -> None:
        """A server that starts from the directory finds the same."""
        other = await self.shard.node(store=LocalStore(self.root)).load()
        assert points_of(other.replica) == self.model
        assert other.replica.state.sum == self.node.replica.state.sum
        await other.crash()
        await other.store.close()
        if self.disk.refused is None:  # else a put that will be refused may be under way
            # A refused put leaves nothing behind. Garbage collection may have one under way.
            await until(lambda: not self._temporaries())

    def _temporaries(self) -> list[str]:
        return [name for name in os.listdir(self.root) if name.startswith(TEMPORARY_PREFIX)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def retries_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_RETRY_S", 0.01)
    monkeypatch.setattr(sealing, "_RETRY_S_MAX", 0.05)


@asynccontextmanager
async def served(folder: Path, step: str = "write") -> AsyncIterator[Served]:
    disk = FullDisk(step)
    root = folder / "bucket"
    store = Disk(root, disk)
    shard = Shard(folder / "servers")
    node = shard.node(store=store)
    await node.replica.manifests.create_first()
    await node.load()
    await node.promote()
    yield Served(node=node, shard=shard, disk=disk, root=root)
    await node.crash()
    await store.close()


def scenario(folder: Path, test: Callable[[Served], Awaitable[None]], step: str = "write") -> None:
    async def whole() -> None:
        async with served(folder, step) as one:
            await test(one)

    asyncio.run(whole())


@pytest.mark.parametrize("step", ["open_temporary", "write", "fsync", "link"])
def test_an_append_is_refused_by_name_and_taken_when_there_is_space(tmp_path, step):
    async def test(one: Served) -> None:
        await one.upsert({"a": 1.0, "b": 2.0})
        one.refuse("/wal/")
        call: WriteCall = upsert(50, {"c": 3.0, "a": 9.0})
        slot = one.node.replica.state.slot + 1
        for _ in range(3):
            with pytest.raises(Unavailable, match=f"append of slot {slot}: disk full") as refused:
                await one.node.write(call)
            assert refused.value.outcome is Outcome.NOT_APPLIED
        await one.assert_serves()
        one.refuse(None)
        await one.node.write(call)
        one.model.update({"c": 3.0, "a": 9.0})
        await one.assert_serves()
        await one.assert_nothing_lost()

    scenario(tmp_path, test, step)


# What a seal or a compaction puts, in this order; a full disk may begin at any of them.
PHASES = ["/vectors", "/payload", "/meta", "tombstones", "/man/"]


@pytest.mark.parametrize("step", ["write", "link"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_seal_waits_for_space_while_reads_and_writes_go_on(tmp_path, phase, step):
    async def test(one: Served) -> None:
        await one.upsert({"a": 1.0, "b": 2.0})
        await one.node.seal()
        await one.delete("a")
        await one.upsert({"c": 3.0})
        one.refuse(phase)
        one.node.primary._sealer.start()
        await one.until_refused()
        await one.upsert({"d": 4.0})
        await one.delete("b")
        await one.assert_serves()
        await one.assert_nothing_lost()
        one.refuse(None)
        await one.node.settle()
        assert len(one.node.replica.manifest.segments) == 2
        await one.assert_serves()
        await one.node.seal()
        await one.assert_nothing_lost()

    scenario(tmp_path, test, step)


def test_a_first_seal_waits_for_room_for_its_directory(tmp_path):
    async def test(one: Served) -> None:
        await one.upsert({"a": 1.0})
        one.refuse("/seg/")
        one.node.primary._sealer.start()
        await one.until_refused()
        await one.assert_serves()
        one.refuse(None)
        await one.node.settle()
        assert len(one.node.replica.manifest.segments) == 1
        await one.assert_nothing_lost()

    scenario(tmp_path, test, "make_directory")


@pytest.mark.parametrize("phase", ["/vectors", "/man/"])
def test_a_compaction_waits_for_space_while_reads_and_writes_go_on(tmp_path, phase):
    async def test(one: Served) -> None:
        for number in range(limits.COMPACTION_FAN_IN - 1):
            await one.upsert({f"p{number}": float(number), "same": float(number)})
            await one.node.seal()
        assert len(one.node.replica.manifest.segments) == limits.COMPACTION_FAN_IN - 1
        sealer = one.node.primary._sealer
        one.refuse(phase)
        sealer._compact(one.node.replica.manifest.segments)
        await one.until_refused()
        await one.delete("p0")
        await one.upsert({"late": 7.0})
        await one.assert_serves()
        one.refuse(None)
        await one.node.settle()
        assert len(one.node.replica.manifest.segments) == 1
        await one.assert_serves()
        await one.node.seal()
        await one.assert_nothing_lost()

    scenario(tmp_path, test)


def test_nobody_takes_over_on_a_full_disk_and_nothing_is_lost(tmp_path):
    async def test(one: Served) -> None:
        await one.upsert({"a": 1.0})
        rival = await one.shard.node(store=one.node.store).load()
        one.refuse("")
        with pytest.raises(Unavailable, match="disk full"):
            await rival.promote()
        with pytest.raises(Unavailable, match="disk full"):
            await one.upsert({"b": 2.0})
        await rival.replica.wait_for(STRONG)
        assert points_of(rival.replica) == one.model
        await one.assert_serves()
        one.refuse(None)
        await rival.promote()
        await rival.write(upsert(60, {"c": 3.0}))
        one.model["c"] = 3.0
        await one.node.replica.wait_for(STRONG)
        assert points_of(one.node.replica) == one.model
        await one.assert_nothing_lost()
        await rival.crash()

    scenario(tmp_path, test)


def test_writers_are_told_to_wait_when_a_seal_is_stuck_for_long(tmp_path, monkeypatch):
    async def test(one: Served) -> None:
        monkeypatch.setattr(limits, "MEMTABLE_OPERATIONS_MAX", 5)
        await one.upsert({"a": 1.0})
        one.refuse("/seg/")
        one.node.primary._sealer.start()
        await one.until_refused()
        with pytest.raises(Overloaded) as refused:
            for number in range(10):
                await one.upsert({f"n{number}": float(number)})
        assert refused.value.retry_after_ms and refused.value.outcome is Outcome.NOT_APPLIED
        await one.assert_serves()
        one.refuse(None)
        await one.node.settle()
        await one.upsert({"after": 5.0})
        await one.assert_nothing_lost()

    scenario(tmp_path, test)


def test_garbage_is_deleted_from_a_full_disk(tmp_path, monkeypatch):
    """Or a disk filled by garbage would stay full. A seal that waits for space does not keep it."""

    async def test(one: Served) -> None:
        await one.upsert({"a": 1.0})
        await one.node.seal()
        await one.upsert({"b": 2.0})
        one.refuse("/man/")
        sealer = one.node.primary._sealer
        sealer.start()
        await one.until_refused()
        sealed = one.root / KEYS.slot(2)
        assert sealed.exists()
        monkeypatch.setattr(garbage, "GRACE_S", 0.0)
        monkeypatch.setattr(garbage, "ROUND_S", 0.0)
        sealer.tidy()
        await until(lambda: not sealed.exists())
        one.refuse(None)
        await one.node.settle()
        await one.assert_serves()
        await one.assert_nothing_lost()

    scenario(tmp_path, test)


def test_a_commit_that_gives_up_at_the_first_refusal_would_be_caught_here(tmp_path, monkeypatch):
    async def at_once(self: sealing.Sealer, commit: Callable[[], Awaitable[None]]) -> None:
        async with self._committing:
            await commit()

    monkeypatch.setattr(sealing.Sealer, "_when_possible", at_once)
    monkeypatch.setattr("tests.integration.durability.test_disk_full.PATIENCE_S", 1.0)
    with pytest.raises((AssertionError, TimeoutError)):
        test_a_seal_waits_for_space_while_reads_and_writes_go_on(tmp_path, "/man/", "write")


# ------------------------------------------------------------------------ a file system that fills


class CountedDisk(FullDisk):
    """Holds so many bytes and no more, where no small file system may be mounted."""

    def __init__(self, root: Path, size_bytes: int) -> None:
        super().__init__()
        self._root = root
        self._size_bytes = size_bytes

    def write(self, descriptor: int, piece: memoryview) -> int:
        sizes = {
            status.st_ino: status.st_size
            for path in self._root.rglob("*")
            if path.is_file() and (status := path.stat())
        }
        if sum(sizes.values()) + piece.nbytes > self._size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(descriptor, piece)


@contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[str]:
    """Mounts a tmpfs of that size at `folder`; yields why the machine would not let us, or ""."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=10, check=False)
        refusal = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError as error:
        refusal = f"permission denied: {error}"
    assert not refusal or any(word in refusal for word in ("permi", "superuser", "must be"))
    try:
        yield refusal
    finally:
        if not refusal:
            subprocess.run(["umount", "--lazy", str(folder)], timeout=10, check=True)


def fills_up_and_recovers(folder: Path, disk: FullDisk) -> None:
    """Writes until nothing fits any more, frees space, and goes on."""

    async def whole() -> None:
        filler = folder / "filler"
        filler.write_bytes(bytes(100_000))
        store = Disk(folder / "bucket", disk)
        shard = Shard(folder.with_name("servers"))
        node = shard.node(store=store)
        await node.replica.manifests.create_first()
        await node.load()
        await node.promote()
        one = Served(node=node, shard=shard, disk=disk, root=folder / "bucket")
        with pytest.raises(Unavailable, match="disk full"):
            for number in range(2000):
                await one.upsert({f"p{number % 300}": float(number), f"q{number}": 1.0})
                if number % 40 == 39 and not node.primary._sealer.busy:
                    node.primary._sealer.start()
        assert len(one.model) > 50, "it fitted more than that"
        await one.assert_serves()
        with pytest.raises(Unavailable, match="disk full"):
            await one.upsert({"too": 1.0})
        filler.unlink()
        await one.upsert({"fits": 2.0})
        await node.settle()
        await one.assert_serves()
        await one.assert_nothing_lost()
        await node.crash()
        await store.close()

    asyncio.run(whole())


SIZE_BYTES = 300_000


def test_a_disk_that_fills_up_refuses_keeps_all_and_goes_on(tmp_path):
    folder = tmp_path / "counted"
    folder.mkdir()
    fills_up_and_recovers(folder, CountedDisk(folder, SIZE_BYTES))


def test_a_real_file_system_that_fills_up_is_no_different(tmp_path, capsys):
    """Where nothing may be mounted this shows nothing, and says so; the next test always runs."""
    folder = tmp_path / "mounted"
    with mounted(folder, SIZE_BYTES // 4096 * 4096) as refusal:
        if refusal:
            with capsys.disabled():
                print(f"\nno small file system could be mounted, so none was filled: {refusal}")
            return
        assert os.path.ismount(folder)
        fills_up_and_recovers(folder, FullDisk())


# ------------------------------------------------------------- a kernel that refuses to write on

FILE_BYTES_MAX = 2000
"""Above a record of one point, below the vectors of POINTS."""
POINTS = 200

SEAL_WITHIN_A_LIMIT = """
import sys
from pathlib import Path
from tests.integration.durability.test_disk_full import seals_within_a_limit
seals_within_a_limit(Path(sys.argv[1]), int(sys.argv[2]))
"""


def seals_within_a_limit(folder: Path, limit: int) -> None:
    """Has the kernel refuse, in mid-file, every file above `limit`; then lets it write again."""

    async def test(one: Served) -> None:
        for number in range(POINTS):
            await one.upsert({f"p{number}": float(number)})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        one.node.primary._sealer.start()
        seal = one.node.primary._sealer._seal
        await until(lambda: one.node.replica.failures.count >= 2 or seal.done())
        assert "File too large" in one.node.replica.failures.reason()
        await one.upsert({"small": 1.0})
        await one.delete("p1")
        await one.assert_serves()
        await one.assert_nothing_lost()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        await one.node.settle()
        assert len(one.node.replica.manifest.segments) == 1
        await one.assert_serves()
        await one.assert_nothing_lost()

    scenario(folder, test)


def sealed_within(folder: Path, limit: int) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the limit is for everything a process writes, pytest's too."""
    return subprocess.run(
        [sys.executable, "-c", SEAL_WITHIN_A_LIMIT, str(folder), str(limit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def test_a_kernel_that_refuses_to_write_on_is_no_different(tmp_path):
    ran = sealed_within(tmp_path, FILE_BYTES_MAX)
    assert ran.returncode == 0, ran.stderr


def test_a_kernel_that_refuses_nothing_would_be_noticed(tmp_path):
    ran = sealed_within(tmp_path, 100 * FILE_BYTES_MAX)
    assert ran.returncode != 0 and "AssertionError" in ran.stderr
