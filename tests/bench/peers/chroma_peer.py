"""Chroma: its server (`chroma run`) and its HTTP client.

HNSW with inner product; batches as large as the server takes. Rows are indexed when a query has
first read the log, so that query belongs to the load. `ef_search` belongs to the collection, not
to a query, and is read when the index is: the server is restarted for every setting. It logs
errors alone; as shipped it prints several lines a query.
"""

import contextlib
import os
import socket
import subprocess
import sys
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

START_S: Final = 60.0
STOP_S: Final = 10.0
_COLLECTION: Final = "rows"


class Adapter(Peer):
    distributions = ("chromadb",)
    networked = True
    clients = Clients.PROCESSES
    builds = HNSW_BUILDS

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._directory = Path()
        self._address: Address = {}

    def start(self, directory: Path) -> Address:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._directory = directory
        self._address = {"host": "127.0.0.1", "port": port}
        self._run()
        return self._address

    def _run(self) -> None:
        self._server = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "chroma"), "run"),
                *("--path", str(self._directory)),
                *("--host", self._address["host"]),
                *("--port", str(self._address["port"])),
            ],
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "RUST_LOG": "error"},
        )
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                _client(self._address).heartbeat()
                return
            except Exception:  # its client wraps a refused connection in several
                if time.monotonic() > deadline_s or self._server.poll() is not None:
                    raise
                time.sleep(0.1)

    def load(self, rows: Rows, build: Setting) -> Loaded:
        client = _client(self._address)
        index = {
            "space": "ip",
            "max_neighbors": build["m"],
            "ef_construction": build["ef_construction"],
            "ef_search": EF_LADDER[0],
        }
        collection = client.create_collection(
            _COLLECTION, configuration={"hnsw": index}, embedding_function=None
        )
        batch = client.get_max_batch_size()
        metadatas = [
            dict(zip(rows.columns, values, strict=True))
            for values in zip(*rows.columns.values(), strict=True)
        ]
        started_s = time.perf_counter()
        for first in range(0, len(rows.vectors), batch):
            part = slice(first, first + batch)
            vectors = rows.vectors[part]
            collection.add(
                ids=[str(number) for number in range(first, first + len(vectors))],
                embeddings=vectors,
                metadatas=metadatas[part],
            )
        added_s = time.perf_counter()
        collection.query(query_embeddings=rows.vectors[:1], n_results=1, include=[])
        indexed_s = time.perf_counter()
        assert collection.count() == len(rows.vectors), "every row was added"
        return Loaded(
            seconds={"add": added_s - started_s, "index": indexed_s - added_s},
            settings={"index": "hnsw", **index, "batch": batch},
        )

    def connect(self, address: Address) -> "_Session":
        return _Session(_collection(address))

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        return [[{"ef_search": ef} for ef in EF_LADDER]]

    def tune(self, setting: Setting) -> None:
        """Changes the collection and restarts the server: it reads `ef_search` with the index."""
        _collection(self._address).modify(configuration={"hnsw": dict(setting)})
        self.stop()
        self._run()

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(STOP_S)
            self._server.kill()
            self._server.wait()
            self._server = None


def _client(address: Address) -> Any:
    import chromadb

    return chromadb.HttpClient(
        host=address["host"],
        port=address["port"],
        settings=chromadb.Settings(anonymized_telemetry=False),
    )


def _collection(address: Address) -> Any:
    return _client(address).get_collection(_COLLECTION, embedding_function=None)


class _Session:
    def __init__(self, collection: Any) -> None:
        self._collection = collection

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        where = None if condition is None else {condition.column: condition.value}
        found = self._collection.query(
            query_embeddings=[query], n_results=k, where=where, include=[]
        )
        return [int(each) for each in found["ids"][0]]

    def close(self) -> None:
        return None
