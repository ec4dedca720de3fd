"""seekdb: the server its package starts, asked through the package's C client over a Unix socket.

HNSW over inner product, made after the rows were inserted; an index on each attribute. `open` of a
directory whose server runs already attaches to that server, so clients are processes of their own.
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

TYPE: Final = "hnsw"
MEMORY: Final = "8G"
BATCH: Final = 500
"""Rows an INSERT: vectors are text in SQL, so 2 MB a statement."""

_DIGITS: Final = 6
"""Significant digits of a component: float16 data has four."""


class Adapter(Peer):
    distributions = ("pylibseekdb",)
    networked = True
    clients = Clients.PROCESSES
    builds = HNSW_BUILDS

    def __init__(self) -> None:
        self._instance: Any = None
        self._address: Address = {}

    def start(self, directory: Path) -> Address:
        import pylibseekdb

        self._address = {"directory": str(directory / "db")}
        self._instance = pylibseekdb.open(self._address["directory"])
        connection = self._instance.connect(autocommit=True)
        connection.cursor().execute(f"ALTER SYSTEM SET memory_budget = '{MEMORY}'")
        connection.close()
        return self._address

    def load(self, rows: Rows, build: Setting) -> Loaded:
        connection = self._instance.connect(autocommit=True)
        cursor = connection.cursor()
        dimension = rows.vectors.shape[1]
        columns = "".join(
            f", {name} VARCHAR(128) NOT NULL, KEY idx_{name} ({name})" for name in rows.columns
        )
        cursor.execute("SET SESSION ob_query_timeout = 3600000000")
        cursor.execute(
            f"CREATE TABLE vectors (id INT PRIMARY KEY, embedding VECTOR({dimension}){columns})"
        )
        seconds = {}
        started_s = time.perf_counter()
        named = ", ".join(["id", "embedding", *rows.columns])
        for first in range(0, len(rows.vectors), BATCH):
            values = ", ".join(
                f"({number}, '{_text(rows.vectors[number])}'"
                + "".join(f", '{column[number]}'" for column in rows.columns.values())
                + ")"
                for number in range(first, min(first + BATCH, len(rows.vectors)))
            )
            cursor.execute(f"INSERT INTO vectors ({named}) VALUES {values}")
        seconds["insert"] = time.perf_counter() - started_s
        started_s = time.perf_counter()
        index = {"DISTANCE": "inner_product", "TYPE": TYPE, "LIB": "vsag", "M": build["m"]}
        index["EF_CONSTRUCTION"] = build["ef_construction"]
        options = ", ".join(f"{name}={value}" for name, value in index.items())
        cursor.execute(f"CREATE VECTOR INDEX idx_embedding ON vectors (embedding) WITH ({options})")
        seconds["index"] = time.perf_counter() - started_s
        connection.close()
        return Loaded(seconds=seconds, settings={**index, "memory_budget": MEMORY, "batch": BATCH})

    def connect(self, address: Address) -> "_Session":
        import pylibseekdb

        return _Session(pylibseekdb.open(address["directory"]))

    def settings(self, condition: Condition | None, rows: int) -> Sequence[Sequence[Setting]]:
        own_plan = [{"ob_hnsw_ef_search": ef} for ef in EF_LADDER]
        if condition is None:
            return [own_plan]
        # Left to itself it compares the rows that match one by one, which is slow for many.
        return [[{**each, "hint": "INDEX(vectors idx_embedding)"} for each in own_plan], own_plan]

    def stop(self) -> None:
        if self._instance is not None:
            self._instance.close()
            self._instance = None


def _text(vector: Floats) -> str:
    return "[" + ",".join([f"{each:.{_DIGITS}g}" for each in vector.tolist()]) + "]"


class _Session:
    def __init__(self, instance: Any) -> None:
        self._instance = instance
        self._connection = instance.connect(database="test", autocommit=True)
        self._cursor = self._connection.cursor()
        self._setting: Mapping[str, Any] = {}

    def search(
        self, query: Floats, k: int, condition: Condition | None, setting: Setting
    ) -> Sequence[int]:
        if setting != self._setting:
            ef_search = setting["ob_hnsw_ef_search"]
            self._cursor.execute(f"SET SESSION ob_hnsw_ef_search = {ef_search}")
            self._setting = dict(setting)
        hint = f"/*+ {setting['hint']} */ " if "hint" in setting else ""
        where = "" if condition is None else f"WHERE {condition.column} = '{condition.value}' "
        self._cursor.execute(
            f"SELECT {hint}id FROM vectors {where}ORDER BY "
            f"negative_inner_product(embedding, '{_text(query)}') APPROXIMATE LIMIT {k}"
        )
        return [row[0] for row in self._cursor.fetchall()]

    def close(self) -> None:
        self._connection.close()
        self._instance.close()
