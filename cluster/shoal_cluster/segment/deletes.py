"""Tombstones: the rows of a segment that are dead, as a checksummed roaring bitmap.

A segment never changes: deleting a row writes a new tombstones object, named by the next manifest.
"""

import numpy as np
from pyroaring import BitMap

from shoal_cluster.bucket import envelope
from shoal_cluster.bucket.envelope import EnvelopeKind
from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.filtering import bitmaps
from shoal_cluster.index.row_bits import RowBits


def encode_tombstones(rows: int, dead: BitMap) -> bytes:
    """Returns the object's bytes. rows: rows of the segment; every dead row is below it."""
    assert not dead or dead.max() < rows, f"dead row {dead.max()} in a segment of {rows} rows"
    # Run-optimised, so that equal sets have equal bytes however they were put together.
    compact = dead.copy()
    compact.run_optimize()
    header = {"rows": rows, "dead": len(dead)}
    return envelope.encode(EnvelopeKind.TOMBSTONES, header, compact.serialize())


def decode_tombstones(body: bytes | memoryview, rows: int, *, key: str) -> BitMap:
    """Returns the dead rows. rows: rows of the segment. key: where the body was found.

    Raises: Corrupt when the bytes are damaged or belong to a segment of another size; Conflict when
    a newer Shoal wrote them.
    """
    opened = envelope.decode(body, EnvelopeKind.TOMBSTONES, key=key)
    dead = bitmaps.deserialise(opened.payload)
    found = (opened.header.get("rows"), opened.header.get("dead"))
    if found != (rows, len(dead)) or (dead and dead.max() >= rows):
        raise Corrupt(f"tombstones {key} are for (rows, dead) {found}, not {(rows, len(dead))}")
    return dead


def alive_bits(rows: int, dead: BitMap) -> RowBits:
    """Returns the rows of a segment that are not dead, as packed bits (index/row_bits.py)."""
    alive = ~bitmaps.to_packed_bits(dead, rows)
    if rows & 7:
        alive[-1] &= np.uint8((1 << (rows & 7)) - 1)  # bits past the last row stay zero
    return alive
