"""A file system that knows what a power cut would leave, step by step.

Contents survive up to their last fsync, directory entries up to their directory's last fsync; what
was not synced may survive or not, each piece on its own. Source: ALICE (Pillai et al., OSDI 2014).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from shoal_cluster.bucket.filesystem import PosixFileSystem


class PowerCutFileSystem(PosixFileSystem):
    """Runs on a real directory and keeps book beside it.

    trace: the steps so far, `(call, file name)`. forgotten: names of calls that are carried out but
    not written to the book, as if the code had left them out. after_step: called after every step.
    """

    def __init__(self, *, forgotten: frozenset[str] = frozenset()) -> None:
        self.forgotten = forgotten
        self.trace: list[tuple[str, str]] = []
        self.after_step: Callable[[], None] = lambda: None
        self._paths: dict[int, Path] = {}
        self._written: dict[Path, bytes] = {}
        self._synced: dict[Path, bytes] = {}
        self._entries: dict[Path, Path] = {}
        """Name to the temporary file whose contents it shows."""
        self._durable_names: set[Path] = set()
        self._unlinked: dict[Path, Path] = {}
        """Names whose removal was not synced: they may be back."""

    def open_temporary(self, path: Path) -> int:
        descriptor = super().open_temporary(path)
        self._paths[descriptor] = path
        self._written[path] = b""
        self._entries[path] = path
        self._step("open_temporary", path)
        return descriptor

    def write(self, descriptor: int, piece: memoryview) -> int:
        taken = super().write(descriptor, piece[: max(1, piece.nbytes // 2)])
        path = self._paths[descriptor]
        self._written[path] += bytes(piece[:taken])
        self._step("write", path)
        return taken

    def fsync(self, descriptor: int) -> None:
        super().fsync(descriptor)
        if "fsync" not in self.forgotten:
            self._synced[self._paths[descriptor]] = self._written[self._paths[descriptor]]
        self._step("fsync", self._paths[descriptor])

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self._entries[target] = self._entries[source]
        self._step("link", target)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        source = self._entries.pop(path, None)
        if source is not None and path in self._durable_names:
            self._unlinked[path] = source
        self._durable_names.discard(path)
        self._step("unlink", path)

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self._step("make_directory", path)

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)
        self._durable_names.discard(path)
        self._step("remove_directory", path)

    def fsync_directory(self, path: Path) -> None:
        super().fsync_directory(path)
        if "fsync_directory" not in self.forgotten:
            self._durable_names |= {child for child in path.iterdir()}
            for gone in [name for name in self._unlinked if name.parent == path]:
                del self._unlinked[gone]
        self._step("fsync_directory", path)

    def surely_there(self, path: Path, root: Path) -> bytes | None:
        """Returns the contents a power cut now surely leaves at `path`; None if it may be gone."""
        way = path
        while way != root:
            if way not in self._durable_names:
                return None
            way = way.parent
        return self._synced.get(self._entries[path], b"")

    def possible_contents(self, path: Path) -> set[bytes] | None:
        """Returns what `path` may hold after a power cut now if its entry survives."""
        source = self._entries.get(path)
        if source is None:
            return None
        return {self._synced.get(source, b""), self._written[source]}

    def survivors(self, root: Path, random: Random) -> dict[Path, bytes]:
        """Returns one state of all that a power cut now may leave below `root`, drawn at random."""
        left: dict[Path, bytes] = {}
        for path, source in {**self._unlinked, **self._entries}.items():
            surely = self.surely_there(path, root) if path in self._entries else None
            if surely is not None:
                left[path] = surely
            elif random.random() < 0.5:
                written = self._written[source]
                torn = written[: random.randrange(len(written) + 1)]
                left[path] = self._synced.get(source, random.choice((b"", torn, written)))
        return left

    def start_from(self, contents: Mapping[Path, bytes], root: Path) -> None:
        """Takes files that are there as durable, with all the directories on the way to them."""
        for path, body in contents.items():
            self._entries[path] = path
            self._written[path] = self._synced[path] = body
            while path != root:
                self._durable_names.add(path)
                path = path.parent

    def _step(self, call: str, path: Path) -> None:
        self.trace.append((call, path.name))
        self.after_step()
