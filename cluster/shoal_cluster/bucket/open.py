"""Opens the bucket that a directory or a URL names."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.object_store import SCHEMES, ObjectStore
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.errors import InvalidRequest


def open_store(url_or_dir: str, *, on_broken: Callable[[], None] | None = None) -> Store:
    """Returns the store: a path or file:// is a directory, s3:// gs:// az:// are object stores.

    memory:// is an empty bucket that lives as long as the returned store. A directory is made if
    absent. on_broken: see LocalStore; the others do not break.

    Raises: InvalidRequest naming the schemes; Unavailable or PermissionDenied when the place
    cannot be used.
    """
    scheme, separator, _ = url_or_dir.partition("://")
    if not separator:
        if not url_or_dir:
            raise InvalidRequest("bucket is empty; give a directory or a URL", field="bucket")
        return LocalStore(Path(url_or_dir).expanduser(), on_broken=on_broken)
    if scheme == "file":
        parts = urlsplit(url_or_dir)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise InvalidRequest(
                f"bucket {url_or_dir!r} must look like file:///directory", field="bucket"
            )
        return LocalStore(Path(unquote(parts.path)), on_broken=on_broken)
    if scheme == "memory":
        return MemoryStore()
    if scheme in SCHEMES:
        return ObjectStore.from_url(url_or_dir)
    raise InvalidRequest(
        f"bucket {url_or_dir!r} has the unknown scheme {scheme!r}",
        field="bucket",
        limit="a directory, or file, memory, " + ", ".join(SCHEMES),
    )
