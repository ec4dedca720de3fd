"""The object store of a cloud: S3 and its kin, GCS, Azure, through obstore.

Creates go through handles that never retry: a retry inside the client turns our own success into
"already exists". Whatever else a create answers is UNRESOLVED; bucket/README.md tabulates what
obstore 0.12 says in which case. Reads go through a handle with bounded retries.
"""

import asyncio
import mmap
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

from shoal_cluster.bucket.keys import check_key, check_prefix
from shoal_cluster.bucket.store import ObjectEntry, PutOutcome
from shoal_cluster.domain.errors import (
    InvalidRequest,
    PermissionDenied,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.limits import MIB

CREATE_TIMEOUT_S = 10.0
"""A put that takes longer than 100 times its usual 100 ms is better resolved by reading."""

FILE_BYTES_PER_S_MIN = 1 * MIB
"""Slowest upload of a file that is waited for; its timeout is its size over this, plus 10 s."""

PUT_FILE_BYTES_MAX = 4096 * MIB
"""S3 takes 5 GiB in one put; only a single put can be conditional."""

READ_TIMEOUT_S = 10.0
READ_RETRIES_MAX = 4
READ_RETRY_TIMEOUT_S = 20.0
LIST_ENTRIES_MAX = 2_000_000
LIST_PAGE_ENTRIES = 1000

SCHEMES = ("s3", "gs", "az")
_OPTIONS: Mapping[str, frozenset[str]] = {
    "s3": frozenset({"endpoint", "region", "virtual_hosted_style_request", "skip_signature"}),
    "gs": frozenset({"skip_signature"}),
    "az": frozenset({"endpoint", "use_emulator", "skip_signature"}),
}
_ABSENT_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_CLIENT_ERRORS = (exceptions.BaseError, OSError)
_FORBIDDEN = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)


