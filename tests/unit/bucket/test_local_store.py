"""The directory store: its order of steps, what a power cut leaves, and every failing call.

Invariants B-5, B-6, B-7.
"""

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_cluster.bucket.create import create
from shoal_cluster.bucket.envelope import EnvelopeKind, encode, put_id_of
from shoal_cluster.bucket.filesystem import TEMPORARY_PREFIX, PosixFileSystem, process_start
from shoal_cluster.bucket.local import FsyncFailed, LocalStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain.errors import (
    Indeterminate,
    InvalidRequest,
    Outcome,
    PermissionDenied,
    Unavailable,
)
from tests.contract.fakes import VirtualClock
from tests.unit.bucket.power_cut import PowerCutFileSystem

KEY, BODY = "c/1/wal/0001", b"forty-two bytes of a record that must stay"


class FailingFileSystem(PosixFileSystem):
    """Fails calls by name, after carrying them out if `after` says so."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.after: set[str] = set()

    def _maybe_fail(self, call: str, *, now_after: bool) -> None:
        if call in self.failing and (call in self.after) is now_after:
            raise OSError(self.failing[call], os.strerror(self.failing[call]))

    def write(self, descriptor: int, piece: memoryview) -> int:
        self._maybe_fail("write", now_after=False)
        return super().write(descriptor, piece)

    def fsync(self, descriptor: int) -> None:
        self._maybe_fail("fsync", now_after=False)
        super().fsync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        self._maybe_fail("link", now_after=False)
        super().link(source, target)
        self._maybe_fail("link", now_after=True)

    def make_directory(self, path: Path) -> None:
        self._maybe_fail("make_directory", now_after=False)
        super().make_directory(path)

    def fsync_directory(self, path: Path) -> None:
        self._maybe_fail("fsync_directory", now_after=False)
        super().fsync_directory(path)


def put(store: LocalStore, key: str = KEY, body: bytes = BODY) -> PutOutcome:
    return asyncio.run(store.create(key, body))


def temporaries(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if name.startswith(TEMPORARY_PREFIX)]


def open_with(root: Path, filesystem: PosixFileSystem) -> LocalStore:
    """Opens a directory that exists, so that the trace begins with the put."""
    root.mkdir(exist_ok=True)
    return LocalStore(root, filesystem=filesystem)


def test_put_syncs_the_file_then_links_then_syncs_the_directory(tmp_path: Path) -> None:
    filesystem = PowerCutFileSystem()
    store = open_with(tmp_path / "bucket", filesystem)
    put(store)
    calls = [call for call, _ in filesystem.trace if call != "write"]
    making = ["make_directory", "fsync_directory"] * 3
    steps = ["open_temporary", "fsync", "link", "fsync_directory", "unlink"]
    assert calls == making + steps
    filesystem.trace.clear()
    put(store, "c/1/wal/0002")
    assert [call for call, _ in filesystem.trace if call != "write"] == steps


def check_created_object_survives(root: Path, forgotten: frozenset[str]) -> None:
    filesystem = PowerCutFileSystem(forgotten=forgotten)
    store = open_with(root, filesystem)
    for key in (KEY, "c/1/wal/0002", "c/2/wal/0001"):
        assert put(store, key) is PutOutcome.CREATED
        assert filesystem.surely_there(root / key, root) == BODY


def check_no_torn_object_at_any_step(root: Path, forgotten: frozenset[str]) -> None:
    filesystem = PowerCutFileSystem(forgotten=forgotten)
    store = open_with(root, filesystem)
    seen: list[set[bytes] | None] = []
    filesystem.after_step = lambda: seen.append(filesystem.possible_contents(root / KEY))
    put(store)
    assert [contents for contents in seen if contents not in (None, {BODY})] == []
    assert {BODY} in seen


def test_created_object_survives_a_power_cut(tmp_path: Path) -> None:
    check_created_object_survives(tmp_path / "bucket", frozenset())


def test_power_cut_at_any_step_leaves_the_whole_object_or_none(tmp_path: Path) -> None:
    check_no_torn_object_at_any_step(tmp_path / "bucket", frozenset())


@pytest.mark.parametrize("call", ["fsync", "fsync_directory"])
def test_the_survival_check_notices_a_forgotten_sync(tmp_path: Path, call: str) -> None:
    with pytest.raises(AssertionError):
        check_created_object_survives(tmp_path / "bucket", frozenset({call}))


def test_the_torn_object_check_notices_a_forgotten_file_sync(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_no_torn_object_at_any_step(tmp_path / "bucket", frozenset({"fsync"}))


def test_the_survival_check_notices_an_unsynced_way_to_the_directory(tmp_path: Path) -> None:
    """A store that syncs only the object's own directory loses the directory itself."""

    class ShortSighted(LocalStore):
        def _ensure_directory(self, directory: Path) -> None:
            directory.mkdir(parents=True, exist_ok=True)

    root = tmp_path / "bucket"
    root.mkdir()
    filesystem = PowerCutFileSystem()
    store = ShortSighted(root, filesystem=filesystem)
    assert put(store) is PutOutcome.CREATED
    assert filesystem.surely_there(root / KEY, root) is None


