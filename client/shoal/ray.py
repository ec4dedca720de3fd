"""A sink for Ray Data: `ds.write_datasink(shoal.ray.Datasink("127.0.0.1:7700", "notes"))`.

The only module of the SDK that needs Ray, with what Ray Data needs: pip install 'ray[data]'. Its
write tasks stage their blocks side by side, wherever they run; when the last is done the driver
commits, and all rows appear at once. A job that fails leaves nothing visible and may be run again
under the same load id.
"""

from collections.abc import Iterable, Iterator
from typing import Any
from uuid import uuid4

from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink as RayDatasink

from shoal.batches import Batch
from shoal.connection import Connection
from shoal.load_sources import Chunks, batches_of_table
from shoal.loading import Load, abort_call, checked_load_id
from shoal.retry import DEFAULT_RETRIES
from shoal.rpc import DEFAULT_ADDRESS, TIMEOUT_S
from shoal.schema import Model
from shoal.session import Sessions

_PART_DIGITS = 16
"""Of a random name: an attempt of a task that is run again is a part of its own."""


class Datasink(RayDatasink[list[str]]):  # type: ignore[misc]  # Ray's types are not read
    """Writes a dataset into a collection as one bulk load.

    Columns: `id`, `vector` (lists or tensors), perhaps `payload` (JSON); others are attributes.
    load_id: names the load for ever; one that is committed is not written again.
    """

    def __init__(
        self,
        address: str | list[str] = DEFAULT_ADDRESS,
        collection: str = "",
        *,
        load_id: str | None = None,
        model: Model | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._address = address
        self._collection = collection
        self._model = model
        self._timeout_s = timeout_s
        self.load_id = checked_load_id(uuid4().hex if load_id is None else load_id)
        self.rows = 0

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[str]:
        """Stages the blocks of one task; returns the names of its chunks."""
        load = self._load(_batches_of(blocks), part=uuid4().hex[:_PART_DIGITS])
        with self._connection() as connection:
            connection.stage(load, None)
        return load.names

    def on_write_complete(self, write_result: Any) -> None:
        """Commits what the tasks that count have staged; what others have is left out."""
        load = self._load(iter(()), part="0")
        load.names = [name for names in write_result.write_returns for name in names]
        with self._connection() as connection:
            connection.run(load.describe(), None)
            while not connection.run(load.commit(), None):
                pass
        self.rows = load.result.rows

    def on_write_failed(self, error: Exception) -> None:
        """Nothing is visible; what is staged goes at once."""
        with self._connection() as connection:
            connection.run(abort_call(self._collection, self.load_id), None)

    def _load(self, batches: Iterator[Batch], *, part: str) -> Load:
        return Load(
            self._collection,
            Chunks(batches=batches, rows_total=None),
            load_id=self.load_id,
            model=self._model,
            progress=None,
            sessions=Sessions(),
            part=part,
        )

    def _connection(self) -> Connection:
        return Connection(self._address, timeout_s=self._timeout_s, retries=DEFAULT_RETRIES)


def _batches_of(blocks: Iterable[Any]) -> Iterator[Batch]:
    for block in blocks:
        yield from batches_of_table(BlockAccessor.for_block(block).to_arrow())
