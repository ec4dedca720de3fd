"""The self-checking envelope of every small object: WAL slots, manifests, catalog, floors, cluster.

    offset  size  field
    0       5     magic b"SHOAL"
    5       1     kind
    6       2     format version, little-endian like all numbers here
    8       4     header length H
    12      8     payload length P
    20      H     header: a msgpack map with text keys
    20+H    P     payload
    20+H+P  16    xxh3-128 of everything before, canonical (big-endian) bytes

Invariant B-4 (every damaged byte is noticed): bucket/README.md. Magic, kind, version and the
trailing checksum keep their place in every future format, so that a server can tell a bucket newer
than itself from a damaged one.
"""

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

from shoal_cluster.domain.errors import Conflict, Corrupt

MAGIC = b"SHOAL"
FORMAT_VERSION = 1
PUT_ID_BYTES = 16
_FIXED = struct.Struct("<5sBHIQ")
_CHECKSUM_BYTES = 16
_ENVELOPE_BYTES_MIN = _FIXED.size + _CHECKSUM_BYTES


class EnvelopeKind(enum.IntEnum):
    """What an object is; a number is never reused."""

    WAL = 1
    MANIFEST = 2
    MANIFEST_FLOOR = 3
    CATALOG = 4
    CATALOG_FLOOR = 5
    CLUSTER = 6
    PROBE = 7
    SEGMENT_META = 8
    TOMBSTONES = 9
    DELETION = 10
    LOAD_ROWS = 11
    LOAD_RECEIPT = 12
    LOAD_PREPARED = 13
    LOAD_DECISION = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What `decode` returns. payload is a view into the body that was decoded: no copy."""

    header: Mapping[str, Any]
    payload: memoryview


def encode(kind: int, header: Mapping[str, Any], payload: bytes | memoryview = b"") -> bytes:
    """Returns the envelope's bytes.

    header: msgpack-able; objects that `create` (bucket/create.py) puts carry their 16 random bytes
    under "put_id". Equal arguments give equal bytes.
    """
    packed: bytes = msgpack.packb(dict(header))
    body_size = memoryview(payload).nbytes
    fixed = _FIXED.pack(MAGIC, kind, FORMAT_VERSION, len(packed), body_size)
    digest = xxhash.xxh3_128(fixed)
    digest.update(packed)
    digest.update(payload)
    return b"".join((fixed, packed, payload, digest.digest()))


def decode(body: bytes | memoryview, kind: int, *, key: str) -> Envelope:
    """Returns header and payload after checking every byte.

    key: where the body was found, for the message.

    Raises: Corrupt when the bytes are damaged, cut short or of another kind; Conflict when a newer
    Shoal wrote them.
    """
    found_kind, envelope = _open(body, key)
    if found_kind != kind:
        raise Corrupt(
            f"object {key} is of kind {found_kind} where kind {kind} belongs; "
            "was it copied to another key?"
        )
    return envelope


def put_id_of(body: bytes | memoryview) -> bytes:
    """Returns the put id inside an envelope of any kind, after checking every byte.

    Raises: Corrupt when the bytes are damaged or carry no put id; Conflict when a newer Shoal wrote
    them.
    """
    _, envelope = _open(body, "(read back)")
    put_id = envelope.header.get("put_id")
    if not isinstance(put_id, bytes) or len(put_id) != PUT_ID_BYTES:
        raise Corrupt(f"envelope carries no put id of {PUT_ID_BYTES} bytes, but {put_id!r}")
    return put_id


def _open(body: bytes | memoryview, key: str) -> tuple[int, Envelope]:
    view = memoryview(body)
    if view.nbytes < _ENVELOPE_BYTES_MIN:
        raise Corrupt(
            f"object {key} holds {view.nbytes} bytes, fewer than the {_ENVELOPE_BYTES_MIN} "
            "of an empty envelope"
        )
    magic, kind, version, header_size, payload_size = _FIXED.unpack_from(view)
    if magic != MAGIC:
        raise Corrupt(f"object {key} starts with {magic!r}, not with {MAGIC!r}")
    checked = view[:-_CHECKSUM_BYTES]
    # The checksum before the version: a flipped bit must not pass for a newer format.
    if xxhash.xxh3_128_digest(checked) != view[-_CHECKSUM_BYTES:]:
        raise Corrupt(f"object {key} ({view.nbytes} bytes) does not match its checksum")
    if version > FORMAT_VERSION:
        raise Conflict(
            f"this bucket was written by a newer Shoal: object {key} has format {version}, "
            f"this server reads up to {FORMAT_VERSION}; upgrade the server"
        )
    if version < 1 or checked.nbytes != _FIXED.size + header_size + payload_size:
        raise Corrupt(
            f"object {key} of format {version} announces {header_size} + {payload_size} bytes "
            f"and holds {checked.nbytes - _FIXED.size}"
        )
    payload_at = _FIXED.size + header_size
    try:
        header = msgpack.unpackb(checked[_FIXED.size : payload_at])
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise Corrupt(f"object {key} has a header that is no msgpack map: {error}") from error
    if not isinstance(header, dict):
        raise Corrupt(f"object {key} has a header that is no msgpack map")
    return kind, Envelope(header=header, payload=checked[payload_at:])
