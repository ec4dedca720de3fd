"""Clients that note whatever they did and saw, for the checker that the simulation uses too.

Few points and several sessions, so that everything collides; slowly, because the checker compares
each read with each write. Every upsert writes a value of its own into vector, attribute and
payload, every patch a mark of its own, so a row tells which write made it.
"""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import shoal
from shoal_cluster.domain.ids import PointId
from shoal_cluster.domain.partition import shard_of_id
from shoal_protos.v1.admin_pb2 import StatusResponse
from tests.simulation.history import (
    Change,
    Ending,
    History,
    Level,
    Position,
    Read,
    RestingReplica,
    Seen,
    Write,
    WriteType,
    check,
)

COLLECTION = "history"
DIMENSION = 2
POINTS = 40
CLIENTS = 4
PAUSE_S = 0.05
"""Between two operations of a client: up to 80 a second in all."""

_TIMEOUT_S = 20.0
_JOIN_S = 60.0
_LEVELS: dict[Level, shoal.ConsistencyName] = {
    Level.EVENTUAL: "eventual",
    Level.SESSION: "session",
    Level.STRONG: "strong",
}


class RecordedClients:
    """Runs CLIENTS sessions from `start` to `stop`; `history` is what they saw."""

    def __init__(self, address: str, *, shards: int, seed: int) -> None:
        self.history = History()
        self.bugs: list[str] = []
        self._shards = shards
        self._numbers = itertools.count(1)
        self._address = address
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(f"client-{number}", seed), daemon=True)
            for number in range(CLIENTS)
        ]

    @staticmethod
    def create(client: shoal.Client, *, shards: int, replicas: int) -> None:
        client.create_collection(
            COLLECTION,
            dimension=DIMENSION,
            metric="l2",
            attributes={"value": "int", "mark": "int"},
            shards=shards,
            replicas=replicas,
        )

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the sessions, and reads everything strongly once more."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
            assert not thread.is_alive(), "a recorded client hangs"
        with shoal.Client(self._address, timeout_s=_TIMEOUT_S) as client:
            session = _Session(self, client, "last", random.Random(0))
            session.get(session.points, Level.STRONG)

    def violations(self) -> list[str]:
        """Returns every promise that what the clients saw breaks, in words."""
        return [*self.bugs, *map(str, check(self.history))]

    def rest(self, status: StatusResponse) -> None:
        """Notes where the replicas came to rest."""
        for collection in status.collections:
            if collection.schema.name != COLLECTION:
                continue
            for shard in collection.shards:
                for replica in shard.replicas:
                    at = Position(replica.position.epoch, replica.position.seq)
                    self.history.resting.append(
                        RestingReplica(
                            shard.shard, replica.server, at, replica.rows, replica.set_checksum
                        )
                    )

    def next_number(self) -> int:
        return next(self._numbers)

    def shard_of(self, point: str) -> int:
        return int(shard_of_id(PointId(point), self._shards))

    def _work(self, name: str, seed: int) -> None:
        rng = random.Random(f"{seed} {name}")
        with shoal.Client(self._address, timeout_s=_TIMEOUT_S) as client:
            session = _Session(self, client, name, rng)
            while not self._stop.wait(rng.random() * 2 * PAUSE_S):
                try:
                    session.step()
                except Exception as error:  # noqa: BLE001  a thread's error would be lost
                    self.bugs.append(f"{name}: {error!r}")
                    return


