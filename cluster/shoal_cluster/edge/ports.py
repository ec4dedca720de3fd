"""What the servicers delegate to. query/ and ingest/ implement the data side, actors the rest."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Protocol

from shoal_cluster.domain.point import Vectors
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.schema_change import SchemaChange
from shoal_cluster.domain.status import ClusterStatus, CollectionStatus
from shoal_cluster.filtering.expression import Expression
from shoal_cluster.ingest.execute import WriteResult
from shoal_cluster.ingest.loads import ChunkRequest, LoadProgress, LoadStatus
from shoal_cluster.ingest.validate import (
    DeleteRequest,
    DeleteWhereRequest,
    PatchRequest,
    UpsertRequest,
)
from shoal_cluster.query.diversity import DiverseRequest
from shoal_cluster.query.execute import SearchResult
from shoal_cluster.query.facets import FacetsRequest, FacetsResult
from shoal_cluster.query.grouping import GroupsRequest, GroupsResult
from shoal_cluster.query.ordered_scroll import OrderedRows, OrderedScrollRequest
from shoal_cluster.query.plan import Freshness
from shoal_cluster.query.prepared import SearchTemplate
from shoal_cluster.query.range_search import RangeHits, RangeRequest
from shoal_cluster.query.recommendation import RecommendRequest
from shoal_cluster.query.rows import CountResult, RowsResult


class CollectionControl(Protocol):
    """The controller's side. Every change is durable in the catalog when its call returns, and the
    topology of this coordinator shows it: what a client does next must find the collection.
    """

    async def create_collection(
        self, schema: CollectionSchema, name: RequestName, *, timeout_s: float
    ) -> CollectionSchema:
        """Creates a collection and returns it with its id and version.

        schema: passed `validate_schema`; its id is "" and its version 1.

        Raises: AlreadyExists unless `name` is the request that created it.
        """
        ...

    async def alter_collection(
        self, change: SchemaChange, name: RequestName, *, timeout_s: float
    ) -> CollectionSchema:
        """Commits `apply_change` and returns the schema as stored now.

        Raises: NotFound, Conflict, InvalidRequest.
        """
        ...

    async def drop_collection(
        self, collection: str, name: RequestName, *, timeout_s: float
    ) -> None:
        """Removes a collection from the catalog.

        Raises: NotFound unless `name` is the request that dropped it.
        """
        ...

    async def describe_collection(self, collection: str, *, timeout_s: float) -> CollectionStatus:
        """Returns schema and rows; `shards` may be left empty.

        Raises: NotFound.
        """
        ...

    async def list_collections(self, *, timeout_s: float) -> Sequence[CollectionSchema]:
        """Returns all collections, in any order."""
        ...


class StatusSource(Protocol):
    async def status(self, *, timeout_s: float) -> ClusterStatus:
        """Returns the cluster as the controller last saw it."""
        ...


class Searching(Protocol):
    """query/execute.py `Searcher`."""

    def begin(
        self,
        template: SearchTemplate,
        queries: Vectors | None,
        *,
        timeout_s: float,
        finish: Callable[[SearchResult], bytes],
    ) -> Awaitable[bytes]: ...


class Exploring(Protocol):
    """query/explore.py `Explorer`."""

    async def recommend(self, request: RecommendRequest, *, timeout_s: float) -> SearchResult: ...

    async def search_diverse(
        self, request: DiverseRequest, *, timeout_s: float
    ) -> SearchResult: ...

    def search_range(
        self, request: RangeRequest, *, timeout_s: float
    ) -> AsyncGenerator[RangeHits, None]: ...

    async def search_groups(self, request: GroupsRequest, *, timeout_s: float) -> GroupsResult: ...

    async def facets(self, request: FacetsRequest, *, timeout_s: float) -> FacetsResult: ...

    async def scroll_ordered(
        self, request: OrderedScrollRequest, *, timeout_s: float
    ) -> OrderedRows: ...


class RowReading(Protocol):
    """query/rows.py `RowReader`."""

    async def get(
        self,
        collection: str,
        ids: Sequence[bytes],
        *,
        with_vector: bool,
        freshness: Freshness,
        timeout_s: float,
    ) -> RowsResult: ...

    async def scroll(
        self,
        collection: str,
        *,
        filter: Expression | None,
        limit: int,
        cursor: bytes,
        with_vector: bool,
        with_payload: bool,
        freshness: Freshness,
        timeout_s: float,
    ) -> RowsResult: ...

    async def count(
        self,
        collection: str,
        *,
        filter: Expression | None,
        freshness: Freshness,
        timeout_s: float,
    ) -> CountResult: ...


class Loading(Protocol):
    """ingest/loads.py `Loader`."""

    async def stage(self, request: ChunkRequest) -> None: ...

    async def status(self, collection: str, load: str) -> LoadStatus: ...

    async def commit(
        self, collection: str, load: str, chunks: Sequence[str], *, timeout_s: float
    ) -> LoadProgress: ...

    async def abort(self, collection: str, load: str) -> None: ...


class Writing(Protocol):
    """ingest/execute.py `Writer`."""

    async def upsert(self, request: UpsertRequest, *, timeout_s: float) -> WriteResult: ...

    async def patch(self, request: PatchRequest, *, timeout_s: float) -> WriteResult: ...

    async def delete(self, request: DeleteRequest, *, timeout_s: float) -> WriteResult: ...

    async def delete_where(
        self, request: DeleteWhereRequest, *, timeout_s: float
    ) -> WriteResult: ...
