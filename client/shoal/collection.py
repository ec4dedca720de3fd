"""A handle on one collection. What is sent and how replies are read is in calls.py."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

from shoal.arguments import RANGE_HITS_MAX
from shoal.batches import Payload, points_or_arrays
from shoal.bulk import BATCH_SIZE, IN_FLIGHT
from shoal.calls import Calls, ConsistencyName, SearchOptions
from shoal.connection import Connection
from shoal.exploring import (
    Examples,
    ExploringCalls,
    FacetCounts,
    Groups,
    RangeOptions,
    ReadOptions,
)
from shoal.filters import Filter
from shoal.point import Point, Provenance
from shoal.results import (
    DeleteResult,
    Page,
    PatchResult,
    PointsRead,
    SearchResult,
    UpsertResult,
)
from shoal.schema import (
    CollectionDescription,
    Model,
)
from shoal.session import SessionToken
from shoal.streams import RangeHits
from shoal.vectors import VectorLike, VectorsLike


class Collection:
    """A handle on one collection. Costs nothing to make and holds no connection of its own."""

    def __init__(
        self, connection: Connection, calls: Calls, name: str, model: Model | None
    ) -> None:
        self._connection = connection
        self._calls = calls
        self._exploring = ExploringCalls(calls.sessions)
        self.name = name
        self.model = model

    def __repr__(self) -> str:
        return f"<Collection {self.name!r}>"

    @property
    def session(self) -> SessionToken:
        """What this client has seen of the collection so far."""
        return self._calls.sessions.token(self.name)

    def describe(self, *, timeout_s: float | None = None) -> CollectionDescription:
        """Returns the schema and about how many rows there are."""
        return self._connection.run(self._calls.describe_collection(self.name), timeout_s)

    def upsert(
        self,
        points: Iterable[Point] | Point | None = None,
        *,
        ids: Sequence[str] | None = None,
        vectors: VectorsLike | None = None,
        attributes: Sequence[Mapping[str, Any] | None] | None = None,
        payloads: Sequence[Payload] | None = None,
        provenance: Sequence[Provenance | None] | None = None,
        if_absent: bool = False,
        if_seq: Sequence[int | None] | None = None,
        timeout_s: float | None = None,
    ) -> UpsertResult:
        """Writes up to 1,000 points, given as `points` or as arrays, replacing those with the ids.

        Returns when they are durable and visible. if_absent: only if none of the ids exists.
        if_seq: only if each point's stored version has this `seq`, None for no condition. A
        condition that does not hold raises Conflict.
        """
        given = points_or_arrays(
            points,
            ids=ids,
            vectors=vectors,
            attributes=attributes,
            payloads=payloads,
            provenance=provenance,
        )
        call = self._calls.upsert(
            self.name, given, model=self.model, if_absent=if_absent, if_seq=if_seq
        )
        return self._connection.run(call, timeout_s)

    def bulk_upsert(
        self,
        points: Iterable[Point] | None = None,
        *,
        ids: Sequence[str] | None = None,
        vectors: VectorsLike | None = None,
        attributes: Sequence[Mapping[str, Any] | None] | None = None,
        payloads: Sequence[Payload] | None = None,
        provenance: Sequence[Provenance | None] | None = None,
        batch_size: int = BATCH_SIZE,
        in_flight: int = IN_FLIGHT,
        progress: Callable[[int, int | None], None] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Writes any number of points in batches over one stream; returns how many.

        in_flight: batches unacknowledged at once. progress: called with (rows done, rows in total
        or None) after each batch. timeout_s bounds each batch, not the whole. Ids must be distinct:
        batches in flight have no order among them. When it raises, the error says how many rows
        were acknowledged; calling again with the same points is safe.
        """
        given = points_or_arrays(
            points,
            ids=ids,
            vectors=vectors,
            attributes=attributes,
            payloads=payloads,
            provenance=provenance,
        )
        plan = self._calls.bulk_upsert(
            self.name, given, model=self.model, batch_size=batch_size, progress=progress
        )
        return self._connection.upload(plan, in_flight=in_flight, timeout_s=timeout_s)

    def get(
        self,
        ids: Sequence[str] | str,
        *,
        with_vector: bool = False,
        consistency: ConsistencyName = "session",
        timeout_s: float | None = None,
    ) -> PointsRead:
        """Returns the points with these ids, in that order; ids that do not exist are left out."""
        call = self._calls.get(self.name, ids, with_vector=with_vector, consistency=consistency)
        return self._connection.run(call, timeout_s)

    def patch_attributes(
        self,
        ids: Sequence[str] | str,
        attributes: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        *,
        remove: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> PatchResult:
        """Sets and removes attributes of existing points; everything else stays.

        attributes: one mapping for all ids, or one for each. remove: names, for all ids.
        """
        call = self._calls.patch_attributes(self.name, ids, attributes, remove)
        return self._connection.run(call, timeout_s)

    def delete(self, ids: Sequence[str] | str, *, timeout_s: float | None = None) -> DeleteResult:
        """Removes points by id; ids that do not exist are no error."""
        return self._connection.run(self._calls.delete(self.name, ids), timeout_s)

    def delete_where(self, filter: Filter, *, timeout_s: float | None = None) -> DeleteResult:
        """Removes every point that satisfies the filter."""
        return self._connection.run(self._calls.delete_where(self.name, filter), timeout_s)

    def scroll_page(
        self,
        filter: Filter | None = None,
        *,
        order_by: str | None = None,
        descending: bool = False,
        page_size: int = 100,
        cursor: bytes | None = None,
        with_payload: bool = True,
        with_vector: bool = False,
        consistency: ConsistencyName = "session",
        explain: bool = False,
        timeout_s: float | None = None,
    ) -> Page:
        """Returns one page; its `cursor` starts the next one, None after the last.

        order_by, descending: see `scroll`. explain: only with order_by.
        """
        if order_by is not None:
            ordered = self._exploring.scroll(
                self.name,
                order_by=order_by,
                descending=descending,
                condition=filter,
                page_size=page_size,
                cursor=cursor,
                with_payload=with_payload,
                with_vector=with_vector,
                consistency=consistency,
                explain=explain,
            )
            return self._connection.run(ordered, timeout_s)
        call = self._calls.scroll(
            self.name,
            condition=filter,
            page_size=page_size,
            cursor=cursor,
            with_payload=with_payload,
            with_vector=with_vector,
            consistency=consistency,
        )
        return self._connection.run(call, timeout_s)

    def scroll(
        self,
        filter: Filter | None = None,
        *,
        order_by: str | None = None,
        descending: bool = False,
        page_size: int = 100,
        with_payload: bool = True,
        with_vector: bool = False,
        consistency: ConsistencyName = "session",
        timeout_s: float | None = None,
    ) -> Iterator[Point]:
        """Yields every point that satisfies the filter, fetching page after page.

        A point that is there all the while is yielded exactly once. timeout_s bounds each page.
        order_by: an attribute (not a keyword list) whose values order the points, ties by id, those
        without a value last; a point whose value changes meanwhile may be yielded twice or not.
        """
        cursor: bytes | None = None
        while True:
            page = self.scroll_page(
                filter,
                order_by=order_by,
                descending=descending,
                page_size=page_size,
                cursor=cursor,
                with_payload=with_payload,
                with_vector=with_vector,
                consistency=consistency,
                timeout_s=timeout_s,
            )
            yield from page
            cursor = page.cursor
            if cursor is None:
                return

    def count(
        self,
        filter: Filter | None = None,
        *,
        consistency: ConsistencyName = "session",
        timeout_s: float | None = None,
    ) -> int:
        """Returns how many points satisfy the filter."""
        call = self._calls.count(self.name, condition=filter, consistency=consistency)
        return self._connection.run(call, timeout_s)

    def facets(
        self,
        attribute: str,
        *,
        filter: Filter | None = None,
        limit: int = 10,
        timeout_s: float | None = None,
        **options: Unpack[ReadOptions],
    ) -> FacetCounts:
        """Counts points by the value of an attribute, exactly; returns the most frequent values."""
        call = self._exploring.facets(
            self.name, attribute, condition=filter, limit=limit, **options
        )
        return self._connection.run(call, timeout_s)

    def search(
        self,
        vector: VectorLike,
        *,
        k: int = 10,
        filter: Filter | None = None,
        max_cost_ms: float | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> SearchResult:
        """Finds the k points nearest to `vector`; see SearchOptions for the rest.

        max_cost_ms: instead of a recall, the milliseconds of one processor that the query may be
        expected to cost; the best recall that they pay for is aimed at, 0.5 at least.
        """
        call = self._calls.search(
            self.name,
            vector=vector,
            k=k,
            condition=filter,
            model=self.model,
            max_cost_ms=max_cost_ms,
            **options,
        )
        return self._connection.run(call, timeout_s)[0]

    def search_batch(
        self,
        vectors: VectorsLike | None = None,
        *,
        ids: Sequence[str] | None = None,
        k: int = 10,
        filter: Filter | None = None,
        max_cost_ms: float | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> list[SearchResult]:
        """Answers up to 256 queries, given as vectors or as stored points, in their order.

        max_cost_ms: as in `search`, of each query.
        """
        call = self._calls.search(
            self.name,
            vectors=vectors,
            ids=ids,
            k=k,
            condition=filter,
            model=self.model,
            max_cost_ms=max_cost_ms,
            **options,
        )
        return self._connection.run(call, timeout_s)

    def search_by_id(
        self,
        id: str,
        *,
        k: int = 10,
        filter: Filter | None = None,
        max_cost_ms: float | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> SearchResult:
        """Finds the k points nearest to a stored one, which is left out of its own hits.

        max_cost_ms: as in `search`.
        """
        call = self._calls.search(
            self.name,
            ids=[id],
            k=k,
            condition=filter,
            model=self.model,
            max_cost_ms=max_cost_ms,
            **options,
        )
        return self._connection.run(call, timeout_s)[0]

    def recommend(
        self,
        positive: Examples,
        negative: Examples = (),
        *,
        k: int = 10,
        filter: Filter | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> SearchResult:
        """Finds the k points nearest to what the positive examples have in common.

        Examples are ids of stored points, which are left out of the hits, or vectors. The search is
        for mean(positive) + (mean(positive) - mean(negative)).
        """
        call = self._exploring.recommend(
            self.name, positive, negative, k=k, condition=filter, model=self.model, **options
        )
        return self._connection.run(call, timeout_s)

    def search_diverse(
        self,
        query: VectorLike | str,
        *,
        k: int = 10,
        candidates: int | None = None,
        mmr_lambda: float = 0.5,
        filter: Filter | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> SearchResult:
        """Finds k near points that differ from each other, by maximal marginal relevance.

        query: a vector, or the id of a stored point. candidates: how many of the nearest to choose
        among, 4k when absent. mmr_lambda: 1 is nearness alone, 0 difference alone. Hits come in the
        order they were chosen.
        """
        call = self._exploring.search_diverse(
            self.name,
            query,
            k=k,
            candidates=candidates,
            mmr_lambda=mmr_lambda,
            condition=filter,
            model=self.model,
            **options,
        )
        return self._connection.run(call, timeout_s)

    def search_groups(
        self,
        query: VectorLike | str,
        *,
        group_by: str,
        groups: int = 10,
        group_size: int = 3,
        filter: Filter | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> Groups:
        """Finds the nearest groups of points that share a value, each with its best points.

        query: a vector, or the id of a stored point. group_by: a keyword, int, timestamp or bool
        attribute; points without a value are in no group. groups x group_size: at most 1,000.
        """
        call = self._exploring.search_groups(
            self.name,
            query,
            group_by=group_by,
            groups=groups,
            group_size=group_size,
            condition=filter,
            model=self.model,
            **options,
        )
        return self._connection.run(call, timeout_s)

    def search_range(
        self,
        query: VectorLike | str,
        *,
        score_min: float | None = None,
        distance_max: float | None = None,
        limit: int = RANGE_HITS_MAX,
        filter: Filter | None = None,
        timeout_s: float | None = None,
        **options: Unpack[RangeOptions],
    ) -> RangeHits:
        """Iterates over every point within a distance, nearest first; exact.

        query: a vector, or the id of a stored point. score_min: for cosine and dot; distance_max:
        for l2; both inclusive. At most `limit` hits; `truncated` says at the end whether there are
        more. timeout_s bounds the wait for each message.
        """
        work = self._exploring.search_range(
            self.name,
            query,
            score_min=score_min,
            distance_max=distance_max,
            limit=limit,
            condition=filter,
            model=self.model,
            **options,
        )
        return RangeHits(self._connection.stream(work, timeout_s))
