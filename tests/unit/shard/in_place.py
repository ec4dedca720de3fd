"""A bucket of plain files that segments are mapped from in place, without threads or fsync."""

from pathlib import Path

from shoal_cluster.bucket.memory import MemoryStore


class Files(dict[str, bytes]):
    """Objects by key, each also a file below `root`; writing one changes its bytes in place."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __setitem__(self, key: str, body: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        # In place: what has the file mapped sees the change, as it would see a page go bad.
        with path.open("r+b" if key in self else "wb") as file:
            file.write(body)
            file.truncate()
        super().__setitem__(key, body)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        (self.root / key).unlink()

    def pop(self, key: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        body = self.get(key, default)
        if key in self:
            del self[key]
        return body


class InPlaceStore(MemoryStore):
    """Store over `Files`: a local directory as far as readers can tell."""

    def __init__(self, root: Path) -> None:
        super().__init__(Files(root))
        self.root = root

    def local_path(self, key: str) -> Path | None:
        return self.root / key


def flip(body: bytes, at: int, bit: int = 0) -> bytes:
    """Returns the bytes with one bit changed."""
    return body[:at] + bytes([body[at] ^ (1 << bit)]) + body[at + 1 :]
