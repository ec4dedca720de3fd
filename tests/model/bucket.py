"""The model's bucket: put-if-absent, get, list, delete, and a network that loses and delays puts.

Every operation is a generator: the operation happens at once, then it yields while the reply
travels, and returns the reply when its actor runs again.
"""

import enum
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Generic, TypeAlias, TypeVar

Row: TypeAlias = int
Rows: TypeAlias = frozenset[Row]
NO_ROWS: Rows = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What every object carries: the id of the put that wrote it."""

    put_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogObject(Stored):
    """A fence, or one row.

    previous: the put id of the object in the slot before. next_seq: the sequence number of the row,
    or on a fence the one to be given out next.
    """

    epoch: int
    is_fence: bool
    previous: int
    next_seq: int
    rows: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place in the log: its slot, what is in it, and the last sequence number given out there."""

    slot: int
    epoch: int
    put_id: int
    seq: int

    def leads_to(self, stored: LogObject) -> bool:
        """Says whether an object found in the next slot may follow what is here."""
        return (
            stored.previous == self.put_id
            and stored.next_seq == self.seq + 1
            and stored.epoch >= self.epoch
        )

    def after(self, stored: LogObject) -> "Place":
        """Returns the next place, with `stored` in it."""
        return Place(
            slot=self.slot + 1,
            epoch=stored.epoch,
            put_id=stored.put_id,
            seq=self.seq if stored.is_fence else stored.next_seq,
        )


BEGINNING = Place(slot=0, epoch=0, put_id=0, seq=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEntry:
    """A bulk load in a manifest: its rows are numbered from `base` + 1."""

    load: int
    base: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestObject(Stored):
    """Every row up to and including the floor is in `rows`, the sealed segments.

    entries: of all bulk loads, for the checker. remembered: the last of them, for actors. segments:
    those of bulk loads that are listed. See load_model.py.
    """

    epoch: int
    floor: Place
    rows: Rows
    entries: tuple[LoadEntry, ...] = ()
    remembered: tuple[int, ...] = ()
    segments: frozenset[int] = frozenset()


EMPTY_MANIFEST = ManifestObject(put_id=0, epoch=0, floor=BEGINNING, rows=NO_ROWS)

S = TypeVar("S", bound=Stored)
T = TypeVar("T")
Steps: TypeAlias = Generator[int, None, T]
"""A part of an actor. Each yield ends one step, after which anybody else may run, and says for how
many steps of the schedule at least this actor is not to be run: 0 but for naps."""


class PutReply(enum.Enum):
    CREATED = enum.auto()
    EXISTS = enum.auto()
    UNKNOWN = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Chances of what becomes of a put: answered, applied with its answer lost, or else lingering.

    landing: per step, that one lingering put ends; landing_applied: that it ends in the bucket.
    """

    put_answered: float = 0.70
    put_answer_lost: float = 0.12
    landing: float = 0.15
    landing_applied: float = 0.80


FAULTLESS = Network(put_answered=1.0, put_answer_lost=0.0, landing=0.0, landing_applied=0.0)


class Folder(Generic[S]):
    """The objects under one prefix, by number."""

    def __init__(self) -> None:
        self.objects: dict[int, S] = {}

    def apply(self, number: int, body: S) -> PutReply:
        if number in self.objects:
            return PutReply.EXISTS
        self.objects[number] = body
        return PutReply.CREATED


class Bucket:
    """One shard's prefix of an object store, with the faults of a network in front."""

    def __init__(self, random: Random, network: Network) -> None:
        self.wal: Folder[LogObject] = Folder()
        self.manifests: Folder[ManifestObject] = Folder()
        self.floors: Folder[Stored] = Folder()
        self.now = 0
        self._random = random
        self._network = network
        self._lingering: list[Callable[[], PutReply]] = []
        self.manifests.apply(0, EMPTY_MANIFEST)

    def put(self, folder: Folder[S], number: int, body: S) -> Steps[PutReply]:
        self._tick()
        draw = self._random.random()
        if draw < self._network.put_answered:
            reply = folder.apply(number, body)
        else:
            reply = PutReply.UNKNOWN
            if draw < self._network.put_answered + self._network.put_answer_lost:
                folder.apply(number, body)
            else:
                self._lingering.append(partial(folder.apply, number, body))
        yield 0
        return reply

    def get(self, folder: Folder[S], number: int) -> Steps[S | None]:
        self._tick()
        found = folder.objects.get(number)
        yield 0
        return found

    def list_above(self, folder: Folder[S], number: int) -> Steps[list[int]]:
        """Returns the numbers greater than `number`, ascending."""
        self._tick()
        listed = sorted(key for key in folder.objects if key > number)
        yield 0
        return listed

    def delete(self, folder: Folder[S], number: int) -> Steps[None]:
        self._tick()
        folder.objects.pop(number, None)
        yield 0

    def settle(self) -> None:
        """Lets every lingering put land: the worst that recovery can meet."""
        while self._lingering:
            self._lingering.pop(0)()

    def _tick(self) -> None:
        self.now += 1
        if self._lingering and self._random.random() < self._network.landing:
            put = self._lingering.pop(self._random.randrange(len(self._lingering)))
            if self._random.random() < self._network.landing_applied:
                put()


def recover(bucket: Bucket) -> Rows:
    """Returns what a restart finds: the newest manifest and the contiguous log above its floor."""
    manifest = bucket.manifests.objects[max(bucket.manifests.objects)]
    rows = manifest.rows
    slot = manifest.floor.slot + 1
    while (stored := bucket.wal.objects.get(slot)) is not None:
        rows |= stored.rows
        slot += 1
    return rows
