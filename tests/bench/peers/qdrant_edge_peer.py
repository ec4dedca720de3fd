"""Qdrant Edge: Qdrant's storage engine as a library, in process.

HNSW over inner product with a payload index on each attribute, made before the graph, which then
gets extra links for filters. One process holds the shard, so clients are threads of that process.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench.peers.peer import (
    EF_LADDER,
    HNSW_BUILDS,
    Address,
    Clients,
    Condition,
    Floats,
    Loaded,
    Peer,
    Rows,
    Setting,
)

SEGMENTS: Final = 1
FULL_SCAN_KB: Final = 10_000
"""Below so much matching data a filter scans instead of walking the graph; Qdrant's default."""

BATCH: Final = 1_000


class Adapter(Peer):
    distributions = ("qdrant-edge-py",)
    networked = False
    clients = Clients.THREADS
    builds = HNSW_BUILDS

    def __init__(self) -> None:
        self._shard: Any = None
        self._directory = Path()

    def start(self, directory: Path) -> Address:
        self._directory = directory
        return {}

    def load(self, rows: Rows, build: Setting) -> Loaded:
        import qdrant_edge as edge

        graph = edge.HnswIndexConfig(
            m=build["m"], ef_construct=build["ef_construction"], full_scan_threshold=FULL_SCAN_KB
        )
        self._shard = edge.EdgeShard.create(
            str(self._directory / "shard"),
            edge.EdgeConfig(
                vectors=edge.EdgeVectorParams(
                    size=rows.vectors.shape[1], distance=edge.Distance.Dot, on_disk=False
                ),
                hnsw_config=graph,
                optimizers=edge.EdgeOptimizersConfig(
                    default_segment_number=SEGMENTS, indexing_threshold=1, max_segment_size=None
                ),
            ),
        )
        for name in rows.columns:
            self._shard.update(
                edge.UpdateOperation.create_field_index(name, edge.PayloadSchemaType.Keyword)
            )
        seconds = {}
        started_s = time.perf_counter()
        for first in range(0, len(rows.vectors), BATCH):
            points = [
                edge.Point(
                    number,
                    rows.vectors[number].tolist(),
                    {name: column[number] for name, column in rows.columns.items()},
                )
                for number in range(first, min(first + BATCH, len(rows.vectors)))
            ]
            self._shard.update(edge.UpdateOperation.upsert_points(points))
        seconds["upsert"] = time.perf_counter() - started_s
        started_s = time.perf_counter()
        self._shard.optimize()
        self._shard.flush()
        seconds["optimize"] = time.perf_counter() - started_s
        described = self._shard.info()
        return Loaded(
            seconds=seconds,
            settings={
                "index": "hnsw",
                **build,
                "full_scan_threshold": FULL_SCAN_KB,
                "default_segment_number": SEGMENTS,
                "batch": BATCH,
            },
            note=f"{described.indexed_vectors_count} vectors indexed in "
            f"{described.segments_count} segments",
        )

    def connect(self, address: Address) -> "_Session":
        return _Session(self._shard)

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        return [[{"hnsw_ef": ef} for ef in EF_LADDER]]

    def stop(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


class _Session:
    def __init__(self, shard: Any) -> None:
        import qdrant_edge

        self._edge = qdrant_edge
        self._shard = shard

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        edge = self._edge
        matching = None
        if condition is not None:
            match = edge.MatchValue(condition.value)
            matching = edge.Filter(must=[edge.FieldCondition(condition.column, match=match)])
        found = self._shard.search(
            edge.SearchRequest(
                query=edge.Query.Nearest(query.tolist()),
                limit=k,
                filter=matching,
                params=edge.SearchParams(hnsw_ef=setting["hnsw_ef"]),
                with_payload=False,
            )
        )
        return [point.id for point in found]

    def close(self) -> None:
        return None