class _Session:
    """One client, one thread: its token is what it has seen."""

    def __init__(
        self, load: RecordedClients, client: shoal.Client, name: str, rng: random.Random
    ) -> None:
        self.points = [f"p{number}" for number in range(POINTS)]
        self._load = load
        self._collection = client.collection(COLLECTION)
        self._name = name
        self._rng = rng
        self._requests = itertools.count(1)

    def step(self) -> None:
        kind = self._rng.choices(("upsert", "batch", "delete", "patch", "get"), (6, 3, 2, 2, 9))[0]
        match kind:
            case "upsert":
                self.upsert(self._rng.sample(self.points, 1))
            case "batch":
                self.upsert(self._rng.sample(self.points, 4))
            case "delete":
                self.delete(self._rng.sample(self.points, 1))
            case "patch":
                self.patch(self._rng.choice(self.points))
            case "get":
                self.get(self._rng.sample(self.points, 6), self._rng.choice(tuple(Level)))

    def upsert(self, points: Sequence[str]) -> None:
        values = [self._load.next_number() for _ in points]

        def send() -> tuple[shoal.SessionToken, Sequence[int], int]:
            written = self._collection.upsert(
                ids=points,
                vectors=[[float(value), 0.0] for value in values],
                attributes=[{"value": value} for value in values],
                payloads=[{"value": value} for value in values],
            )
            return written.session, written.seqs, len(points)

        changes = (self._change(p, value=v) for p, v in zip(points, values, strict=True))
        self._write(WriteType.UPSERT, changes, send)

    def patch(self, point: str) -> None:
        mark = self._load.next_number()

        def send() -> tuple[shoal.SessionToken, Sequence[int], int]:
            patched = self._collection.patch_attributes(point, {"mark": mark})
            return patched.session, (), 1 - len(patched.missing_ids)

        self._write(WriteType.PATCH, (self._change(point, mark=mark),), send)

    def delete(self, points: Sequence[str]) -> None:
        def send() -> tuple[shoal.SessionToken, Sequence[int], int]:
            deleted = self._collection.delete(points)
            return deleted.session, (), deleted.deleted

        self._write(WriteType.DELETE, map(self._change, points), send)

    def _change(self, point: str, value: int | None = None, mark: int | None = None) -> Change:
        return Change(self._load.shard_of(point), point, value=value, mark=mark)

    def _write(
        self,
        kind: WriteType,
        changes: Iterable[Change],
        send: Callable[[], tuple[shoal.SessionToken, Sequence[int], int]],
    ) -> None:
        invoked_s = time.monotonic()
        told: dict[str, Any] = {}
        try:
            token, seqs, affected = send()
            ending = Ending.OK
            told = {"positions": _positions(token), "seqs": tuple(seqs), "affected": affected}
        except shoal.ShoalError as error:
            ending = Ending.UNKNOWN if error.outcome == "maybe_applied" else Ending.FAIL
        self._load.history.writes.append(
            Write(
                client=self._name,
                request=next(self._requests),
                type=kind,
                invoked_s=invoked_s,
                returned_s=time.monotonic(),
                ending=ending,
                changes=tuple(changes),
                **told,
            )
        )

    def get(self, points: Sequence[str], level: Level) -> None:
        invoked_s = time.monotonic()
        token = _positions(self._collection.session)
        try:
            found = self._collection.get(points, with_vector=True, consistency=_LEVELS[level])
        except shoal.ShoalError:
            return  # a read that failed promises nothing
        self._load.history.reads.append(
            Read(
                client=self._name,
                invoked_s=invoked_s,
                returned_s=time.monotonic(),
                level=level,
                token=token,
                as_of=_positions(found.as_of),
                asked=tuple((self._load.shard_of(point), point) for point in points),
                rows=tuple(map(self._seen, found)),
                what=f"get of {self._name}",
            )
        )

    def _seen(self, point: shoal.Point) -> Seen:
        value = point.attributes["value"]
        mark = point.attributes.get("mark")
        assert isinstance(value, int) and isinstance(mark, int | None)
        agrees = point.payload == {"value": value} and list(point.vector) == [value, 0]
        return Seen(self._load.shard_of(point.id), point.id, point.seq, value, mark, "", agrees)


def _positions(token: shoal.SessionToken) -> dict[int, Position]:
    return {shard: Position(*position) for shard, position in token.positions.items()}
