"""A scripted Shoal server on loopback: answers as told, and remembers what it was asked."""

# ruff: noqa: N802 - gRPC names a servicer's methods as the .proto does.

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NoReturn

import grpc

from shoal_protos.status import ERROR_DETAIL_KEY, STATUS_OF_KIND
from shoal_protos.v1 import (
    collections_pb2,
    collections_pb2_grpc,
    loads_pb2,
    loads_pb2_grpc,
    points_pb2,
    points_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
    types_pb2,
)

Step = Callable[[Any, grpc.ServicerContext], Any]

HANG_MAX_S = 5.0
"""A hanging call ends by itself after this, so that no test can leave a thread behind."""


def token(collection_id: str = "c1", **positions: tuple[int, int]) -> types_pb2.SessionToken:
    """token(s0=(1, 7)) is at epoch 1, seq 7 of shard 0."""
    return types_pb2.SessionToken(
        collection_id=collection_id,
        positions=[
            types_pb2.ShardPosition(shard=int(name[1:]), epoch=epoch, seq=seq)
            for name, (epoch, seq) in positions.items()
        ],
    )


def detail(kind: str, *, maybe_applied: bool = False, **fields: Any) -> types_pb2.ErrorDetail:
    outcome = types_pb2.OUTCOME_MAYBE_APPLIED if maybe_applied else types_pb2.OUTCOME_NOT_APPLIED
    return types_pb2.ErrorDetail(kind=kind, message=f"scripted {kind}", outcome=outcome, **fields)


def refuse(kind: str, *, maybe_applied: bool = False, **fields: Any) -> Step:
    """Fails as the real server does, with an ErrorDetail."""
    message = detail(kind, maybe_applied=maybe_applied, **fields)

    def step(_request: Any, context: grpc.ServicerContext) -> NoReturn:
        context.set_trailing_metadata(((ERROR_DETAIL_KEY, message.SerializeToString()),))
        context.abort(STATUS_OF_KIND[kind], message.message)

    return step


def break_off(code: grpc.StatusCode, details: str = "broken off") -> Step:
    """Fails as gRPC itself does, without an ErrorDetail."""

    def step(_request: Any, context: grpc.ServicerContext) -> NoReturn:
        context.abort(code, details)

    return step


