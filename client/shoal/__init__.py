"""The SDK of Shoal, a distributed vector database.

from shoal import Client, F

with Client("127.0.0.1:7700") as client:
    notes = client.create_collection("notes", dimension=3, attributes={"year": "int"})
    notes.upsert(ids=["a"], vectors=[[1, 0, 0]], attributes=[{"year": 2024}])
    for hit in notes.search([1, 0, 0], k=1, filter=F("year") >= 2020):
        print(hit.id, hit.score)
"""

from shoal.async_client import AsyncClient
from shoal.async_collection import AsyncCollection
from shoal.calls import ConsistencyName, SearchOptions
from shoal.client import Client
from shoal.collection import Collection
from shoal.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    Indeterminate,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    ShoalError,
    Unauthenticated,
    Unavailable,
)
from shoal.exploring import FacetCount, FacetCounts, Group, Groups, RangeOptions, ReadOptions
from shoal.filters import F, Filter
from shoal.loading import LoadProgress, LoadResult
from shoal.point import Point, Provenance
from shoal.results import (
    DeleteResult,
    Hit,
    Page,
    PatchResult,
    PointsRead,
    SearchResult,
    UpsertResult,
)
from shoal.retry import RetryPolicy
from shoal.schema import CollectionDescription, CollectionSchema, RecallEstimate
from shoal.session import Position, SessionToken
from shoal.streams import AsyncRangeHits, RangeHits

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncCollection",
    "AsyncRangeHits",
    "Client",
    "Collection",
    "CollectionDescription",
    "CollectionSchema",
    "Conflict",
    "ConsistencyName",
    "Corrupt",
    "DeleteResult",
    "F",
    "FacetCount",
    "FacetCounts",
    "Filter",
    "Group",
    "Groups",
    "Hit",
    "Indeterminate",
    "Internal",
    "InvalidRequest",
    "LoadProgress",
    "LoadResult",
    "NotFound",
    "Overloaded",
    "Page",
    "PatchResult",
    "PermissionDenied",
    "Point",
    "PointsRead",
    "Position",
    "Provenance",
    "RangeHits",
    "RangeOptions",
    "ReadOptions",
    "RecallEstimate",
    "RetryPolicy",
    "SearchOptions",
    "SearchResult",
    "SessionToken",
    "ShoalError",
    "Unauthenticated",
    "Unavailable",
    "UpsertResult",
]
