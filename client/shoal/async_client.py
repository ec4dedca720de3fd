"""The asyncio client: the surface of `Client`, awaited."""

from collections.abc import (
    Iterable,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import Any, Self

from shoal.async_collection import AsyncCollection
from shoal.async_connection import AsyncConnection
from shoal.batches import Payload
from shoal.calls import Calls, call_of
from shoal.errors import ShoalError
from shoal.load_sources import LoadSource, chunks_of
from shoal.loading import Load, LoadResult, Progress, abort_call
from shoal.retry import DEFAULT_RETRIES, RetryPolicy
from shoal.rpc import DEFAULT_ADDRESS, TIMEOUT_S, TransportName
from shoal.schema import (
    AttributeTypeName,
    CollectionDescription,
    CollectionSchema,
    MetricName,
    Model,
    StorageName,
    TierName,
)
from shoal_protos.v1 import admin_pb2


class AsyncClient:
    """A connection to a Shoal cluster, for one event loop.

    Arguments and promises are those of `Client`; a cancelled call may have been applied.
    """

    def __init__(
        self,
        address: str | Iterable[str] = DEFAULT_ADDRESS,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: RetryPolicy = DEFAULT_RETRIES,
        transport: TransportName = "auto",
    ) -> None:
        self._connection = AsyncConnection(
            address, timeout_s=timeout_s, retries=retries, transport=transport
        )
        self._calls = Calls()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; calls in flight fail. Closing twice is no error."""
        await self._connection.close()

    async def create_collection(
        self,
        name: str,
        *,
        dimension: int,
        metric: MetricName = "cosine",
        attributes: Mapping[str, AttributeTypeName] | None = None,
        partition_by: str | None = None,
        shards: int = 1,
        replicas: int = 1,
        recall_target: float = 0.95,
        model: Model | None = None,
        chunking_rule: str = "",
        storage: StorageName = "float32",
        tier: TierName = "compact",
        recall_sample_share: float = 0.01,
        timeout_s: float | None = None,
    ) -> AsyncCollection:
        """Creates a collection and returns a handle on it.

        attributes: what can be filtered on, by name; partition_by: the keyword attribute whose
        value chooses a point's shard, None for the id. recall_target: share of the true nearest
        neighbours a search must find. model: (name, version) of the model that makes the vectors;
        writes and queries that name another are refused. storage: float16 halves what vectors take
        and rounds them. tier: what is held in memory, see CollectionSchema. recall_sample_share: at
        most so many of the searches are repeated exactly, for the recall in describe_collection.
        """
        schema = CollectionSchema(
            name=name,
            dimension=dimension,
            metric=metric,
            attributes=attributes or {},
            partition_by=partition_by,
            shards=shards,
            replicas=replicas,
            recall_target=recall_target,
            model=model,
            chunking_rule=chunking_rule,
            storage=storage,
            tier=tier,
            recall_sample_share=recall_sample_share,
        )
        await self._connection.run(self._calls.create_collection(schema), timeout_s)
        return self.collection(name, model=model)

    def collection(self, name: str, *, model: Model | None = None) -> AsyncCollection:
        """Returns a handle; asks the server nothing. model: sent with every write and query."""
        return AsyncCollection(self._connection, self._calls, name, model)

    async def describe_collection(
        self, name: str, *, timeout_s: float | None = None
    ) -> CollectionDescription:
        """Returns the schema, about how many rows there are, and the recall searches reach."""
        return await self._connection.run(self._calls.describe_collection(name), timeout_s)

    async def list_collections(self, *, timeout_s: float | None = None) -> list[CollectionSchema]:
        """Returns the schemas of all collections, by name."""
        return await self._connection.run(self._calls.list_collections(), timeout_s)

    async def alter_collection(
        self,
        name: str,
        *,
        add_attributes: Mapping[str, AttributeTypeName] | None = None,
        replicas: int | None = None,
        recall_target: float | None = None,
        chunking_rule: str | None = None,
        model: Model | None = None,
        tier: TierName | None = None,
        recall_sample_share: float | None = None,
        if_version: int | None = None,
        timeout_s: float | None = None,
    ) -> CollectionSchema:
        """Changes what is given and returns the schema as it is now.

        if_version: change nothing, and raise Conflict, unless the schema has this version.
        """
        call = self._calls.alter_collection(
            name,
            add_attributes=add_attributes,
            replicas=replicas,
            recall_target=recall_target,
            chunking_rule=chunking_rule,
            model=model,
            tier=tier,
            recall_sample_share=recall_sample_share,
            if_version=if_version,
        )
        return await self._connection.run(call, timeout_s)

    async def drop_collection(self, name: str, *, timeout_s: float | None = None) -> None:
        """Removes a collection and everything in it."""
        await self._connection.run(self._calls.drop_collection(name), timeout_s)

    async def load(
        self,
        collection: str,
        source: LoadSource,
        *,
        ids: Sequence[str] | None = None,
        attributes: Sequence[Mapping[str, Any] | None] | None = None,
        payloads: Sequence[Payload] | None = None,
        load_id: str | None = None,
        model: Model | None = None,
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> LoadResult:
        """Brings many rows into a collection at once, past the log: all appear together, or none.

        source: vectors (also mapped ones), or a file: .npy (ids are row numbers unless given),
        .jsonl with `id`, `vector`, `attributes`, `payload` in each line, or .parquet with columns
        `id`, `vector`, `payload` and attributes. Points with the same ids are replaced. load_id:
        names the load for ever; the same load again goes on where it was interrupted, and returns
        at once when it is committed. progress: called as rows are staged and segments built.
        timeout_s bounds each call, not the whole.

        Raises: Conflict when the source has changed meanwhile or the load was aborted;
        InvalidRequest naming an id that is there twice.
        """
        load = Load(
            collection,
            chunks_of(source, ids=ids, attributes=attributes, payloads=payloads),
            load_id=load_id,
            model=model,
            progress=progress,
            sessions=self._calls.sessions,
        )
        return await self._connection.load(load, timeout_s)

    async def abort_load(
        self, collection: str, load_id: str, *, timeout_s: float | None = None
    ) -> None:
        """Gives up a load that is not committed: nothing of it will ever be visible.

        Raises: Conflict once it is decided to commit.
        """
        await self._connection.run(abort_call(collection, load_id), timeout_s)

    async def resolve(self, error: ShoalError, *, timeout_s: float | None = None) -> Any:
        """Finds out what became of a write whose `error.outcome` is "maybe_applied".

        Sends the same request again, which is applied at most once, and returns what the write
        would have returned (the schema, for create_collection). Raises a ShoalError when it is
        refused, or still unknown: then it may be resolved again. For errors of bulk_upsert call
        that again instead.
        """
        return await self._connection.run(call_of(error), timeout_s)

    async def status(
        self, collection: str = "", *, timeout_s: float | None = None
    ) -> admin_pb2.StatusResponse:
        """Returns the state of the cluster as the `StatusResponse` message of shoal.v1."""
        return await self._connection.run(self._calls.status(collection), timeout_s)
