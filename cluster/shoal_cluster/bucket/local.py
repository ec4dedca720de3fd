"""The directory store: a bucket on a local file system, durable through power loss.

Keys are paths below `root`. It survives a crash of the process and of the machine; it does not
survive the loss of the disk. bucket/README.md has the steps of a put and what a crash after each
of them leaves behind.

Invariants B-5 (durable before told), B-6 (whole before named) and B-7 (no put after a failed
fsync): bucket/README.md.

Source: arrow-rs-object-store local.rs `with_fsync` has the same order of steps; unlike it, we sync
the directory also when the name exists already.
"""

import asyncio
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import structlog

from shoal_cluster.bucket.filesystem import (
    TEMPORARY_PREFIX,
    FileSystem,
    PosixFileSystem,
    process_start,
)
from shoal_cluster.bucket.keys import check_key, check_prefix
from shoal_cluster.bucket.store import ObjectEntry, PutOutcome
from shoal_cluster.domain.errors import (
    Indeterminate,
    InvalidRequest,
    PermissionDenied,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import IdGenerator, SystemIdGenerator
from shoal_cluster.domain.limits import MIB

PUT_THREADS = 4
"""Puts at the same time: file systems merge concurrent fsyncs into one journal commit."""

READ_THREADS = 2
"""Kept apart from puts, so that a probe of the WAL tail never queues behind four fsyncs."""

OPERATIONS_PENDING_MAX = 10_000
COPY_BYTES = 4 * MIB

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})

T = TypeVar("T")

_log = structlog.get_logger()


class FsyncFailed(Indeterminate):
    """The disk did not confirm a write. The process must exit and recover from the bucket."""


def end_process() -> None:
    """Ends this process at once: an `on_broken` for processes that somebody starts again."""
    os._exit(1)