class ObjectStore:
    """Store over a cloud bucket and a prefix inside it."""

    def __init__(
        self, url: str, *, config: Mapping[str, str], allow_http: bool, create_timeout_s: float
    ) -> None:
        self.url = url
        self._config = dict(config)
        self._allow_http = allow_http
        self._creates = self._handle(timeout_s=create_timeout_s, retries_max=0)
        self._reads = self._handle(timeout_s=READ_TIMEOUT_S, retries_max=READ_RETRIES_MAX)

    @staticmethod
    def from_url(url: str, *, create_timeout_s: float = CREATE_TIMEOUT_S) -> "ObjectStore":
        """Returns the store that a URL such as `s3://bucket/prefix?region=eu-west-1` names.

        Credentials come from the environment of the process (AWS_*, GOOGLE_*, AZURE_*), never from
        the URL, which is logged. Options: endpoint, region, virtual_hosted_style_request (s3);
        endpoint, use_emulator (az); skip_signature and allow_http=true (all), the latter for
        loopback only in tests.

        Raises: InvalidRequest naming the option or the scheme; Unavailable when the environment
        lacks something the client needs.
        """
        parts = urlsplit(url)
        known = _OPTIONS.get(parts.scheme)
        if known is None or not parts.netloc:
            raise InvalidRequest(
                f"bucket URL {url!r} must look like s3://bucket/prefix",
                field="bucket",
                limit="schemes " + ", ".join(SCHEMES),
            )
        config = dict(parse_qsl(parts.query, keep_blank_values=True))
        allow_http = config.pop("allow_http", "false") == "true"
        if unknown := config.keys() - known:
            raise InvalidRequest(
                f"bucket URL has the unknown option {min(unknown)!r}",
                field="bucket",
                limit="options " + ", ".join(sorted(known | {"allow_http"})),
            )
        bare = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
        return ObjectStore(
            bare, config=config, allow_http=allow_http, create_timeout_s=create_timeout_s
        )

    async def create(self, key: str, body: bytes) -> PutOutcome:
        """Puts the object if absent, in one attempt.

        Raises: PermissionDenied, Unavailable (no such bucket): the store refused, nothing was
        applied.
        """
        check_key(key)
        return await self._put(self._creates, key, body)

    async def create_file(self, key: str, path: Path) -> PutOutcome:
        """Puts the contents of a file, mapped and not copied into memory, in one attempt."""
        check_key(key)
        size_bytes = path.stat().st_size
        if size_bytes > PUT_FILE_BYTES_MAX:
            raise InvalidRequest(
                f"file {path.name} has {size_bytes} bytes", limit=f"{PUT_FILE_BYTES_MAX} bytes"
            )
        if size_bytes == 0:
            return await self._put(self._creates, key, b"")
        handle = self._handle(
            timeout_s=CREATE_TIMEOUT_S + size_bytes / FILE_BYTES_PER_S_MIN, retries_max=0
        )
        with open(path, "rb") as file:
            # Never closed by hand: a request given up may still hold the pages for a moment.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return await self._put(handle, key, mapping)

    async def get(self, key: str) -> bytes | None:
        check_key(key)
        try:
            answer = await obstore.get_async(self._reads, key)
            body = bytes(await answer.bytes_async())
        except FileNotFoundError as error:
            self._require_bucket(error)
            return None
        except _CLIENT_ERRORS as error:
            raise self._refusal("get", key, error) from error
        if len(body) != answer.meta["size"]:
            raise Unavailable(
                f"get of {key} gave {len(body)} of {answer.meta['size']} bytes; try again"
            )
        return body

    async def get_range(self, key: str, start: int, length: int) -> bytes | None:
        check_key(key)
        if length > 0:
            try:
                return bytes(
                    await obstore.get_range_async(self._reads, key, start=start, length=length)
                )
            except FileNotFoundError as error:
                self._require_bucket(error)
                return None
            except _CLIENT_ERRORS as error:
                refusal, cause = self._refusal("get", key, error), error
        # Stores refuse a range that starts at or past the end; the port says it is empty.
        size_bytes = await self._size_bytes(key)
        if size_bytes is None:
            return None
        if length <= 0 or start >= size_bytes:
            return b""
        raise refusal from cause

    async def list(self, prefix: str) -> list[ObjectEntry]:
        check_prefix(prefix)
        entries: list[ObjectEntry] = []
        try:
            async for page in obstore.list(
                self._reads, prefix or None, chunk_size=LIST_PAGE_ENTRIES
            ):
                entries.extend(ObjectEntry(meta["path"], meta["size"]) for meta in page)
                if len(entries) > LIST_ENTRIES_MAX:
                    raise Unavailable(
                        f"more than {LIST_ENTRIES_MAX} objects under {prefix!r}",
                        limit=f"{LIST_ENTRIES_MAX} objects a listing",
                    )
        except _CLIENT_ERRORS as error:
            raise self._refusal("list", prefix, error) from error
        return entries

    async def delete(self, key: str) -> None:
        check_key(key)
        try:
            await obstore.delete_async(self._reads, key)
        except FileNotFoundError as error:
            self._require_bucket(error)
        except _CLIENT_ERRORS as error:
            raise self._refusal("delete", key, error) from error

    async def make_durable(self, prefix: str) -> None:
        """Does nothing: an object store shows only what is durable."""
        check_prefix(prefix)

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    async def close(self) -> None:
        await asyncio.sleep(0)

    async def _put(self, handle: Any, key: str, body: bytes | mmap.mmap) -> PutOutcome:
        try:
            await obstore.put_async(handle, key, body, mode="create")
        except FileNotFoundError as error:
            # A put knows no other 404 than that of the bucket itself.
            raise Unavailable(f"bucket of {self.url} does not exist; create it first") from error
        except _FORBIDDEN as error:
            raise self._refusal("put", key, error) from error
        except _CLIENT_ERRORS:
            # Exists, conflict, timeout, reset, 5xx: no telling them apart is worth trusting.
            return PutOutcome.UNRESOLVED
        return PutOutcome.CREATED

    async def _size_bytes(self, key: str) -> int | None:
        try:
            meta = await obstore.head_async(self._reads, key)
        except FileNotFoundError:
            return None
        except _CLIENT_ERRORS as error:
            raise self._refusal("head", key, error) from error
        return int(meta["size"])

    def _handle(self, *, timeout_s: float, retries_max: int) -> Any:
        try:
            return from_url(
                self.url,
                config=self._config,  # type: ignore[call-overload]
                client_options={
                    "timeout": timedelta(seconds=timeout_s),
                    "allow_http": self._allow_http,
                },
                retry_config={
                    "max_retries": retries_max,
                    "retry_timeout": timedelta(seconds=READ_RETRY_TIMEOUT_S),
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=100),
                        "max_backoff": timedelta(seconds=2),
                        "base": 2,
                    },
                },
            )
        except (*_CLIENT_ERRORS, ValueError) as error:
            raise Unavailable(
                f"bucket {self.url} cannot be opened: {_first_line(error)}"
            ) from error

    def _require_bucket(self, error: FileNotFoundError) -> None:
        """Raises if the 404 speaks of the bucket: then nothing is known about the key."""
        if any(text in str(error) for text in _ABSENT_BUCKET):
            raise Unavailable(f"bucket of {self.url} does not exist; create it first") from error

    def _refusal(self, operation: str, key: str, error: Exception) -> ShoalError:
        text = _first_line(error)
        if isinstance(error, _FORBIDDEN):
            return PermissionDenied(
                f"{operation} of {key or '(all)'} under {self.url} is not allowed; the credentials "
                f"need get, put, delete and list (without list, S3 answers 403 for 404): {text}"
            )
        return Unavailable(f"{operation} of {key or '(all)'} under {self.url} failed: {text}")


def _first_line(error: Exception) -> str:
    """Returns the message without the client's debug dump that follows it."""
    return str(error).partition("\n")[0][:400]