def test_directory_made_by_another_process_is_synced_before_use(tmp_path: Path) -> None:
    root = tmp_path / "bucket"
    filesystem = PowerCutFileSystem()
    store = open_with(root, filesystem)
    (root / "c/1/wal").mkdir(parents=True)
    assert put(store) is PutOutcome.CREATED
    assert filesystem.surely_there(root / KEY, root) == BODY


def test_existing_object_is_durable_before_the_loser_hears_of_it(tmp_path: Path) -> None:
    """The winner may die between link and directory fsync; the loser acts on what it reads."""
    root = tmp_path / "bucket"
    filesystem = PowerCutFileSystem()
    winner, loser = open_with(root, filesystem), open_with(root, filesystem)
    filesystem.forgotten = frozenset({"fsync_directory"})
    put(winner)
    filesystem.forgotten = frozenset()
    assert filesystem.surely_there(root / KEY, root) is None
    assert put(loser, KEY, b"other") is PutOutcome.UNRESOLVED
    assert filesystem.surely_there(root / KEY, root) == BODY


def test_make_durable_saves_what_another_process_left_unsynced(tmp_path: Path) -> None:
    root = tmp_path / "bucket"
    filesystem = PowerCutFileSystem()
    # What a process leaves that dies between its link and its directory's fsync.
    filesystem.forgotten = frozenset({"fsync_directory"})
    put(open_with(root, filesystem))
    filesystem.forgotten = frozenset()
    assert filesystem.surely_there(root / KEY, root) is None
    asyncio.run(open_with(root, filesystem).make_durable("c/1/wal/"))
    assert filesystem.surely_there(root / KEY, root) == BODY


def test_make_durable_syncs_directories_and_not_every_file(tmp_path: Path) -> None:
    """A takeover calls it, and thousands of files wait for garbage collection in a log."""
    filesystem = PowerCutFileSystem()
    store = open_with(tmp_path / "bucket", filesystem)
    for number in range(20):
        put(store, f"c/1/wal/{number:04d}")
    before = len(filesystem.trace)
    asyncio.run(store.make_durable("c/1/wal/"))
    assert [call for call, _ in filesystem.trace[before:]] == ["fsync_directory"] * 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_full_disk_is_a_plain_refusal_and_leaves_nothing(
    tmp_path: Path, call: str, number: int
) -> None:
    filesystem = FailingFileSystem()
    store = open_with(tmp_path / "bucket", filesystem)
    filesystem.failing = {call: number}
    with pytest.raises(Unavailable, match="disk full") as refused:
        put(store)
    assert refused.value.outcome is Outcome.NOT_APPLIED
    assert temporaries(store.root) == []
    filesystem.failing = {}
    assert put(store) is PutOutcome.CREATED


