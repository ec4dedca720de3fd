"""Rows as they travel: a point, where it came from, and the checksum that follows it everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from shoal_cluster.domain.ids import PointId
from shoal_cluster.domain.schema import AttributeValue

Vector = npt.NDArray[np.float32]
"""C-contiguous float32 of shape (dimension,)."""

Vectors = npt.NDArray[np.float32]
"""C-contiguous float32 of shape (n, dimension)."""

Tail = bytes | memoryview
"""`encode_tail`; a view when it still lies in the frame that it came with."""

SUM_MODULUS = 1 << 64

_SPREAD = 0x9E3779B97F4A7C15
_MIX = 0xBF58476D1CE4E5B9
"""Odd constants of splitmix64 (Steele, Lea, Flood 2014)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a row came from. Times are milliseconds since 1970-01-01 UTC; 0 and "" mean unknown."""

    source_id: str = ""
    source_version: str = ""
    source_changed_at_ms: int = 0
    embedded_at_ms: int = 0


NO_PROVENANCE = Provenance()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One version of one point.

    vector is stored as the index wants it (unit length under cosine); `norm` is the length the
    caller's vector had (1.0 for other metrics), so that it can be given back unchanged.
    payload is an opaque JSON object in UTF-8, "" when absent. seq is the shard's sequence number.
    """

    id: PointId
    seq: int
    vector: Vector
    norm: float
    attributes: Mapping[str, AttributeValue]
    payload: bytes
    provenance: Provenance


def encode_tail(
    norm: float,
    attributes: Mapping[str, AttributeValue],
    payload: bytes,
    provenance: Provenance,
) -> bytes:
    """Returns the canonical bytes of everything in a row but its id, seq and vector.

    Attributes are sorted by name so that equal rows have equal bytes. The tail is written once, at
    the primary, and copied verbatim from WAL to segment to segment.
    """
    origin = None
    if provenance != NO_PROVENANCE:
        origin = [
            provenance.source_id,
            provenance.source_version,
            provenance.source_changed_at_ms,
            provenance.embedded_at_ms,
        ]
    packed: bytes = msgpack.packb([norm, dict(sorted(attributes.items())), payload, origin])
    return packed


def decode_tail(tail: Tail) -> tuple[float, dict[str, AttributeValue], bytes, Provenance]:
    """Reverses `encode_tail`."""
    norm, attributes, payload, origin = msgpack.unpackb(tail)
    if origin is None:
        return norm, attributes, payload, NO_PROVENANCE
    provenance = Provenance(
        source_id=origin[0],
        source_version=origin[1],
        source_changed_at_ms=origin[2],
        embedded_at_ms=origin[3],
    )
    return norm, attributes, payload, provenance


def content_hash(row_id: bytes, vector: bytes | memoryview, tail: bytes) -> int:
    """Returns the 64-bit hash of a row without its sequence number.

    row_id: the id in UTF-8. vector: the stored float32 bytes. tail: `encode_tail`.
    """
    digest = xxhash.xxh3_64(len(row_id).to_bytes(2, "little") + row_id)
    digest.update(vector)
    digest.update(tail)
    return digest.intdigest()


def row_hash(row_id: bytes, seq: int, vector: bytes | memoryview, tail: bytes) -> int:
    """Returns the 64-bit hash of one row version that set checksums add up modulo 2**64.

    Arguments as `content_hash`. A change of any byte of a row changes the sum. The sequence number
    is mixed in by arithmetic, so that loaded rows get theirs without being hashed again
    (`row_hashes`): a multiplication that spreads it, then two rounds as in splitmix64.
    """
    mixed = (content_hash(row_id, vector, tail) + seq * _SPREAD) % SUM_MODULUS
    mixed = (mixed ^ mixed >> 32) * _MIX % SUM_MODULUS
    return mixed ^ mixed >> 29


def row_hashes(
    contents: npt.NDArray[np.uint64], seqs: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Returns `row_hash` of many rows from their content hashes and sequence numbers."""
    # Wraps at 2**64, as numpy's unsigned arrays do.
    mixed: npt.NDArray[np.uint64] = contents + seqs * np.uint64(_SPREAD)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(_MIX)
    mixed ^= mixed >> np.uint64(29)
    return mixed
