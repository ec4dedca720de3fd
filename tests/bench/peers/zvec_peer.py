"""zvec: a vector database as a library, in process.

HNSW over inner product in one block of memory, an inverted index on each attribute; after the
inserts the collection is optimised, which builds the graph.
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

BATCH: Final = 1_000


class Adapter(Peer):
    distributions = ("zvec",)
    networked = False
    clients = Clients.THREADS
    builds = HNSW_BUILDS

    def __init__(self) -> None:
        self._collection: Any = None
        self._directory = Path()

    def start(self, directory: Path) -> Address:
        self._directory = directory
        return {}

    def load(self, rows: Rows, build: Setting) -> Loaded:
        import zvec

        graph = zvec.HnswIndexParam(
            metric_type=zvec.MetricType.IP,
            m=build["m"],
            ef_construction=build["ef_construction"],
            use_contiguous_memory=True,
        )
        self._collection = zvec.create_and_open(
            str(self._directory / "collection"),
            zvec.CollectionSchema(
                name="rows",
                fields=[
                    zvec.FieldSchema(
                        name, zvec.DataType.STRING, index_param=zvec.InvertIndexParam()
                    )
                    for name in rows.columns
                ],
                vectors=zvec.VectorSchema(
                    "embedding",
                    zvec.DataType.VECTOR_FP32,
                    dimension=rows.vectors.shape[1],
                    index_param=graph,
                ),
            ),
        )
        seconds = {}
        started_s = time.perf_counter()
        for first in range(0, len(rows.vectors), BATCH):
            documents = [
                zvec.Doc(
                    id=str(number),
                    vectors={"embedding": rows.vectors[number].tolist()},
                    fields={name: column[number] for name, column in rows.columns.items()},
                )
                for number in range(first, min(first + BATCH, len(rows.vectors)))
            ]
            self._collection.insert(documents)
        self._collection.flush()
        seconds["insert"] = time.perf_counter() - started_s
        started_s = time.perf_counter()
        self._collection.optimize()
        seconds["optimize"] = time.perf_counter() - started_s
        return Loaded(
            seconds=seconds,
            settings={"index": "hnsw", **build, "batch": BATCH},
            note=str(self._collection.stats),
        )

    def connect(self, address: Address) -> "_Session":
        return _Session(self._collection)

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        return [[{"ef": ef} for ef in EF_LADDER]]

    def stop(self) -> None:
        if self._collection is not None:
            self._collection.close()
            self._collection = None


class _Session:
    def __init__(self, collection: Any) -> None:
        import zvec

        self._zvec = zvec
        self._collection = collection

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        found = self._collection.query(
            self._zvec.Query(
                field_name="embedding",
                vector=query,
                param=self._zvec.HnswQueryParam(ef=setting["ef"]),
            ),
            topk=k,
            filter=None if condition is None else f"{condition.column} = '{condition.value}'",
            output_fields=[],
        )
        return [int(each.id) for each in found]

    def close(self) -> None:
        return None
