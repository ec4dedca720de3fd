"""The reads beside top-k search, by id, by filter and counting, as one thing to serve.

Each is in a module of its own; docs/design/more-search.md says what they promise.
"""

from collections.abc import AsyncGenerator

from shoal_cluster.query.diversity import DiverseRequest, search_diverse
from shoal_cluster.query.execute import SearchResult
from shoal_cluster.query.facets import FacetsRequest, FacetsResult, count_facets
from shoal_cluster.query.grouping import GroupsRequest, GroupsResult, search_groups
from shoal_cluster.query.ordered_scroll import OrderedRows, OrderedScrollRequest, scroll_ordered
from shoal_cluster.query.range_search import RangeHits, RangeRequest, search_range
from shoal_cluster.query.recommendation import RecommendRequest, recommend
from shoal_cluster.query.scatter import Scatter


class Explorer:
    """Answers them over the replicas of a searcher. Used from one event loop."""

    def __init__(self, scatter: Scatter) -> None:
        self._scatter = scatter

    async def recommend(self, request: RecommendRequest, *, timeout_s: float) -> SearchResult:
        return await recommend(self._scatter, request, timeout_s=timeout_s)

    async def search_diverse(self, request: DiverseRequest, *, timeout_s: float) -> SearchResult:
        return await search_diverse(self._scatter, request, timeout_s=timeout_s)

    def search_range(
        self, request: RangeRequest, *, timeout_s: float
    ) -> AsyncGenerator[RangeHits, None]:
        return search_range(self._scatter, request, timeout_s=timeout_s)

    async def search_groups(self, request: GroupsRequest, *, timeout_s: float) -> GroupsResult:
        return await search_groups(self._scatter, request, timeout_s=timeout_s)

    async def facets(self, request: FacetsRequest, *, timeout_s: float) -> FacetsResult:
        return await count_facets(self._scatter, request, timeout_s=timeout_s)

    async def scroll_ordered(
        self, request: OrderedScrollRequest, *, timeout_s: float
    ) -> OrderedRows:
        return await scroll_ordered(self._scatter, request, timeout_s=timeout_s)
