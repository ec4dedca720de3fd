"""A value with numbered versions in the bucket: commit by creating the next number.

Manifests and the catalog share this rule (docs/design/protocol.md, manifest commits):

1. list the versions, take the largest, get it; gone: list again.
2. create version + 1. Somebody else's object there: a conflict, read again.
3. after success list the floor markers; a version at or below the largest marker was created in
   place of a deleted one and counts as a conflict.

Crash after 2: the version is committed; whoever reads next sees it whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from shoal_cluster.bucket.create import Backoff, create
from shoal_cluster.bucket.envelope import EnvelopeKind, decode, encode, put_id_of
from shoal_cluster.bucket.store import Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Corrupt, Unavailable
from shoal_cluster.domain.keys import number_of, padded

_READ_ATTEMPTS_MAX = 100
"""A version listed and gone means garbage collection passed; each retry reads a newer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One stored version: its number, the put id inside its body, and its contents."""

    number: int
    put_id: bytes
    fields: Mapping[str, Any]


class VersionLog:
    """Versions under `versions` with floor markers under `floors` (prefixes ending in '/')."""

    def __init__(
        self,
        store: Store,
        *,
        versions: str,
        floors: str,
        kind: EnvelopeKind,
        floor_kind: EnvelopeKind,
        clock: Clock,
    ) -> None:
        self._store = store
        self._versions = versions
        self._floors = floors
        self._kind = kind
        self._floor_kind = floor_kind
        self._clock = clock

    async def numbers(self) -> list[int]:
        """Returns the stored version numbers, ascending."""
        return sorted(number_of(entry.key) for entry in await self._store.list(self._versions))

    async def newest_number(self) -> int | None:
        numbers = await self.numbers()
        return numbers[-1] if numbers else None

    async def read(self, number: int) -> Version | None:
        """Returns one version, or None when it is not there.

        Raises: Corrupt naming the object.
        """
        body = await self._store.get(f"{self._versions}{padded(number)}")
        return None if body is None else self.decode(number, body)

    async def newest(self) -> Version | None:
        """Returns the newest version, or None when there is none at all."""
        for _ in range(_READ_ATTEMPTS_MAX):
            number = await self.newest_number()
            if number is None:
                return None
            version = await self.read(number)
            if version is not None:
                return version
        raise Unavailable(
            f"versions under {self._versions} vanished {_READ_ATTEMPTS_MAX} times while being read"
        )

    async def commit(self, number: int, put_id: bytes, fields: Mapping[str, Any]) -> bool:
        """Tries to make `fields` version `number`; False when that version is somebody else's.

        put_id: 16 random bytes, used for no other commit.

        Raises: Unavailable when nothing was committed, for certain.
        """
        key = f"{self._versions}{padded(number)}"
        header = {"version": number, "put_id": put_id}
        body = encode(self._kind, header, msgpack.packb(fields))
        other = await create(
            self._store,
            key,
            body,
            put_id=put_id,
            read_put_id=put_id_of,
            clock=self._clock,
            deadline_s=None,
        )
        if other is not None:
            return False
        # The version is there, so giving up now would be a doubt: ask until there is an answer.
        backoff = Backoff(clock=self._clock, deadline_s=None, jitter=None)
        while True:
            try:
                return number > await self.floor()
            except Unavailable as error:
                await backoff.wait(key=key, cause=error)

    async def floor(self) -> int:
        """Returns the largest floor marker, or -1: versions up to it may be deleted already."""
        markers = await self._store.list(self._floors)
        return max((number_of(entry.key) for entry in markers), default=-1)

    async def collect(self, keep_from: int, put_id: bytes) -> list[str]:
        """Deletes versions below `keep_from`, the floor marker first. Returns the deleted keys.

        Crash after the marker: the versions stay until the next collection; nothing is lost.
        """
        below = [number for number in await self.numbers() if number < keep_from]
        if not below:
            return []
        marker = f"{self._floors}{padded(below[-1])}"
        await create(
            self._store,
            marker,
            encode(self._floor_kind, {"floor": below[-1], "put_id": put_id}, b""),
            put_id=put_id,
            read_put_id=put_id_of,
            clock=self._clock,
            deadline_s=None,
        )
        deleted = [f"{self._versions}{padded(number)}" for number in below]
        for key in deleted:
            await self._store.delete(key)
        for entry in await self._store.list(self._floors):
            if number_of(entry.key) < below[-1]:
                await self._store.delete(entry.key)
                deleted.append(entry.key)
        return deleted

    def decode(self, number: int, body: bytes) -> Version:
        """Decodes a version's bytes.

        Raises: Corrupt naming the object; Conflict when a newer Shoal wrote it.
        """
        key = f"{self._versions}{padded(number)}"
        envelope = decode(body, self._kind, key=key)
        found = envelope.header.get("version")
        if found != number or "put_id" not in envelope.header:
            raise Corrupt(f"object {key} says it is version {found}; it was copied or misplaced")
        try:
            fields = msgpack.unpackb(envelope.payload, strict_map_key=False)
        except (ValueError, msgpack.UnpackException) as error:
            raise Corrupt(f"object {key} holds no msgpack map: {error}") from error
        return Version(number=number, put_id=envelope.header["put_id"], fields=fields)