class LocalStore:
    """Store over a directory. Safe for any number of processes on one machine.

    Its methods may be awaited on any event loop; the system calls run in two small thread pools.

    on_broken: called from one of those threads when an fsync fails, which is final. A process that
    serves ends there and then: to some of its parts FsyncFailed is but one more thing to retry.
    """

    def __init__(
        self,
        root: Path,
        *,
        filesystem: FileSystem | None = None,
        ids: IdGenerator | None = None,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        """Opens the directory, making it if absent, and removes what dead processes left over.

        Raises: Unavailable or PermissionDenied when the directory cannot be used; FsyncFailed.
        """
        self.root = root.absolute()
        self._filesystem = filesystem or PosixFileSystem()
        self._on_broken = on_broken
        token = (ids or SystemIdGenerator()).hex(4)
        pid = os.getpid()
        self._temporary_stem = f"{TEMPORARY_PREFIX}{pid}-{process_start(pid)}-{token}"
        self._temporary_numbers = itertools.count()
        # Directories whose entries, all the way up to the root, this process knows to be durable.
        self._durable_directories: set[Path] = set()
        self._fsync_failure: FsyncFailed | None = None
        self._pending = 0
        try:
            self._open_root()
        except OSError as error:
            raise _not_applied(error, f"directory {self.root}") from error
        self._puts = ThreadPoolExecutor(PUT_THREADS, thread_name_prefix="bucket-put")
        self._reads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="bucket-read")

    async def create(self, key: str, body: bytes) -> PutOutcome:
        """Links a file with `body` at `key` unless there is one.

        Raises: FsyncFailed (maybe applied; exit the process); Unavailable when the disk is full or
        the file cannot be written, PermissionDenied, InvalidRequest (all: nothing was applied).
        """
        check_key(key)
        return await self._run(self._puts, lambda: self._put(key, iter((memoryview(body),))))

    async def create_file(self, key: str, path: Path) -> PutOutcome:
        """Like `create`, copying a file 4 MiB at a time."""
        check_key(key)
        return await self._run(self._puts, lambda: self._put(key, _pieces(path)))

    async def get(self, key: str) -> bytes | None:
        check_key(key)
        return await self._run(self._reads, lambda: _read(self._path(key), 0, None))

    async def get_range(self, key: str, start: int, length: int) -> bytes | None:
        check_key(key)
        return await self._run(self._reads, lambda: _read(self._path(key), start, length))

    async def list(self, prefix: str) -> list[ObjectEntry]:
        check_prefix(prefix)
        return await self._run(self._reads, lambda: list(self._entries(prefix)))

    async def delete(self, key: str) -> None:
        """Unlinks the file. Not fsynced: a deleted object that power loss brings back is garbage
        that the next collection finds again (protocol.md 1.11 deletes only what nothing refers to).
        """
        check_key(key)
        await self._run(self._puts, lambda: self._delete(key))

    async def make_durable(self, prefix: str) -> None:
        """Fsyncs every directory under `prefix`, and the way to it from the root.

        For a reader about to serve what it found: another process may have linked a file and died
        before its directory fsync, so the page cache can show a record that power loss takes away.
        The files themselves are on stable storage since before they were linked (B-6): syncing
        each of them again, a millisecond even when nothing is dirty, held up a takeover by seconds.

        Raises: FsyncFailed.
        """
        check_prefix(prefix)
        await self._run(self._puts, lambda: self._sync_tree(prefix))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return self._path(key)

    async def close(self) -> None:
        """Waits for what is running and ends the threads."""
        await asyncio.to_thread(self._puts.shutdown)
        await asyncio.to_thread(self._reads.shutdown)

    # Everything below runs in the pools' threads.

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        if self._pending >= OPERATIONS_PENDING_MAX:
            raise Unavailable(
                f"{self._pending} operations wait for the disk under {self.root}",
                limit=f"{OPERATIONS_PENDING_MAX} operations",
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, call)
        except OSError as error:
            raise Unavailable(
                f"directory {self.root} cannot be read: {os.strerror(error.errno or 0)}"
            ) from error
        finally:
            self._pending -= 1

    def _put(self, key: str, pieces: Iterator[memoryview]) -> PutOutcome:
        """Steps 1 to 6 of bucket/README.md "A put, step by step"."""
        self._check_usable()
        target = self._path(key)
        self._ensure_directory(target.parent)
        number = next(self._temporary_numbers)
        temporary = self.root / f"{self._temporary_stem}-{number}"
        self._write_temporary(temporary, pieces)
        linked = False
        try:
            self._filesystem.link(temporary, target)
            linked = True
        except OSError as error:
            if error.errno == errno.EEXIST and target.is_dir():
                self._discard(temporary)
                raise InvalidRequest(
                    f"key {key!r} is the prefix of other keys, which a directory store cannot hold",
                    field="key",
                ) from error
            if error.errno in _DISK_FULL:
                # The directory has no room for another name: refused for certain.
                self._discard(temporary)
                raise _not_applied(error, f"file {target}") from error
            if error.errno == errno.ENOENT:
                # Somebody removed the directory or swept our file: learn the directories anew.
                self._durable_directories.clear()
                self._discard(temporary)
                return PutOutcome.UNRESOLVED
        # Also when the link failed: it exists, or (NFS) was made though the reply was lost. What
        # the caller is about to read back must not vanish with the power.
        self._sync_directory(target.parent)
        self._discard(temporary)
        return PutOutcome.CREATED if linked else PutOutcome.UNRESOLVED

    def _write_temporary(self, temporary: Path, pieces: Iterator[memoryview]) -> None:
        """Writes and fsyncs the file; on failure nothing of it stays."""
        synced = False
        try:
            descriptor = self._filesystem.open_temporary(temporary)
            try:
                for piece in pieces:
                    written = 0
                    while written < piece.nbytes:
                        written += self._filesystem.write(descriptor, piece[written:])
                synced = True
                self._filesystem.fsync(descriptor)
            finally:
                self._filesystem.close(descriptor)
        except OSError as error:
            self._discard(temporary)
            # A full disk may first be noticed by fsync (delayed allocation). The file is in no
            # directory but as a temporary, so its loss is a plain refusal.
            if synced and error.errno not in _DISK_FULL:
                raise self._fail(temporary, error) from error
            raise _not_applied(error, f"file {temporary}") from error

    def _discard(self, temporary: Path) -> None:
        """Unlinks the temporary name; one that stays is swept at some later open."""
        with suppress(OSError):
            self._filesystem.unlink(temporary)

    def _ensure_directory(self, directory: Path) -> None:
        """Makes the directory and makes its entries durable from the root down.

        A directory that exists already may be another process's, made but not yet fsynced, so the
        first use in this process fsyncs the whole way, made here or not.
        """
        if directory in self._durable_directories:
            return
        way = [directory]
        while way[-1] != self.root:
            way.append(way[-1].parent)
        for step in reversed(way[:-1]):
            if step in self._durable_directories:
                continue
            try:
                self._filesystem.make_directory(step)
            except FileExistsError as error:
                if not step.is_dir():
                    raise InvalidRequest(
                        f"an object is stored at {step.relative_to(self.root)}, so no key can "
                        "start with it in a directory store",
                        field="key",
                    ) from error
            except OSError as error:
                raise _not_applied(error, f"directory {step}") from error
            self._sync_directory(step.parent)
            self._durable_directories.add(step)

    def _sync_directory(self, directory: Path) -> None:
        try:
            self._filesystem.fsync_directory(directory)
        except OSError as error:
            raise self._fail(directory, error) from error

    def _sync_tree(self, prefix: str) -> None:
        self._check_usable()
        top = self.root / prefix
        if not top.is_dir():
            return
        try:
            for directory, _, _ in os.walk(top):
                self._filesystem.fsync_directory(Path(directory))
        except OSError as error:
            raise self._fail(top, error) from error
        while top != self.root:
            top = top.parent
            self._sync_directory(top)

    def _check_usable(self) -> None:
        if self._fsync_failure is not None:
            raise FsyncFailed(self._fsync_failure.message) from self._fsync_failure

    def _fail(self, path: Path, error: OSError) -> FsyncFailed:
        self._fsync_failure = FsyncFailed(
            f"fsync of {path} failed ({os.strerror(error.errno or 0)}); "
            "this process must exit: what it wrote may be lost"
        )
        _log.error("fsync_failed", reason=self._fsync_failure.message)
        if self._on_broken is not None:
            self._on_broken()
        return self._fsync_failure

    def _delete(self, key: str) -> None:
        path = self._path(key)
        try:
            self._filesystem.unlink(path)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise _not_applied(error, f"file {path}") from error
        if path.parent != self.root:
            # Or every segment that ever was would leave a directory for listings to visit. Most
            # are not empty, and the operating system says so. Where somebody puts an object
            # meanwhile, the link fails and the directory is made again.
            with suppress(OSError):
                self._filesystem.remove_directory(path.parent)
                self._durable_directories.discard(path.parent)

    def _entries(self, prefix: str) -> Iterator[ObjectEntry]:
        waiting = [(self.root / prefix, prefix)]
        while waiting:
            directory, key = waiting.pop()
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append((directory / entry.name, f"{key}{entry.name}/"))
                            continue
                        with suppress(FileNotFoundError):
                            yield ObjectEntry(f"{key}{entry.name}", entry.stat().st_size)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise

    def _path(self, key: str) -> Path:
        return self.root / key

    def _open_root(self) -> None:
        made = []
        directory = self.root
        while not directory.is_dir():
            made.append(directory)
            directory = directory.parent
        for step in reversed(made):
            with suppress(FileExistsError):
                self._filesystem.make_directory(step)
            self._sync_directory(step.parent)
        self._durable_directories.add(self.root)
        self._sweep()

    def _sweep(self) -> None:
        """Removes the temporary files of processes that are gone.

        Should one be alive after all (another container's numbering), its link fails, it gets
        UNRESOLVED and puts the same body again.
        """
        for name in os.listdir(self.root):
            if not name.startswith(TEMPORARY_PREFIX):
                continue
            pid, _, rest = name.removeprefix(TEMPORARY_PREFIX).partition("-")
            started = rest.partition("-")[0]
            if not pid.isdigit() or process_start(int(pid)) != started:
                self._discard(self.root / name)


def _read(path: Path, start: int, length: int | None) -> bytes | None:
    """Returns the bytes from `start`, at most `length`, or None when there is no such file."""
    try:
        with open(path, "rb", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            wanted = max(0, size_bytes - start)
            if length is not None:
                wanted = min(wanted, length)
            # Files never change, so a short read is not the end: Linux stops at 2 GiB.
            pieces = []
            while wanted:
                piece = os.pread(file.fileno(), wanted, start)
                if not piece:
                    break
                pieces.append(piece)
                start += len(piece)
                wanted -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def _pieces(path: Path) -> Iterator[memoryview]:
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(COPY_BYTES):
            yield memoryview(piece)


def _not_applied(error: OSError, what: str) -> ShoalError:
    """Returns the domain error for a system call that failed before anything was linked."""
    reason = os.strerror(error.errno or 0)
    if error.errno in _DISK_FULL:
        return Unavailable(f"disk full: {what} cannot be written ({reason}); free some space")
    if error.errno in _FORBIDDEN:
        return PermissionDenied(f"{what} cannot be written ({reason})")
    return Unavailable(f"{what} cannot be written ({reason})")
