"""LanceDB: a table format and its library, in process; every client process opens the table.

Inverted file of one-bit codes (RaBitQ) rescored from the table, and a bitmap index on each
attribute. Of its index kinds this one answers as fast as product codes or quantised HNSW and is
built many times faster.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench.peers.peer import (
    Address,
    Clients,
    Condition,
    Floats,
    Loaded,
    Peer,
    Rows,
    Setting,
)

BATCH: Final = 50_000
"""Rows: each batch is a file of the table."""

PARTITION_ROWS: Final = 1_000
PROBES: Final = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
REFINE_FACTORS: Final = (5, 20)


class Adapter(Peer):
    distributions = ("lancedb",)
    networked = False
    clients = Clients.PROCESSES
    builds = ({"index": "IvfRq", "num_bits": 1},)

    def __init__(self) -> None:
        self._address: Address = {}

    def start(self, directory: Path) -> Address:
        self._address = {"directory": str(directory)}
        return self._address

    def load(self, rows: Rows, build: Setting) -> Loaded:
        import lancedb
        import pyarrow as pa
        from lancedb.index import Bitmap, IvfRq

        database = lancedb.connect(self._address["directory"])
        dimension = rows.vectors.shape[1]
        schema = pa.schema(
            [
                pa.field("id", pa.int32()),
                pa.field("embedding", pa.list_(pa.float32(), dimension)),
                *(pa.field(name, pa.string()) for name in rows.columns),
            ]
        )
        seconds = {}
        started_s = time.perf_counter()
        table = database.create_table("rows", schema=schema)
        for first in range(0, len(rows.vectors), BATCH):
            part = slice(first, first + BATCH)
            vectors = rows.vectors[part]
            table.add(
                pa.table(
                    [
                        pa.array(range(first, first + len(vectors)), pa.int32()),
                        pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dimension),
                        *(pa.array(column[part]) for column in rows.columns.values()),
                    ],
                    schema=schema,
                )
            )
        seconds["add"] = time.perf_counter() - started_s
        started_s = time.perf_counter()
        partitions = _partitions(len(rows.vectors))
        codes = IvfRq(distance_type="dot", num_partitions=partitions, num_bits=build["num_bits"])
        table.create_index("embedding", config=codes)
        for name in rows.columns:
            table.create_index(name, config=Bitmap())
        seconds["index"] = time.perf_counter() - started_s
        for index in table.list_indices():
            assert not table.index_stats(index.name).num_unindexed_rows, f"{index.name} has all"
        return Loaded(
            seconds=seconds, settings={**build, "num_partitions": partitions, "batch": BATCH}
        )

    def connect(self, address: Address) -> "_Session":
        import lancedb

        return _Session(lancedb.connect(address["directory"]).open_table("rows"))

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        partitions = _partitions(rows)
        probes = [each for each in PROBES if each < partitions] + [partitions]
        return [
            [{"nprobes": each, "refine_factor": factor} for each in probes]
            for factor in REFINE_FACTORS
        ]

    def stop(self) -> None:
        return None


def _partitions(rows: int) -> int:
    return max(1, rows // PARTITION_ROWS)


class _Session:
    def __init__(self, table: Any) -> None:
        self._table = table

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        search = (
            self._table.search(query, vector_column_name="embedding")
            .distance_type("dot")
            .select(["id", "_distance"])
            .nprobes(setting["nprobes"])
            .refine_factor(setting["refine_factor"])
            .limit(k)
        )
        if condition is not None:
            search = search.where(f"{condition.column} = '{condition.value}'", prefilter=True)
        ids: list[int] = search.to_arrow()["id"].to_pylist()
        return ids

    def close(self) -> None:
        return None
