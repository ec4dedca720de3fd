"""How much memory a build takes: what planners count with, and what a builder is held to.

The estimate is for planners, who know a segment only by its manifest entry. It cannot be exact:
payloads are compressed there. So the builder's process is held to the bound as well, and a build
that needs more fails there by itself instead of taking the machine's memory from the servers.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from shoal_cluster.domain import limits
from shoal_cluster.index.cost_model import WIDE_DIMENSION_MIN
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.segment import format as layout

_FIXED_BYTES = 128 * limits.MIB
"""Blocks of rows that are encoded, training, stacks and heaps of the store's threads."""

_VECTOR_COPIES = 2
"""One of the sources' rows and one in the order of ids, while the former is let go."""

_ROW_BYTES = 1000
"""Of a row beside vector, codes and payload: id, attributes decoded and as Python holds them, the
attribute index. Measured with eight short attributes: 600; none: 200.

Merging 100,000 rows of 384-d with them and 300 bytes of payload took 362 MiB, the estimate is 598:
`python -m tests.bench.build_memory 100000 384 8 300`."""

_PAYLOAD_EXPANSION = 4
"""Payloads are compressed in their file. Text becomes three to four times as large again."""


def build_bytes(sources: Iterable[SegmentEntry], dimension: int) -> int:
    """Estimates the memory, above that of an idle builder, of merging what lives of `sources`."""
    return _FIXED_BYTES + sum(_source_bytes(source, dimension) for source in sources)


def rows_fitting(dimension: int) -> int:
    """Returns how many rows without payloads one build takes: the largest segment there can be."""
    row_bytes = _vector_bytes(dimension) + _ROW_BYTES
    fitting = (limits.BUILD_MEMORY_BYTES_MAX - _FIXED_BYTES) // row_bytes
    return min(limits.SEGMENT_ROWS_MAX, fitting)


def _source_bytes(source: SegmentEntry, dimension: int) -> int:
    stored = {file.name: file.size_bytes for file in source.files}
    # All rows of one source are read to pick the living ones; its vectors are mapped.
    payload = _PAYLOAD_EXPANSION * stored.get(layout.PAYLOAD, 0)
    return source.live * (_vector_bytes(dimension) + _ROW_BYTES) + payload


def _vector_bytes(dimension: int) -> int:
    # FAISS holds the codes and, while they are written, a copy. From 256 values on they have 2 bits
    # a value at most, else 4.
    codes = dimension // 2 if dimension >= WIDE_DIMENSION_MIN else dimension
    return _VECTOR_COPIES * 4 * dimension + codes


@contextlib.contextmanager
def bounded_memory(limit_bytes: int = limits.BUILD_MEMORY_BYTES_MAX) -> Iterator[None]:
    """Lets this process allocate at most so much more than it has; past it allocations fail.

    Python and numpy raise MemoryError then; a library that does not expect it ends the process,
    which only a process that does nothing else can afford. Mapped files do not count. Linux only:
    elsewhere nothing is bounded.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    _, hard = before
    soft = _private_bytes() + limit_bytes
    resource.setrlimit(
        resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _private_bytes() -> int:
    """Returns what RLIMIT_DATA counts of this process: private, writable memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * limits.KIB
    return 0