@pytest.mark.parametrize("call", ["fsync", "fsync_directory"])
def test_failed_fsync_is_indeterminate_and_ends_the_store(tmp_path: Path, call: str) -> None:
    filesystem = FailingFileSystem()
    store = open_with(tmp_path / "bucket", filesystem)
    put(store, "c/1/wal/0000")
    filesystem.failing = {call: errno.EIO}
    with pytest.raises(FsyncFailed, match="must exit") as failed:
        put(store)
    assert isinstance(failed.value, Indeterminate)
    assert failed.value.outcome is Outcome.MAYBE_APPLIED
    filesystem.failing = {}
    with pytest.raises(FsyncFailed):
        put(store, "c/1/wal/0002")
    with pytest.raises(FsyncFailed):
        asyncio.run(store.make_durable(""))
    assert asyncio.run(store.get("c/1/wal/0000")) == BODY


def test_directory_that_must_not_be_written_is_permission_denied(tmp_path: Path) -> None:
    filesystem = FailingFileSystem()
    store = open_with(tmp_path / "bucket", filesystem)
    filesystem.failing = {"make_directory": errno.EROFS}
    with pytest.raises(PermissionDenied, match="Read-only"):
        put(store)


@pytest.mark.parametrize("applied", [True, False])
def test_link_that_reports_failure_is_resolved_by_reading_back(
    tmp_path: Path, applied: bool
) -> None:
    """NFS: the reply to a link that was made gets lost. Otherwise: an error before the link."""
    filesystem = FailingFileSystem()
    store = open_with(tmp_path / "bucket", filesystem)
    filesystem.failing = {"link": errno.EIO}
    filesystem.after = {"link"} if applied else set()
    assert put(store) is PutOutcome.UNRESOLVED
    assert asyncio.run(store.get(KEY)) == (BODY if applied else None)
    filesystem.failing = {}
    body = encode(EnvelopeKind.WAL, {"put_id": b"i" * 16})
    assert (
        asyncio.run(
            create(
                store,
                "c/1/wal/0009",
                body,
                put_id=b"i" * 16,
                read_put_id=put_id_of,
                clock=VirtualClock(),
                deadline_s=10.0,
            )
        )
        is None
    )


def test_directory_removed_behind_our_back_is_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "bucket")
    put(store)
    (store.root / KEY).unlink()
    for directory in ("c/1/wal", "c/1", "c"):
        (store.root / directory).rmdir()
    assert put(store) is PutOutcome.UNRESOLVED
    assert put(store) is PutOutcome.CREATED


def test_temporaries_of_dead_processes_only_are_swept_at_open(tmp_path: Path) -> None:
    root = tmp_path / "bucket"
    root.mkdir()
    pid, started = os.getpid(), process_start(os.getpid())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours = f"{TEMPORARY_PREFIX}{pid}-{started}-0badcafe-0"
    stale = [
        f"{TEMPORARY_PREFIX}{ended.pid}-123-0badcafe-0",
        f"{TEMPORARY_PREFIX}{pid}-1-0badcafe-7",  # the number was given to a process anew
        f"{TEMPORARY_PREFIX}nonsense",
    ]
    for name in [ours, *stale]:
        (root / name).write_bytes(b"x")
    store = LocalStore(root)
    assert temporaries(root) == [ours]
    assert asyncio.run(store.list("")) == []


def test_swept_temporary_of_a_live_put_costs_only_another_attempt(tmp_path: Path) -> None:
    """Process numbers of another container look dead here."""

    class SweptFileSystem(PosixFileSystem):
        swept = False

        def fsync(self, descriptor: int) -> None:
            super().fsync(descriptor)
            if not self.swept:
                self.swept = True
                for name in temporaries(tmp_path / "bucket"):
                    os.unlink(tmp_path / "bucket" / name)

    store = open_with(tmp_path / "bucket", SweptFileSystem())
    assert put(store) is PutOutcome.UNRESOLVED
    assert put(store) is PutOutcome.CREATED


def test_key_below_an_object_is_refused_in_both_orders(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "bucket")
    put(store, "a/b")
    with pytest.raises(InvalidRequest, match="a/b"):
        put(store, "a/b/c")
    with pytest.raises(InvalidRequest, match="prefix"):
        put(store, "a")
    assert asyncio.run(store.get("a")) is None
    assert asyncio.run(store.get("a/b/c")) is None
    assert temporaries(store.root) == []


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bucket").write_bytes(b"")
    with pytest.raises(Unavailable, match="bucket"):
        LocalStore(tmp_path / "bucket")
