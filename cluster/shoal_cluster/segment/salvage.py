"""Reads a segment's rows from the three files that nothing else can replace.

`codes`, `attributes` and `meta` are made from the others (build.py), so a segment that has lost
one of them is built again: by compaction, which never reads them, or in a server's cache, so that
a shard can be opened and then repaired at all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal_cluster.domain.errors import Corrupt
from shoal_cluster.index.distances import widened
from shoal_cluster.segment import format as layout
from shoal_cluster.segment.build import SegmentInput, content_hashes
from shoal_cluster.segment.format import map_file
from shoal_cluster.segment.ids import IdTable
from shoal_cluster.segment.payload import PayloadFile
from shoal_cluster.segment.residence import stored_vectors

ROW_FILES: Final = (layout.VECTORS, layout.IDS, layout.PAYLOAD)
"""What holds the rows: once one of these is damaged, rows are lost."""

DERIVED_FILES: Final = (layout.CODES, layout.ATTRIBUTES, layout.META)


def read_rows(segment_id: str, files: Mapping[str, Path], seq_base: int = 0) -> SegmentInput:
    """Returns all rows, dead ones included, in row order; float32 vectors are a mapped view.

    files: at least ROW_FILES, whose checksums the caller has compared. seq_base: see IdTable.

    Raises: Corrupt when the files contradict each other or a row does not match its hash (S-4).
    """
    mapped = {name: map_file(f"{segment_id}/{name}", files[name]) for name in ROW_FILES}
    vectors = stored_vectors(mapped[layout.VECTORS])
    rows = len(vectors)
    ids, payload = IdTable(mapped[layout.IDS], seq_base), PayloadFile(mapped[layout.PAYLOAD])
    counts = {layout.VECTORS: rows, layout.IDS: ids.rows, layout.PAYLOAD: payload.rows}
    if len(set(counts.values())) != 1:
        raise Corrupt(f"segment {segment_id} has files of different rows: {counts}")
    every_row = np.arange(rows)
    found = SegmentInput(
        ids=ids.ids_of(every_row),
        seqs=ids.seqs_of(every_row),
        vectors=widened(vectors),
        tails=payload.tails(every_row),
    )
    wrong = np.flatnonzero(content_hashes(found) != ids.contents)
    if len(wrong):
        raise Corrupt(
            f"segment {segment_id} has {len(wrong)} rows that do not match their hash, "
            f"the first is row {wrong[0]} (S-4)"
        )
    return found


def take_rows(rows: SegmentInput, chosen: npt.NDArray[np.int64]) -> SegmentInput:
    """Returns the chosen rows; their vectors are copied."""
    return SegmentInput(
        ids=[rows.ids[row] for row in chosen.tolist()],
        seqs=rows.seqs[chosen],
        vectors=np.ascontiguousarray(rows.vectors[chosen]),
        tails=[rows.tails[row] for row in chosen.tolist()],
    )
