"""Clients as the SDK makes them: sessions, request names, retries; and what they do all day.

Few points and many clients, so that everything collides. Each upsert writes one value into vector,
attribute and payload; each patch sets a mark.
"""

import asyncio
import functools
import json
import random
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from shoal_cluster.domain.errors import (
    Conflict,
    Indeterminate,
    Internal,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import PointId, ShardNumber
from shoal_cluster.domain.partition import shard_of_id
from shoal_cluster.domain.point import decode_tail
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import AttributeType, CollectionSchema, Metric
from shoal_cluster.domain.session import Consistency, merge_tokens
from shoal_cluster.domain.session import Position as ShardPosition
from shoal_cluster.filtering.expression import Comparison, Operator
from shoal_cluster.ingest.execute import WriteResult
from shoal_cluster.ingest.validate import (
    DeleteRequest,
    DeleteWhereRequest,
    PatchRequest,
    UpsertRequest,
)
from shoal_cluster.query.plan import Freshness, SearchRequest
from tests.simulation.cluster import Cluster, SimulatedCoordinator
from tests.simulation.history import (
    Change,
    Ending,
    History,
    Level,
    Position,
    Read,
    Seen,
    Write,
    WriteType,
)

T = TypeVar("T")

COLLECTION = "points"
DIMENSION = 2
GROUPS = ("red", "green", "blue")
ALL = 100
BURST_S = 1.0
"""How long clients are busy between two silences."""

_LEVELS = {
    Level.EVENTUAL: Consistency.EVENTUAL,
    Level.SESSION: Consistency.SESSION,
    Level.STRONG: Consistency.STRONG,
}


PAST_WRITES = 8
RESOLVING = 0.1
"""A step in ten is followed by one of the last eight writes, sent again."""

_Send = Callable[[SimulatedCoordinator, bool], Coroutine[Any, Any, WriteResult]]


def schema_of(shards: int, replicas: int) -> CollectionSchema:
    return CollectionSchema(
        id="",  # type: ignore[arg-type]  # chosen by the controller
        name=COLLECTION,
        dimension=DIMENSION,
        metric=Metric.L2,
        attributes={
            "value": AttributeType.INT,
            "mark": AttributeType.INT,
            "group": AttributeType.KEYWORD,
        },
        shards=shards,
        replicas=replicas,
    )


class Numbers:
    """Values that no two writes share."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last


class SimulatedClient:
    """One session. Notes in the history whatever it did and saw."""

    def __init__(
        self,
        cluster: Cluster,
        history: History,
        numbers: Numbers,
        name: str,
        points: Sequence[str],
        shards: int,
    ) -> None:
        self.name = name
        self.operations = 0
        self._cluster = cluster
        self._world = cluster.world
        self._history = history
        self._numbers = numbers
        self._points = points
        self._shards = shards
        self._rng = cluster.world.rng(f"client {name}")
        self._token: Mapping[ShardNumber, ShardPosition] = {}
        self._requests = 0
        self._attempts_max = self._rng.choice((1, 4))
        self._past: deque[tuple[str, _Send]] = deque(maxlen=PAST_WRITES)

    async def work(self, until_s: float, pause_s: float, silence_s: float = 0.0) -> None:
        """Does one random thing after the other; all clients are silent at the same times."""
        while (now_s := self._world.loop.time()) < until_s:
            into_s = now_s % (BURST_S + silence_s)
            if into_s > BURST_S:
                await asyncio.sleep(BURST_S + silence_s - into_s)
                continue
            await self.step()
            if self._past and self._rng.random() < RESOLVING:
                await self.resolve(*self._rng.choice(self._past))
            await asyncio.sleep(self._rng.random() * pause_s)

    async def step(self) -> None:
        kind = self._rng.choices(
            (
                "upsert",
                "batch",
                "delete",
                "delete_where",
                "patch",
                "get",
                "scroll",
                "count",
                "search",
                "condition",
            ),
            (20, 8, 8, 2, 8, 20, 8, 4, 12, 5),
        )[0]
        level = self._rng.choice(tuple(Level))
        self.operations += 1
        match kind:
            case "upsert":
                await self.upsert(self._rng.sample(self._points, 1))
            case "batch":
                await self.upsert(self._rng.sample(self._points, min(4, len(self._points))))
            case "condition":
                await self.upsert(self._rng.sample(self._points, 1), if_absent=True)
            case "delete":
                await self.delete(self._rng.sample(self._points, self._rng.choice((1, 1, 2))))
            case "delete_where":
                await self.delete_where(self._rng.choice(GROUPS))
            case "patch":
                await self.patch(self._rng.sample(self._points, 1))
            case "get":
                await self.get(self._rng.sample(self._points, 3), level)
            case "scroll":
                await self.scroll(level)
            case "count":
                await self.count(level)
            case "search":
                await self.search(level)

    # -- writes

    async def upsert(self, points: Sequence[str], *, if_absent: bool = False) -> bool:
        values = [self._numbers.next() for _ in points]
        group = self._rng.choice(GROUPS)
        changes = [Change(self._shard(p), p, value=v) for p, v in zip(points, values, strict=True)]
        name = self._next_name()
        request = UpsertRequest(
            collection=COLLECTION,
            name=name,
            ids=points,
            vectors=np.array([[value, 0] for value in values], dtype=np.float32),
            attributes=[{"value": value, "group": group} for value in values],
            payloads=[json.dumps({"value": value}).encode() for value in values],
            if_absent=if_absent,
        )
        return await self._write(
            WriteType.UPSERT,
            name,
            changes,
            lambda to, again: to.writer.upsert(
                replace(request, again=again), timeout_s=self._timeout_s()
            ),
        )

    async def delete(self, points: Sequence[str]) -> bool:
        name = self._next_name()
        request = DeleteRequest(collection=COLLECTION, name=name, ids=points)
        return await self._write(
            WriteType.DELETE,
            name,
            [Change(self._shard(point), point) for point in points],
            lambda to, again: to.writer.delete(
                replace(request, again=again), timeout_s=self._timeout_s()
            ),
        )

    async def delete_where(self, group: str) -> bool:
        name = self._next_name()
        request = DeleteWhereRequest(
            collection=COLLECTION, name=name, filter=Comparison("group", Operator.EQ, group)
        )
        return await self._write(
            WriteType.DELETE_WHERE,
            name,
            [],
            lambda to, again: to.writer.delete_where(
                replace(request, again=again), timeout_s=self._timeout_s()
            ),
            group=group,
        )

    async def patch(self, points: Sequence[str]) -> bool:
        name = self._next_name()
        marks = [self._numbers.next() for _ in points]
        request = PatchRequest(
            collection=COLLECTION,
            name=name,
            ids=points,
            attributes=[{"mark": mark} for mark in marks],
        )
        return await self._write(
            WriteType.PATCH,
            name,
            [Change(self._shard(p), p, mark=m) for p, m in zip(points, marks, strict=True)],
            lambda to, again: to.writer.patch(
                replace(request, again=again), timeout_s=self._timeout_s()
            ),
        )

    async def _write(
        self,
        kind: WriteType,
        name: RequestName,
        changes: Sequence[Change],
        send: "_Send",
        group: str | None = None,
    ) -> bool:
        """Sends until there is an answer, as the SDK does; True when it was acknowledged."""
        invoked_s = self._world.loop.time()
        self._note(f"{kind.value} #{name.request_no} {[c.point for c in changes] or group}")
        result: WriteResult | None = None
        answers: list[Mapping[int, Position]] = []
        maybe = False
        for attempt in range(self._attempts_max):
            try:
                result = await self._call(
                    functools.partial(send, again=maybe or bool(answers)), Indeterminate
                )
            except (Unavailable, Overloaded, Indeterminate) as error:
                maybe = maybe or error.outcome is Outcome.MAYBE_APPLIED
                if isinstance(error, Indeterminate) and error.field is not None:
                    self._world.counts["requests forgotten"] += 1
                    break
                await asyncio.sleep(self._rng.random() * 0.2 * 2**attempt)
                continue
            except ShoalError as error:
                maybe = maybe or error.outcome is Outcome.MAYBE_APPLIED
                self._complain(error, kind.value)
                break
            answers.append(_positions(result.token))
            if self._rng.random() < 0.05:
                continue  # as if the answer had been lost on the way: the same request again
            break
        positions = answers[0] if answers else {}
        if result is not None:
            self._token = merge_tokens(self._token, result.token)
        ending = Ending.OK if answers else Ending.UNKNOWN if maybe else Ending.FAIL
        self._history.writes.append(
            Write(
                client=self.name,
                request=name.request_no,
                type=kind,
                invoked_s=invoked_s,
                returned_s=self._world.loop.time(),
                ending=ending,
                changes=tuple(changes),
                group=group,
                shards=tuple(range(self._shards)) if group else (),
                positions=positions,
                seqs=tuple(result.seqs) if result is not None else (),
                affected=result.affected if result is not None else 0,
                answers=tuple(answers[1:]),
            )
        )
        self._note(f"{kind.value} #{name.request_no} {ending.value} {sorted(positions.items())}")
        if ending is not Ending.FAIL:
            self._past.append((f"{kind.value} #{name.request_no}", send))
        return ending is Ending.OK

    async def resolve(self, what: str, send: "_Send") -> None:
        """Sends a write of some time ago again, as an application does that wants to know."""
        try:
            result = await self._call(functools.partial(send, again=True), Indeterminate)
        except ShoalError as error:
            self._complain(error, what)
            self._note(f"{what} again: {error.kind}")
            self._world.counts["requests forgotten"] += error.field is not None
            return
        self._token = merge_tokens(self._token, result.token)
        self._note(f"{what} again: {sorted(_positions(result.token).items())}")

    # -- reads

    async def get(self, points: Sequence[str], level: Level) -> bool:
        ids = [point.encode() for point in points]

        async def read(to: SimulatedCoordinator) -> tuple[Any, list[Seen]]:
            found = await to.searcher.rows.get(
                COLLECTION, ids, with_vector=True, freshness=freshness, timeout_s=self._timeout_s()
            )
            return found.as_of, self._rows(found.ids, found.seqs, found.tails, found.vectors)

        freshness = self._freshness(level)
        return await self._read("get", level, [(self._shard(p), p) for p in points], read)

    async def scroll(self, level: Level) -> bool:
        async def read(to: SimulatedCoordinator) -> tuple[Any, list[Seen]]:
            found = await to.searcher.rows.scroll(
                COLLECTION,
                filter=None,
                limit=ALL,
                cursor=b"",
                with_vector=True,
                freshness=freshness,
                timeout_s=self._timeout_s(),
            )
            return found.as_of, self._rows(found.ids, found.seqs, found.tails, found.vectors)

        freshness = self._freshness(level)
        return await self._read("scroll", level, self._everything(), read, at_once=False)

    async def count(self, level: Level) -> bool:
        async def read(to: SimulatedCoordinator) -> tuple[Any, list[Seen]]:
            found = await to.searcher.rows.count(
                COLLECTION,
                filter=Comparison("group", Operator.EQ, self._rng.choice(GROUPS)),
                freshness=freshness,
                timeout_s=self._timeout_s(),
            )
            return found.as_of, []

        freshness = self._freshness(level)
        return await self._read("count", level, (), read)

    async def search(self, level: Level) -> bool:
        query = float(self._rng.randrange(1, 2000))
        group = self._rng.choice((None, None, *GROUPS))

        async def read(to: SimulatedCoordinator) -> tuple[Any, list[Seen]]:
            found = await to.searcher.search(
                SearchRequest(
                    collection=COLLECTION,
                    k=ALL,
                    queries=np.array([[query, 0]], dtype=np.float32),
                    filter=None if group is None else Comparison("group", Operator.EQ, group),
                    exact=True,
                    freshness=freshness,
                    with_payload=True,
                    with_vector=True,
                ),
                timeout_s=self._timeout_s(),
            )
            hits = found.hits
            rows = self._rows(hits.ids, hits.seqs, hits.tails or (), hits.vectors)
            return found.as_of, [
                row._replace(agrees=row.agrees and float(key) == (row.value - query) ** 2)
                for row, key in zip(rows, hits.keys, strict=True)
            ]

        freshness = self._freshness(level)
        asked = self._everything() if group is None else ()
        return await self._read("search", level, asked, read)

    async def _read(
        self,
        what: str,
        level: Level,
        asked: Sequence[tuple[int, str]],
        read: Callable[[SimulatedCoordinator], Coroutine[Any, Any, tuple[Any, list[Seen]]]],
        *,
        at_once: bool = True,
    ) -> bool:
        invoked_s = self._world.loop.time()
        token = _positions(self._token)
        try:
            as_of, rows = await self._call(read, Unavailable)
        except ShoalError as error:
            self._complain(error, what)
            if error.outcome is not Outcome.NOT_APPLIED:
                self._world.violate(f"{what} of {self.name}, a read, is unknown: {error.message}")
            self._note(f"{what} {level.value} failed: {error.kind}")
            return False
        self._token = merge_tokens(self._token, as_of)
        self._history.reads.append(
            Read(
                client=self.name,
                invoked_s=invoked_s,
                returned_s=self._world.loop.time(),
                level=level,
                token=token,
                as_of=_positions(as_of),
                asked=tuple(asked),
                rows=tuple(rows),
                at_once=at_once,
                what=f"{level.value} {what} of {self.name} at {invoked_s:.3f} s",
            )
        )
        shown = " ".join(f"{row.point}={row.value}@{row.seq}" for row in rows)
        self._note(f"{what} {level.value} {sorted(_positions(as_of).items())} {shown}")
        return True

    # -- the way to a coordinator

    async def _call(
        self,
        work: Callable[[SimulatedCoordinator], Coroutine[Any, Any, T]],
        lost: Callable[[str], ShoalError],
    ) -> T:
        to = self._rng.choice(self._cluster.coordinators)
        return await self._world.remote_call(
            to.process, lambda: work(to), rng=self._rng, timeout_s=25.0, lost=lost
        )

    def _rows(
        self, ids: Sequence[bytes], seqs: Sequence[int], tails: Sequence[bytes], vectors: Any
    ) -> list[Seen]:
        rows = []
        for point, seq, tail, vector in zip(ids, seqs, tails, vectors, strict=True):
            _, attributes, payload, _ = decode_tail(tail)
            value = attributes.get("value")
            name = point.decode()
            rows.append(
                Seen(
                    shard=self._shard(name),
                    point=name,
                    seq=seq,
                    value=int(vector[0]),
                    mark=attributes.get("mark"),  # type: ignore[arg-type]
                    group=str(attributes.get("group")),
                    agrees=value == int(vector[0]) == json.loads(payload)["value"],
                )
            )
        return rows

    def _freshness(self, level: Level) -> Freshness:
        return Freshness(consistency=_LEVELS[level], token=self._token)

    def _everything(self) -> list[tuple[int, str]]:
        return [(self._shard(point), point) for point in self._points]

    def _shard(self, point: str) -> int:
        return shard_of_id(PointId(point), self._shards)

    def _next_name(self) -> RequestName:
        self._requests += 1
        return RequestName(self.name, self._requests)

    def _timeout_s(self) -> float:
        return self._rng.choice((0.5, 3.0, 10.0))

    def _note(self, event: str) -> None:
        self._world.note(self.name, event)

    def _complain(self, error: ShoalError, what: str) -> None:
        """Only these may come to a client whose requests are right, in a bucket that is sound."""
        if not isinstance(error, Unavailable | Overloaded | Indeterminate | Conflict):
            self._world.violate(f"{what} of {self.name}: {error.kind}: {error.message}")
        elif isinstance(error, Internal):
            self._world.violate(f"{what} of {self.name}: {error.message}")


def _positions(token: Mapping[ShardNumber, ShardPosition]) -> dict[int, Position]:
    return {int(shard): Position(*position) for shard, position in token.items()}


def draw_points(rng: random.Random) -> list[str]:
    """Returns the ids of a run: few, so that writes meet."""
    return [f"p{number}" for number in range(rng.choice((3, 6, 10)))]
