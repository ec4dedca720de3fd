"""What a collection's vectors and codes will take, before there are any. Pure.

Counted: vectors, codes and row numbers, which grow with rows and dimension; and of ids the index
over them. Not counted: payloads and attributes, whose size only their owner knows, memtables and
caches, which do not grow, and the process itself.
"""

import math
from dataclasses import dataclass
from typing import Final

from shoal_cluster.domain.schema import MemoryTier
from shoal_cluster.index.cost_model import CostModel, FamilyChoice, choose_family
from shoal_cluster.index.families import CodeShape
from shoal_cluster.shard.build_memory import rows_fitting

ID_INDEX_BYTES: Final = 32
"""A row in the `ids` file, beside the id itself: offset, sequence number, two hashes, row."""

ROW_NUMBER_BYTES: Final = 8
"""FAISS keeps the number of each row beside its codes."""

BLOCK_ROWS: Final = 32
"""Codes are packed in blocks of so many rows; the last block of each list is half full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Of one replica of one shard, in bytes.

    memory: held in RAM. mapped: files that are mapped; of them the page cache keeps what it can.
    disk: all files. choice: what its largest segments are built as.
    """

    rows: int
    segments: int
    memory: int
    mapped: int
    disk: int
    choice: FamilyChoice


def footprint(rows: int, model: CostModel, recall_target: float) -> Footprint:
    """Returns what a replica of a shard of so many rows takes once they are merged.

    Merging makes segments as large as a build may be; more rows are several segments.
    """
    segments = max(math.ceil(rows / rows_fitting(model.dimension)), 1)
    segment_rows = math.ceil(rows / segments)
    choice = choose_family(segment_rows, model, recall_target)
    codes = 0 if choice.shape is None else codes_bytes(segment_rows, model.dimension, choice.shape)
    vectors = rows * model.dimension * model.storage.value_bytes
    ids = rows * ID_INDEX_BYTES
    return Footprint(
        rows=rows,
        segments=segments,
        memory=segments * codes + (vectors if model.tier is MemoryTier.FULL else 0),
        mapped=ids + (0 if model.tier is MemoryTier.FULL else vectors),
        disk=vectors + segments * codes + ids,
        choice=choice,
    )


def codes_bytes(rows: int, dimension: int, shape: CodeShape) -> int:
    """Returns what the codes of one segment take, in memory as in their file."""
    codes = math.ceil(dimension / shape.values_a_code)
    padded = codes * shape.values_a_code
    # Two codes a byte, in pairs.
    code_bytes = math.ceil(codes / 2)
    if shape.lists == 1:
        packed_rows = math.ceil(rows / BLOCK_ROWS) * BLOCK_ROWS
    else:
        packed_rows = rows + shape.lists * BLOCK_ROWS // 2
    tables = (16 + shape.lists) * padded * 4
    return packed_rows * code_bytes + rows * ROW_NUMBER_BYTES + tables