def hang(_request: Any, context: grpc.ServicerContext) -> Any:
    """Answers nothing until the caller is gone."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait(HANG_MAX_S)
    return None


class FakeServer:
    """script["Upsert"] = [steps]: each call takes the next step; without one it succeeds."""

    def __init__(self) -> None:
        self.script: dict[str, deque[Step]] = defaultdict(deque)
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.times_left_s: dict[str, list[float]] = defaultdict(list)
        self.window = 3
        self.chunks_unacknowledged_max = 0
        self.stream_chunks: deque[Callable[[points_pb2.UpsertStreamRequest], Any]] = deque()
        self.chunks_before_answer = 1
        self._seq = 0
        self._lock = threading.Lock()
        self._asked = threading.Condition(self._lock)
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
        for add, servicer in (
            (collections_pb2_grpc.add_CollectionsServicer_to_server, _Collections(self)),
            (points_pb2_grpc.add_PointsServicer_to_server, _Points(self)),
            (search_pb2_grpc.add_SearchServicer_to_server, _Search(self)),
            (loads_pb2_grpc.add_LoadsServicer_to_server, _Loads(self)),
        ):
            add(servicer, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait(HANG_MAX_S)

    def wait_for(self, name: str) -> None:
        """Returns when a call of this name has arrived."""
        with self._asked:
            if not self._asked.wait_for(lambda: self.requests[name], HANG_MAX_S):
                raise TimeoutError(f"no {name} arrived within {HANG_MAX_S} s")

    def answer(
        self, name: str, request: Any, context: grpc.ServicerContext, success: Callable[[], Any]
    ) -> Any:
        with self._lock:
            self.requests[name].append(request)
            self._asked.notify_all()
            self.times_left_s[name].append(context.time_remaining() or 0.0)
            step = self.script[name].popleft() if self.script[name] else None
        reply = success() if step is None else step(request, context)
        return success() if reply is None else reply

    def next_seq(self) -> int:
        with self._lock:
            self._seq += 1
            return self._seq

    def write_token(self) -> types_pb2.SessionToken:
        return token(s0=(1, self.next_seq()))

    def read_token(self) -> types_pb2.SessionToken:
        return token(s0=(1, self._seq))


class _Collections(collections_pb2_grpc.CollectionsServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def CreateCollection(self, request: Any, context: Any) -> Any:
        def success() -> Any:
            schema = collections_pb2.CollectionSchema()
            schema.CopyFrom(request.schema)
            schema.id, schema.version = "c1", 1
            return collections_pb2.CreateCollectionResponse(schema=schema)

        return self._fake.answer("CreateCollection", request, context, success)

    def DropCollection(self, request: Any, context: Any) -> Any:
        return self._fake.answer(
            "DropCollection", request, context, collections_pb2.DropCollectionResponse
        )


class _Loads(loads_pb2_grpc.LoadsServicer):
    """Commits at the second asking."""

    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def DescribeLoad(self, request: Any, context: Any) -> Any:
        return self._fake.answer("DescribeLoad", request, context, loads_pb2.DescribeLoadResponse)

    def StageChunk(self, request: Any, context: Any) -> Any:
        return self._fake.answer("StageChunk", request, context, loads_pb2.StageChunkResponse)

    def CommitLoad(self, request: Any, context: Any) -> Any:
        def success() -> Any:
            if len(self._fake.requests["CommitLoad"]) < 2:
                return loads_pb2.CommitLoadResponse(segments_done=1, segments_total=2)
            rows = sum(len(each.rows.ids) for each in self._fake.requests["StageChunk"])
            return loads_pb2.CommitLoadResponse(
                committed=True, rows=rows, session=self._fake.write_token()
            )

        return self._fake.answer("CommitLoad", request, context, success)

    def AbortLoad(self, request: Any, context: Any) -> Any:
        return self._fake.answer("AbortLoad", request, context, loads_pb2.AbortLoadResponse)


class _Points(points_pb2_grpc.PointsServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def _upserted(self, request: Any) -> Any:
        return points_pb2.UpsertResponse(
            session=self._fake.write_token(), seqs=[self._fake.next_seq() for _ in request.rows.ids]
        )

    def Upsert(self, request: Any, context: Any) -> Any:
        return self._fake.answer("Upsert", request, context, lambda: self._upserted(request))

    def UpsertStream(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        fake = self._fake
        fake.requests["UpsertStream"].append(None)
        if fake.script["UpsertStream"]:
            fake.script["UpsertStream"].popleft()(None, context)
        held: list[Any] = []
        first = True
        for chunk in requests:
            fake.requests["chunk"].append(chunk)
            held.append(chunk)
            fake.chunks_unacknowledged_max = max(fake.chunks_unacknowledged_max, len(held))
            # The first chunk is answered at once: before it, the window is 1.
            if not first and len(held) < fake.chunks_before_answer:
                continue
            first = False
            for each in held:
                step = fake.stream_chunks.popleft() if fake.stream_chunks else None
                reply = None if step is None else step(each)
                if reply is BREAK_STREAM:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "stream broken off")
                if reply is IGNORE:
                    continue
                if reply is None:
                    reply = points_pb2.UpsertStreamResponse(
                        chunk_no=each.chunk_no, upserted=self._upserted(each.upsert)
                    )
                reply.window = fake.window
                yield reply
            held.clear()

    def Get(self, request: Any, context: Any) -> Any:
        def success() -> Any:
            rows = types_pb2.Rows(ids=request.ids, seqs=range(1, len(request.ids) + 1))
            return points_pb2.GetResponse(rows=rows, as_of=self._fake.read_token())

        return self._fake.answer("Get", request, context, success)

    def PatchAttributes(self, request: Any, context: Any) -> Any:
        return self._fake.answer(
            "PatchAttributes",
            request,
            context,
            lambda: points_pb2.PatchAttributesResponse(
                session=self._fake.write_token(), missing_ids=request.ids[1:]
            ),
        )

    def Delete(self, request: Any, context: Any) -> Any:
        return self._fake.answer(
            "Delete",
            request,
            context,
            lambda: points_pb2.DeleteResponse(
                session=self._fake.write_token(), deleted=len(request.ids)
            ),
        )

    def DeleteByFilter(self, request: Any, context: Any) -> Any:
        return self._fake.answer(
            "DeleteByFilter",
            request,
            context,
            lambda: points_pb2.DeleteByFilterResponse(session=self._fake.write_token(), deleted=2),
        )

    def Scroll(self, request: Any, context: Any) -> Any:
        def success() -> Any:
            start = int(request.cursor or b"0")
            ids = [f"p{n}" for n in range(start, min(start + request.limit, 5))]
            following = start + request.limit
            return points_pb2.ScrollResponse(
                rows=types_pb2.Rows(ids=ids),
                next_cursor=str(following).encode() if following < 5 else b"",
                as_of=self._fake.read_token(),
            )

        return self._fake.answer("Scroll", request, context, success)

    def ScrollOrdered(self, request: Any, context: Any) -> Any:
        def success() -> Any:
            start = int(request.cursor or b"0")
            return points_pb2.ScrollOrderedResponse(
                rows=types_pb2.Rows(ids=[f"o{start}"]),
                next_cursor=b"" if start else b"1",
                as_of=self._fake.read_token(),
            )

        return self._fake.answer("ScrollOrdered", request, context, success)

    def Facets(self, request: Any, context: Any) -> Any:
        def success() -> Any:
            values = [
                types_pb2.FilterValue(keyword="net"),
                types_pb2.FilterValue(int=-3),
                types_pb2.FilterValue(bool=False),
                types_pb2.FilterValue(timestamp_ms=7),
            ]
            return points_pb2.FacetsResponse(
                facets=[points_pb2.FacetCount(value=value, count=9) for value in values],
                rows=40,
                missing=4,
                distinct=5,
                as_of=self._fake.read_token(),
            )

        return self._fake.answer("Facets", request, context, success)

    def Count(self, request: Any, context: Any) -> Any:
        return self._fake.answer(
            "Count",
            request,
            context,
            lambda: points_pb2.CountResponse(count=42, as_of=self._fake.read_token()),
        )


class _Search(search_pb2_grpc.SearchServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def Search(self, request: Any, context: Any) -> Any:
        def success() -> Any:
            queries = len(request.ids) or len(request.vectors) // (4 * request.dimension)
            hits = search_pb2.QueryHits(
                scores=[1.0, 0.5], rows=types_pb2.Rows(ids=["a", "b"], seqs=[1, 2])
            )
            return search_pb2.SearchResponse(
                results=[hits] * queries, as_of=self._fake.read_token(), staleness_ms=3
            )

        return self._fake.answer("Search", request, context, success)

    def Recommend(self, request: Any, context: Any) -> Any:
        return self._fake.answer(
            "Recommend",
            request,
            context,
            lambda: search_pb2.RecommendResponse(hits=HITS, as_of=self._fake.read_token()),
        )

    def SearchDiverse(self, request: Any, context: Any) -> Any:
        return self._fake.answer(
            "SearchDiverse",
            request,
            context,
            lambda: search_pb2.SearchDiverseResponse(hits=HITS, as_of=self._fake.read_token()),
        )

    def SearchGroups(self, request: Any, context: Any) -> Any:
        group = search_pb2.HitGroup(value=types_pb2.FilterValue(keyword="net"), hits=HITS)
        return self._fake.answer(
            "SearchGroups",
            request,
            context,
            lambda: search_pb2.SearchGroupsResponse(
                groups=[group], bounded=True, as_of=self._fake.read_token()
            ),
        )

    def SearchRange(self, request: Any, context: Any) -> Iterator[Any]:
        """Hits r0 … r4, one a message; the cursor is the number of the next.

        script["SearchRange"] is asked before each message, and before the first of each stream.
        """
        fake = self._fake
        asked = search_pb2.SearchRangeRequest()
        asked.CopyFrom(request)
        start = int(request.cursor or b"0")
        for number in range(start, 5):
            fake.answer("SearchRange", asked, context, lambda: None)
            rows = types_pb2.Rows(ids=[f"r{number}"], seqs=[number])
            yield search_pb2.SearchRangeResponse(
                hits=search_pb2.QueryHits(scores=[number], rows=rows),
                cursor=str(number + 1).encode(),
                as_of=token(s0=(1, number + 1)),
            )
        yield search_pb2.SearchRangeResponse(as_of=token(s0=(1, 9)), truncated=True)


HITS = search_pb2.QueryHits(scores=[1.0, 0.5], rows=types_pb2.Rows(ids=["a", "b"], seqs=[1, 2]))


BREAK_STREAM = object()
"""A chunk step that ends the stream with UNAVAILABLE."""

IGNORE = object()
"""A chunk step that never acknowledges the chunk."""


def break_stream(_chunk: points_pb2.UpsertStreamRequest) -> object:
    return BREAK_STREAM


def ignore(_chunk: points_pb2.UpsertStreamRequest) -> object:
    return IGNORE


def fail_chunk(kind: str, **fields: Any) -> Callable[[points_pb2.UpsertStreamRequest], Any]:
    return lambda chunk: points_pb2.UpsertStreamResponse(
        chunk_no=chunk.chunk_no, error=detail(kind, **fields)
    )
