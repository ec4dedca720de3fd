"""The one way an object comes into the bucket: create a key with a body, and know who won.

A store answers a put-if-absent with "created" or with nothing to rely on (PutOutcome). This module
turns the second into a fact by reading the key back and comparing the id inside the body.

Invariants B-1 (an answer is a fact), B-2 (same key, same body) and B-3 ("exists" proves nothing):
bucket/README.md.

Source: docs/design/protocol.md 1.3; SlateDB retrying_object_store.rs keeps its id in metadata, we
keep it in the body because a directory has no metadata.
"""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shoal_cluster.bucket.store import PutOutcome, Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import (
    Corrupt,
    Indeterminate,
    InvalidRequest,
    Outcome,
    PermissionDenied,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.limits import MIB

BACKOFF_S_MIN, BACKOFF_S_MAX = 0.02, 1.0
"""From a local directory's answer time to the pace at which a throttled bucket may be asked."""

UNREADABLE_READS_MAX = 4
"""Reads that fail their checksum before we believe the object and not the transfer is damaged."""

READ_BACK_BYTES = 8 * MIB


class Uniform(Protocol):
    """Source of numbers uniform in [0, 1); random.Random is one."""

    def random(self) -> float: ...


class Backoff:
    """Waits 20 ms, 40 ms, … 1 s, until a deadline; with `jitter`, between half and all of that."""

    def __init__(self, *, clock: Clock, deadline_s: float | None, jitter: Uniform | None) -> None:
        self._clock = clock
        self._deadline_s = deadline_s
        self._jitter = jitter
        self._next_s = BACKOFF_S_MIN

    async def wait(self, *, key: str, cause: ShoalError | None) -> None:
        """Sleeps once, or gives up.

        Raises: Indeterminate when the deadline has passed.
        """
        if self._deadline_s is not None and self._clock.monotonic_s() >= self._deadline_s:
            reason = "no answer about it" if cause is None else cause.message
            raise Indeterminate(
                f"gave up resolving the put of {key} at its deadline: {reason}; "
                "the object may still appear"
            ) from cause
        share = 1.0 if self._jitter is None else 0.5 + 0.5 * self._jitter.random()
        await self._clock.sleep(self._next_s * share)
        self._next_s = min(2 * self._next_s, BACKOFF_S_MAX)


async def create(
    store: Store,
    key: str,
    body: bytes,
    *,
    put_id: bytes,
    read_put_id: Callable[[bytes], bytes],
    clock: Clock,
    deadline_s: float | None,
    jitter: Uniform | None = None,
) -> bytes | None:
    """Creates `key` with `body`; returns None if the object is ours, else the other's bytes.

    put_id: the id inside `body`, random, used for no other body ever. read_put_id: finds it in a
    body and checks the body (envelope.put_id_of). deadline_s: an instant of `clock.monotonic_s()`
    after which to give up; None tries for ever. jitter: spreads the retries of rivals.

    Raises: Indeterminate when the deadline passed with the put unresolved (the caller must step
    down: it may not put anything else at this key); Corrupt with MAYBE_APPLIED when the key holds
    an object that stays unreadable; whatever the store raises for a put that surely did nothing.
    """

    async def read_back() -> _Found | None:
        found = await store.get(key)
        if found is None:
            return None
        if read_put_id(found) != put_id:
            return _Found(ours=False, body=found)
        if found != body:
            raise Corrupt(f"object {key} carries our put id {put_id.hex()} with another body")
        return _Found(ours=True, body=found)

    backoff = Backoff(clock=clock, deadline_s=deadline_s, jitter=jitter)
    found = await _put_until_resolved(key, lambda: store.create(key, body), read_back, backoff)
    return None if found.ours else found.body


async def create_file_once(
    store: Store,
    key: str,
    path: Path,
    *,
    sha256: str,
    size_bytes: int,
    clock: Clock,
    deadline_s: float | None,
    jitter: Uniform | None = None,
) -> None:
    """Creates `key` with the contents of a file, under a name nobody else ever uses.

    For segment files: the name is unique, so an object found there must be this file; that is
    verified by size and sha256 (lower-case hex) of what the store gives back. deadline_s: an
    instant of `clock.monotonic_s()`, or None.

    Raises: Corrupt when the key holds something else; Indeterminate when the deadline passed.
    """

    async def read_back() -> _Found | None:
        found = await _read_digest(store, key)
        if found is None:
            return None
        if found != (size_bytes, sha256):
            raise Corrupt(
                f"object {key} has {found[0]} bytes with sha256 {found[1]}, but the file put "
                f"there has {size_bytes} with {sha256}; its name should be unique"
            )
        return _Found(ours=True, body=b"")

    backoff = Backoff(clock=clock, deadline_s=deadline_s, jitter=jitter)
    await _put_until_resolved(key, lambda: store.create_file(key, path), read_back, backoff)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What a contested key holds."""

    ours: bool
    body: bytes


async def _put_until_resolved(
    key: str,
    attempt: Callable[[], Awaitable[PutOutcome]],
    read_back: Callable[[], Awaitable[_Found | None]],
    backoff: Backoff,
) -> _Found:
    """Attempts the same put, reading back after every doubt, until the key holds an object."""
    unresolved = False
    unreadable = 0
    while True:
        cause: ShoalError | None = None
        try:
            if await attempt() is PutOutcome.CREATED:
                return _Found(ours=True, body=b"")
            unresolved = True
        except Indeterminate:
            raise
        except ShoalError as error:
            # This attempt did nothing. An earlier one may still land, so its fate comes first.
            if not unresolved:
                raise
            cause = error
        try:
            found = await read_back()
            if found is not None:
                return found
        except Unavailable as error:
            cause = error
        except Corrupt as error:
            unreadable += 1
            if unreadable >= UNREADABLE_READS_MAX:
                raise Corrupt(error.message, outcome=Outcome.MAYBE_APPLIED) from error
            cause = error
        except (PermissionDenied, InvalidRequest) as error:
            raise Indeterminate(f"cannot resolve the put of {key}: {error.message}") from error
        # Absent is not final: the first request may still be in flight. Same key, same body.
        await backoff.wait(key=key, cause=cause)


async def _read_digest(store: Store, key: str) -> tuple[int, str] | None:
    """Returns size and sha256 of the stored object, read in pieces, or None when absent."""
    digest = hashlib.sha256()
    size_bytes = 0
    while True:
        piece = await store.get_range(key, size_bytes, READ_BACK_BYTES)
        if piece is None:
            return None
        digest.update(piece)
        size_bytes += len(piece)
        if len(piece) < READ_BACK_BYTES:
            return size_bytes, digest.hexdigest()
