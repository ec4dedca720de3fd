"""Milvus 2.3: the embedded standalone server of the package, asked through pymilvus.

HNSW over inner product. After the inserts the collection is flushed and compacted, indexed and
loaded, so that every row is searched through an index. Its parts listen on every address and on
fixed ports: the server runs in a network of its own.
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

BATCH: Final = 5_000
"""Rows: 8 MB, an eighth of the largest request."""

INDEX_S: Final = 1_800.0
_COLLECTION: Final = "rows"


class Adapter(Peer):
    distributions = ("milvus", "pymilvus")
    networked = True
    clients = Clients.PROCESSES
    builds = HNSW_BUILDS
    needs_own_network = True

    def __init__(self) -> None:
        self._server: Any = None
        self._address: Address = {}

    def start(self, directory: Path) -> Address:
        from milvus import MilvusServer, MilvusServerConfig

        self._server = MilvusServer(MilvusServerConfig(data_dir=str(directory)))
        self._server.start()
        self._address = {"host": "127.0.0.1", "port": self._server.listen_port}
        return self._address

    def load(self, rows: Rows, build: Setting) -> Loaded:
        from pymilvus import Collection, CollectionSchema, DataType, FieldSchema, utility

        _connect(self._address)
        fields = [
            FieldSchema("id", DataType.INT64, is_primary=True),
            FieldSchema("embedding", DataType.FLOAT_VECTOR, dim=rows.vectors.shape[1]),
            *(FieldSchema(name, DataType.VARCHAR, max_length=128) for name in rows.columns),
        ]
        collection = Collection(_COLLECTION, CollectionSchema(fields), shards_num=1)
        seconds = {}
        started_s = time.perf_counter()
        for first in range(0, len(rows.vectors), BATCH):
            part = slice(first, first + BATCH)
            vectors = rows.vectors[part]
            ids = list(range(first, first + len(vectors)))
            collection.insert([ids, vectors, *(column[part] for column in rows.columns.values())])
        seconds["insert"] = time.perf_counter() - started_s
        started_s = time.perf_counter()
        collection.flush()
        collection.compact()
        collection.wait_for_compaction_completed()
        seconds["flush"] = time.perf_counter() - started_s
        started_s = time.perf_counter()
        index = {"M": build["m"], "efConstruction": build["ef_construction"]}
        collection.create_index(
            "embedding", {"index_type": "HNSW", "metric_type": "IP", "params": index}
        )
        for name in rows.columns:
            collection.create_index(name, index_name=name)
        utility.wait_for_index_building_complete(
            _COLLECTION, index_name="embedding", timeout=INDEX_S
        )
        collection.load()
        seconds["index"] = time.perf_counter() - started_s
        return Loaded(seconds=seconds, settings={"index": "HNSW", **index, "batch": BATCH})

    def connect(self, address: Address) -> "_Session":
        from pymilvus import Collection

        _connect(address)
        return _Session(Collection(_COLLECTION))

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        return [[{"ef": ef} for ef in EF_LADDER]]

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def _connect(address: Address) -> None:
    from pymilvus import connections

    connections.connect(host=address["host"], port=address["port"], timeout=60)


class _Session:
    def __init__(self, collection: Any) -> None:
        self._collection = collection

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        expression = None if condition is None else f'{condition.column} == "{condition.value}"'
        found = self._collection.search(
            [query],
            "embedding",
            {"metric_type": "IP", "params": dict(setting)},
            k,
            expr=expression,
            consistency_level="Eventually",
        )
        ids: list[int] = found[0].ids
        return ids

    def close(self) -> None:
        return None
