"""Shoal as it ships: a cluster on this machine with one shard server, asked through the SDK.

One shard, one replica, a durable bucket directory. The one setting is the recall a query declares;
it is swept like the others' settings, so a declaration that falls short costs Shoal and shows.
Clients import the SDK alone, as an application does.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import shoal
from shoal import F
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

COLLECTION: Final = "rows"
RECALL_TARGETS: Final = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
TIMEOUT_S: Final = 60.0


class Adapter(Peer):
    distributions = ("shoal", "faiss-cpu", "ray")
    networked = True
    clients = Clients.PROCESSES
    builds = ({},)

    def __init__(self) -> None:
        self._cluster: Any = None
        self._directory = Path()

    def start(self, directory: Path) -> Address:
        from chaos import cluster as clusters

        self._directory = directory
        self._cluster = clusters.start(directory, servers=1)
        return {"address": self._cluster.grpc_address}

    def load(self, rows: Rows, build: Setting) -> Loaded:
        from tests.bench import writes

        count, dimension = rows.vectors.shape
        names = list(rows.columns)
        with shoal.Client(self._cluster.grpc_address, timeout_s=TIMEOUT_S) as client:
            collection = client.create_collection(
                COLLECTION,
                dimension=dimension,
                attributes={name: "keyword" for name in names},
            )
            started_s = time.perf_counter()
            collection.bulk_upsert(
                ids=[f"row-{row:012d}" for row in range(count)],
                vectors=rows.vectors,
                attributes=[
                    dict(zip(names, values, strict=True))
                    for values in zip(*rows.columns.values(), strict=True)
                ],
            )
            acknowledged_s = time.perf_counter()
            settled = writes.settle(client, self._cluster, COLLECTION, rows=count)
            indexed_s = time.perf_counter()
        return Loaded(
            seconds={
                "bulk_upsert": acknowledged_s - started_s,
                "index": indexed_s - acknowledged_s,
            },
            settings={"shards": 1, "replicas": 1, "servers": 1},
            note=f"{settled['segments']} segments, {settled['memtable_rows']} rows not indexed; "
            "durable and visible after bulk_upsert",
        )

    def connect(self, address: Address) -> "_Session":
        return _Session(shoal.Client(address["address"], timeout_s=TIMEOUT_S))

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        return [[{"recall_target": target} for target in RECALL_TARGETS]]

    def stop(self) -> None:
        if self._cluster is not None:
            from chaos import cluster as clusters

            clusters.stop(self._directory)
            self._cluster = None


class _Session:
    def __init__(self, client: shoal.Client) -> None:
        self._client = client
        self._collection = client.collection(COLLECTION)

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        found = self._collection.search(
            query,
            k=k,
            filter=None if condition is None else F(condition.column) == condition.value,
            recall_target=setting["recall_target"],
            with_payload=False,
        )
        return [int(each[4:]) for each in found.ids]

    def close(self) -> None:
        self._client.close()
