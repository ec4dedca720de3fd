"""Where a scroll continues, as opaque bytes. Pure.

A cursor names its collection by id and its filter by hash, so that one used elsewhere is refused
instead of skipping rows.
"""

from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

from shoal_cluster.domain.errors import InvalidRequest
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.limits import POINT_ID_BYTES_MAX
from shoal_cluster.domain.schema import CollectionSchema

_CURSOR_BYTES_MAX = POINT_ID_BYTES_MAX + 128
"""An id, and less than 128 bytes of everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The next row is the first of `shard` with id > after."""

    shard: ShardNumber
    after: bytes

    def encode(self, *, schema: CollectionSchema, filter_wire: Any) -> bytes:
        packed: bytes = msgpack.packb([_scroll_hash(schema, filter_wire), self.shard, self.after])
        return packed

    @staticmethod
    def decode(raw: bytes, *, schema: CollectionSchema, filter_wire: Any) -> "Cursor":
        """Reverses `encode`; b"" is the start.

        Raises: InvalidRequest when the cursor is damaged, or of another collection or filter.
        """
        if not raw:
            return Cursor(shard=ShardNumber(0), after=b"")
        fields = None
        if len(raw) <= _CURSOR_BYTES_MAX:
            try:
                fields = msgpack.unpackb(raw)
            except (ValueError, msgpack.UnpackException):
                fields = None
        match fields:
            case [bytes(scroll), int(shard), bytes(after)] if 0 <= shard < schema.shards:
                if scroll == _scroll_hash(schema, filter_wire):
                    return Cursor(shard=ShardNumber(shard), after=after)
                raise InvalidRequest(
                    "the cursor belongs to another collection or filter; begin without one",
                    field="cursor",
                )
        raise InvalidRequest(
            "not a cursor that a scroll returned; begin without one", field="cursor"
        )


def _scroll_hash(schema: CollectionSchema, filter_wire: Any) -> bytes:
    return xxhash.xxh3_64_digest(msgpack.packb([schema.id, filter_wire]))
