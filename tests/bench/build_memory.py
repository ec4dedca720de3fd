"""Peak memory of a merge, above that of an idle process, beside its estimate.

    python -m tests.bench.build_memory 100000 384 8 300

Rows, dimension, attributes a row, payload bytes a row. The sources are made by a process of their
own, so that nothing of them is in the memory of the one that is measured.
"""

import asyncio
import json
import os
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shoal_cluster.bucket.local import LocalStore
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.ids import Epoch, SegmentId
from shoal_cluster.domain.keys import segment_id
from shoal_cluster.domain.point import NO_PROVENANCE, encode_tail
from shoal_cluster.domain.schema import AttributeType, CollectionSchema
from shoal_cluster.manifest.manifest import SegmentEntry
from shoal_cluster.segment.build import SegmentInput
from shoal_cluster.shard.build_memory import build_bytes
from shoal_cluster.shard.building import BuildOrder, execute_build
from shoal_cluster.shard.compute import InlineCompute
from tests.unit.shard.nodes import CLUSTER_UUID, SCHEMA, SHARD

SOURCES = 4
SAMPLE_S = 0.002
_WORDS = [f"{number * 7919 % 5000:x}" for number in range(5000)]


class Shape(NamedTuple):
    rows: int
    dimension: int
    attributes: int
    payload_bytes: int

    @property
    def schema(self) -> CollectionSchema:
        kinds = (AttributeType.INT, AttributeType.KEYWORD)
        attributes = {f"a{i}": kinds[i % 2] for i in range(self.attributes)}
        return replace(SCHEMA, dimension=self.dimension, attributes=attributes)


class Measured(NamedTuple):
    """All in bytes. resident: memory without a file; private: what RLIMIT_DATA counts."""

    resident: int
    private: int
    estimate: int


def measure(shape: Shape, folder: Path) -> Measured:
    """Merges SOURCES segments of `shape` under `folder`; forks, so call it before any thread."""
    listed = folder / "sources.json"
    pid = os.fork()
    if pid == 0:
        os._exit(asyncio.run(_make_sources(shape, folder, listed)))
    assert os.waitpid(pid, 0)[1] == 0, "the sources were not made"
    sources = tuple(map(SegmentEntry.from_wire, json.loads(listed.read_text())))
    before, peak = _memory(), [0, 0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            peak[:] = map(max, peak, _memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    asyncio.run(_build(shape, folder, segment_id(Epoch(2), 0, "aaaaaaaa"), sources=sources))
    done.set()
    watcher.join()
    resident, private = (now - then for now, then in zip(peak, before, strict=True))
    return Measured(resident, private, build_bytes(sources, shape.dimension))


async def _make_sources(shape: Shape, folder: Path, listed: Path) -> int:
    rng = np.random.default_rng(1)
    entries = []
    count = shape.rows // SOURCES
    for source in range(SOURCES):
        rows = SegmentInput(
            ids=[f"point-{source}-{row:09d}".encode() for row in range(count)],
            seqs=np.arange(count, dtype=np.uint64) + source * count + 1,
            vectors=rng.standard_normal((count, shape.dimension)).astype(np.float32),
            tails=[_tail(shape, rng) for _ in range(count)],
        )
        name = segment_id(Epoch(1), source, "aaaaaaaa")
        entries.append((await _build(shape, folder, name, rows=rows)).to_wire())
    listed.write_text(json.dumps(entries))
    return 0


def _tail(shape: Shape, rng: np.random.Generator) -> bytes:
    values = rng.integers(1000, size=shape.attributes).tolist()
    attributes = {f"a{i}": f"value-{value}" if i % 2 else value for i, value in enumerate(values)}
    words = rng.integers(len(_WORDS), size=shape.payload_bytes // 4 + 1).tolist()
    payload = " ".join(_WORDS[word] for word in words)[: shape.payload_bytes].encode()
    return encode_tail(1.0, attributes, payload, NO_PROVENANCE)


async def _build(
    shape: Shape,
    folder: Path,
    segment: SegmentId,
    *,
    sources: tuple[SegmentEntry, ...] = (),
    rows: SegmentInput | None = None,
) -> SegmentEntry:
    order = BuildOrder(
        schema=shape.schema,
        shard=SHARD,
        cluster_uuid=CLUSTER_UUID,
        segment=segment,
        sources=sources,
    )
    store = LocalStore(folder / "bucket")
    entry = await execute_build(order, store, folder, SystemClock(), InlineCompute(), rows)
    await store.close()
    assert entry is not None
    return entry


def _memory() -> tuple[int, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    resident, private = (int(found[name].split()[0]) * 1024 for name in ("RssAnon", "VmData"))
    return resident, private


def main() -> int:
    shape = Shape(*map(int, sys.argv[1:]))
    with tempfile.TemporaryDirectory(prefix="shoal-memory-") as folder:
        measured = measure(shape, Path(folder))
    print(json.dumps({**shape._asdict(), **measured._asdict()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
