"""Mistakes of the local directory that only a power cut shows."""

from collections.abc import Iterator
from pathlib import Path

from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.bucket.store import PutOutcome
from tests.simulation.mutants.registry import Patch, mutant
from tests.simulation.power_cuts import cut_power


@mutant("a file is linked without having been synced", trial=cut_power)
def file_sync_skipped() -> list[Patch]:
    def broken(self: LocalStore, temporary: Path, pieces: Iterator[memoryview]) -> None:
        _write(self, temporary, pieces, sync=False)

    return [(LocalStore, "_write_temporary", broken)]


@mutant("a file is synced after it was linked", trial=cut_power)
def file_synced_after_link() -> list[Patch]:
    def broken(self: LocalStore, key: str, pieces: Iterator[memoryview]) -> PutOutcome:
        target = self._path(key)
        self._ensure_directory(target.parent)
        temporary = self.root / f"{self._temporary_stem}-{next(self._temporary_numbers)}"
        descriptor = self._filesystem.open_temporary(temporary)
        for piece in pieces:
            _write_all(self, descriptor, piece)
        try:
            self._filesystem.link(temporary, target)
        except FileExistsError:
            return PutOutcome.UNRESOLVED
        self._sync_directory(target.parent)
        self._filesystem.fsync(descriptor)
        self._filesystem.close(descriptor)
        self._discard(temporary)
        return PutOutcome.CREATED

    return [(LocalStore, "_put", broken)]


@mutant("an object is acknowledged before its directory is synced", trial=cut_power)
def directory_sync_skipped() -> list[Patch]:
    def broken(self: LocalStore, directory: Path) -> None:
        return None

    return [(LocalStore, "_sync_directory", broken)]


@mutant("directories are made and not synced", trial=cut_power)
def way_sync_skipped() -> list[Patch]:
    def broken(self: LocalStore, directory: Path) -> None:
        missing = []
        while not directory.is_dir():
            missing.append(directory)
            directory = directory.parent
        for step in reversed(missing):
            self._filesystem.make_directory(step)

    return [(LocalStore, "_ensure_directory", broken)]


def _write(store: LocalStore, temporary: Path, pieces: Iterator[memoryview], *, sync: bool) -> None:
    descriptor = store._filesystem.open_temporary(temporary)
    for piece in pieces:
        _write_all(store, descriptor, piece)
    if sync:
        store._filesystem.fsync(descriptor)
    store._filesystem.close(descriptor)


def _write_all(store: LocalStore, descriptor: int, piece: memoryview) -> None:
    written = 0
    while written < piece.nbytes:
        written += store._filesystem.write(descriptor, piece[written:])
