"""Executable model of the durable protocol of one shard (docs/design/protocol.md).

One schedule interleaves writers, a garbage collector and tailing replicas over a bucket that knows
only put-if-absent, get, list and delete. Every step of an actor is one bucket operation. Between
any two of them any other actor may run, or this one may stall, perhaps for ever: a stalled writer
that wakes up is the zombie primary, one that never does is the crash. A put may be applied and
answered, applied with its answer lost, or linger in the network and land at any later time, or
never.

What is checked, on the history that clients can observe:

H-1  an acknowledged row is present after recovery;
H-2  a strong read contains every row acknowledged before the read began;
H-3  of two strong reads that do not overlap, the later contains the earlier;
H-4  what a strong read returned is present after recovery (no dirty read);
H-5  a session read contains the row whose token it carries, on whichever replica it is answered.

Each `Variant` but CORRECT breaks one rule of the protocol. A checker that cannot fail is no
evidence, so the tests demand that every broken variant is caught.

Not modelled: more than one put in flight per shard, segments, the catalog, power loss of a local
disk. Those belong to the simulation of the real code.
"""

import enum
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Generic, NamedTuple, TypeAlias, TypeVar

Row: TypeAlias = int
Rows: TypeAlias = frozenset[Row]
NO_ROWS: Rows = frozenset()


class Variant(enum.Enum):
    """The protocol, or the protocol with one rule broken."""

    CORRECT = "correct"
    FENCES_COLLECTED = "fences_collected"
    """Garbage collection deletes fences like data."""
    NO_VALIDATION = "no_validation"
    """A takeover serves without reading the newest manifest again after its fence."""
    NO_FLOOR_CHECK = "no_floor_check"
    """A manifest commit ignores the markers that say which versions were collected."""
    NO_MANIFEST_PROBE = "no_manifest_probe"
    """A strong read takes an absent slot as the tail of the log."""
    MANIFEST_PROBED_BY_GET = "manifest_probed_by_get"
    """A strong read looks for manifest v+1 by name instead of listing what is above v."""
    MANIFEST_PROBED_FIRST = "manifest_probed_first"
    """A strong read lists the manifests before it probes the log."""
    AMBIGUOUS_PUT_SKIPPED = "ambiguous_put_skipped"
    """A writer moves to the next slot while the put of this one is unresolved."""
    EXISTS_TAKEN_AS_SUCCESS = "exists_taken_as_success"
    """A writer takes "exists" for its own earlier put, without reading it back."""
    FLOOR_PASSED_UNREAD = "floor_passed_unread"
    """A replica that is past the floor of a newer manifest keeps its own rows below it."""
    GAP_UNNOTICED = "gap_unnoticed"
    """A replica applies a record whose sequence number does not follow."""
    TOKEN_LED_BY_EPOCH = "token_led_by_epoch"
    """A session token counts as reached when the epoch is larger, whatever the sequence number."""


BROKEN_VARIANTS = tuple(variant for variant in Variant if variant is not Variant.CORRECT)


class ViolationKind(enum.Enum):
    ACKED_ROW_LOST = "acknowledged row lost"
    STALE_STRONG_READ = "stale strong read"
    STRONG_READS_WENT_BACK = "strong reads went back"
    DIRTY_READ = "row seen by a strong read, then gone"
    STALE_SESSION_READ = "stale session read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    kind: ViolationKind
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chances:
    """How likely each nuisance is in one schedule.

    put_answered, put_answer_lost: outcomes of a put; the remainder lingers. landing: per step, that
    one lingering put ends; landing_applied: that it ends in the bucket. arrival: per step, that one
    more writer tries to take over. repacing: per step, that one actor gets another pace. burst: per
    step, that the actor of the last one goes on. flush: per turn of a writer, that it seals instead
    of appending. collector_pace: None draws it like everybody's.
    """

    put_answered: float = 0.70
    put_answer_lost: float = 0.12
    landing: float = 0.15
    landing_applied: float = 0.80
    arrival: float
    repacing: float
    burst: float
    flush: float
    collector_pace: float | None
    paces: tuple[float, ...]


def draw_chances(random: Random) -> Chances:
    """Draws the chances of one schedule, so that schedules differ in kind and not only in order.

    Source: Groce et al., "Swarm testing", ISSTA 2012. Against one fixed setting it finds the rare
    variants several times as often: see README.md in this folder.
    """
    return Chances(
        arrival=random.choice((0.03, 0.06)),
        repacing=random.choice((0.02, 0.06)),
        burst=random.choice((0.0, 0.7, 0.9)),
        flush=random.choice((0.35, 0.60)),
        collector_pace=random.choice((None, 1.0, 3.0)),
        paces=random.choice((EVEN_PACES, UNEVEN_PACES)),
    )


STEPS_PER_SCHEDULE = 420
"""Long enough for about five takeovers and twelve acknowledged rows."""

TURNS_MAX = 7
LAG_STEPS_MAX = 6

# Relative speeds: most actors run, some crawl, and one that falls to 0 runs only by rare accident,
# long after everybody else has moved on. The second set leaves one in four at full speed.
EVEN_PACES = (1.0, 1.0, 1.0, 0.15, 0.04)
UNEVEN_PACES = (1.0, 0.2, 0.03, 0.005)
LATER_PACES = (1.0, 1.0, 0.15, 0.02, 0.0)
PACE_FLOOR = 1e-9


# ------------------------------------------------------------------------------------ the bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What every object carries: the id of the put that wrote it."""

    put_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogObject(Stored):
    """seq: the sequence number of the one row of a data object; meaningless on a fence."""

    epoch: int
    is_fence: bool
    seq: int
    rows: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestObject(Stored):
    """floor_slot: every row up to and including this slot is in `rows`, the sealed segments.

    floor_seq: the last sequence number given out at or before that slot; floor_epoch: the epoch of
    the object in it.
    """

    epoch: int
    floor_slot: int
    floor_seq: int
    floor_epoch: int
    rows: Rows


EMPTY_MANIFEST = ManifestObject(
    put_id=0, epoch=0, floor_slot=0, floor_seq=0, floor_epoch=0, rows=NO_ROWS
)


S = TypeVar("S", bound=Stored)
T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""A part of an actor. Each yield ends one step: the reply of the operation just done is travelling,
and anybody else may run before it arrives."""


class PutReply(enum.Enum):
    CREATED = enum.auto()
    EXISTS = enum.auto()
    UNKNOWN = enum.auto()


class Folder(Generic[S]):
    """The objects under one prefix, by number."""

    def __init__(self) -> None:
        self.objects: dict[int, S] = {}
        self.lingering: list[tuple[int, S]] = []

    def apply(self, number: int, body: S) -> PutReply:
        if number in self.objects:
            return PutReply.EXISTS
        self.objects[number] = body
        return PutReply.CREATED

    def land(self, position: int, *, applied: bool) -> None:
        """Ends one lingering put."""
        number, body = self.lingering.pop(position)
        if applied:
            self.apply(number, body)


class Bucket:
    """One shard's prefix of an object store, with the faults of a network in front."""

    def __init__(self, random: Random, chances: Chances) -> None:
        self.wal: Folder[LogObject] = Folder()
        self.manifests: Folder[ManifestObject] = Folder()
        self.floors: Folder[Stored] = Folder()
        self.now = 0
        self._random = random
        self._chances = chances
        self.manifests.apply(0, EMPTY_MANIFEST)

    def put(self, folder: Folder[S], number: int, body: S) -> Steps[PutReply]:
        self._tick()
        draw = self._random.random()
        if draw < self._chances.put_answered:
            reply = folder.apply(number, body)
        else:
            reply = PutReply.UNKNOWN
            if draw < self._chances.put_answered + self._chances.put_answer_lost:
                folder.apply(number, body)
            else:
                folder.lingering.append((number, body))
        yield
        return reply

    def get(self, folder: Folder[S], number: int) -> Steps[S | None]:
        self._tick()
        found = folder.objects.get(number)
        yield
        return found

    def list_above(self, folder: Folder[S], number: int) -> Steps[list[int]]:
        """Returns the numbers greater than `number`, ascending."""
        self._tick()
        listed = sorted(key for key in folder.objects if key > number)
        yield
        return listed

    def delete(self, folder: Folder[S], number: int) -> Steps[None]:
        self._tick()
        folder.objects.pop(number, None)
        yield

    def idle(self) -> Steps[None]:
        self._tick()
        yield

    def settle(self) -> None:
        """Lets every lingering put land: the worst that recovery can meet."""
        for folder in (self.wal, self.manifests, self.floors):
            while folder.lingering:
                folder.land(0, applied=True)

    def _tick(self) -> None:
        self.now += 1
        counts = [len(f.lingering) for f in (self.wal, self.manifests, self.floors)]
        total = sum(counts)
        if not total or self._random.random() >= self._chances.landing:
            return
        position = self._random.randrange(total)
        applied = self._random.random() < self._chances.landing_applied
        if position < counts[0]:
            self.wal.land(position, applied=applied)
        elif position < counts[0] + counts[1]:
            self.manifests.land(position - counts[0], applied=applied)
        else:
            self.floors.land(position - counts[0] - counts[1], applied=applied)


# ----------------------------------------------------------------------------------- the history


@dataclass(frozen=True, slots=True, kw_only=True)
class StrongRead:
    began: int
    ended: int
    rows: Rows


class Position(NamedTuple):
    """What an acknowledgement hands out as token, and what a replica says it has reached."""

    epoch: int
    seq: int


@dataclass(slots=True)
class History:
    """What clients saw, in steps of the bucket's time, and how much of it there was."""

    acked_at: dict[Row, int] = field(default_factory=dict)
    tokens: dict[Row, Position] = field(default_factory=dict)
    strong_reads: list[StrongRead] = field(default_factory=list)
    stale_session_rows: set[Row] = field(default_factory=set)
    takeovers: int = 0
    flushes: int = 0


def find_violation(history: History, recovered: Rows) -> Violation | None:
    """Returns the first breach of H-1 to H-5, or None. O(reads² + reads × acks)."""

    def breach(kind: ViolationKind, rows: Rows) -> Violation:
        return Violation(kind=kind, rows=tuple(sorted(rows)))

    if lost := frozenset(history.acked_at) - recovered:
        return breach(ViolationKind.ACKED_ROW_LOST, lost)
    for read in history.strong_reads:
        due = frozenset(row for row, acked in history.acked_at.items() if acked <= read.began)
        if missing := due - read.rows:
            return breach(ViolationKind.STALE_STRONG_READ, missing)
    for earlier in history.strong_reads:
        for later in history.strong_reads:
            if earlier.ended <= later.began and (gone := earlier.rows - later.rows):
                return breach(ViolationKind.STRONG_READS_WENT_BACK, gone)
    for read in history.strong_reads:
        if gone := read.rows - recovered:
            return breach(ViolationKind.DIRTY_READ, gone)
    if history.stale_session_rows:
        return breach(ViolationKind.STALE_SESSION_READ, frozenset(history.stale_session_rows))
    return None


# ------------------------------------------------------------------------------------ the actors


@dataclass(slots=True, kw_only=True)
class _Log:
    """What a writer has replayed and appended: its last slot, last sequence number and rows."""

    tail: int
    seq: int
    rows: set[Row]

    def add(self, stored: LogObject) -> None:
        self.tail += 1
        if not stored.is_fence:
            self.seq = stored.seq
        self.rows |= stored.rows


class _View:
    """What a replica shows: the sealed rows of a manifest and the log it applied above them."""

    def __init__(self, manifest: ManifestObject) -> None:
        self.slot = manifest.floor_slot
        self.position = Position(manifest.floor_epoch, manifest.floor_seq)
        self._sealed = manifest.rows
        self._applied: list[tuple[int, LogObject]] = []

    def rows(self) -> Rows:
        return self._sealed.union(*(stored.rows for _, stored in self._applied))

    def follows(self, stored: LogObject) -> bool:
        """Says whether a data object's sequence number is the next one. Fences carry none.

        It is not when a fence that landed late fills the slot of data that was collected.
        """
        return stored.is_fence or stored.seq == self.position.seq + 1

    def apply(self, stored: LogObject) -> None:
        self.slot += 1
        self._applied.append((self.slot, stored))
        seq = self.position.seq if stored.is_fence else stored.seq
        self.position = Position(max(self.position.epoch, stored.epoch), seq)

    def rebase(self, manifest: ManifestObject) -> None:
        """Takes a newer manifest: below its floor only the sealed rows count, above it the log."""
        self._sealed = manifest.rows
        self._applied = [entry for entry in self._applied if entry[0] > manifest.floor_slot]
        self.slot = max(self.slot, manifest.floor_slot)
        seqs = [stored.seq for _, stored in self._applied if not stored.is_fence]
        seq = max([manifest.floor_seq, *seqs])
        self.position = Position(max(self.position.epoch, manifest.floor_epoch), seq)


class Shard:
    """The protocol's actors over one bucket. Sections refer to docs/design/protocol.md."""

    def __init__(self, bucket: Bucket, random: Random, chances: Chances, variant: Variant) -> None:
        self.history = History()
        self._bucket = bucket
        self._random = random
        self._chances = chances
        self._variant = variant
        self._last_id = 0

    def _unique(self) -> int:
        self._last_id += 1
        return self._last_id

    def create(self, folder: Folder[S], number: int, body: S) -> Steps[S | None]:
        """The one create primitive: returns None when the object is ours, else the other's."""
        bucket = self._bucket
        while True:
            reply = yield from bucket.put(folder, number, body)
            if reply is PutReply.CREATED:
                return None
            if reply is PutReply.EXISTS and self._variant is Variant.EXISTS_TAKEN_AS_SUCCESS:
                return None
            stored = yield from bucket.get(folder, number)
            if stored is None:
                continue  # absent is not final: an earlier attempt may still land
            return None if stored.put_id == body.put_id else stored

    def newest_manifest(self) -> Steps[tuple[int, ManifestObject]]:
        bucket = self._bucket
        while True:
            versions = yield from bucket.list_above(bucket.manifests, -1)
            manifest = yield from bucket.get(bucket.manifests, versions[-1])
            if manifest is not None:
                return versions[-1], manifest

    def commit(self, version: int, body: ManifestObject) -> Steps[bool]:
        """Commits a manifest version; False when the name was taken or had been collected."""
        bucket = self._bucket
        other = yield from self.create(bucket.manifests, version, body)
        if other is not None:
            return False
        if self._variant is Variant.NO_FLOOR_CHECK:
            return True
        markers = yield from bucket.list_above(bucket.floors, -1)
        return not markers or version > markers[-1]

    def writer(self) -> Steps[None]:
        """Takes the shard over, then appends and flushes until it is fenced or has had enough."""
        bucket = self._bucket
        version, manifest = yield from self.newest_manifest()
        epoch = manifest.epoch + 1
        claim = replace(manifest, put_id=self._unique(), epoch=epoch)
        if not (yield from self.commit(version + 1, claim)):
            return
        version += 1

        log = _Log(tail=manifest.floor_slot, seq=manifest.floor_seq, rows=set(manifest.rows))
        while True:
            stored = yield from bucket.get(bucket.wal, log.tail + 1)
            if stored is None:
                fence = self._fence(epoch)
                stored = yield from self.create(bucket.wal, log.tail + 1, fence)
                if stored is None:
                    log.add(fence)
                    break
            if stored.epoch > epoch:
                return
            log.add(stored)

        if self._variant is not Variant.NO_VALIDATION:
            version, newest = yield from self.newest_manifest()
            if newest.epoch != epoch or newest.floor_slot >= log.tail:
                return
        self.history.takeovers += 1
        yield from self._serve(epoch, version, log)

    def _fence(self, epoch: int) -> LogObject:
        return LogObject(put_id=self._unique(), epoch=epoch, is_fence=True, seq=0, rows=NO_ROWS)

    def _serve(self, epoch: int, version: int, log: "_Log") -> Steps[None]:
        for _ in range(self._random.randint(2, TURNS_MAX)):
            if self._random.random() < self._chances.flush:
                flushed = yield from self._flush(epoch, version, log)
                if flushed is None:
                    return
                version = flushed
                continue
            row = self._unique()
            record = LogObject(
                put_id=self._unique(),
                epoch=epoch,
                is_fence=False,
                seq=log.seq + 1,
                rows=frozenset({row}),
            )
            slot = yield from self._append(log.tail + 1, record)
            if slot is None:
                return
            log.tail = slot - 1
            log.add(record)
            self.history.acked_at[row] = self._bucket.now
            self.history.tokens[row] = Position(epoch, record.seq)

    def _append(self, slot: int, record: LogObject) -> Steps[int | None]:
        """Appends one record; returns its slot, or None when another primary has fenced us."""
        bucket = self._bucket
        if self._variant is Variant.AMBIGUOUS_PUT_SKIPPED:
            reply = yield from bucket.put(bucket.wal, slot, record)
            if reply is PutReply.UNKNOWN:
                slot += 1
                again = replace(record, put_id=self._unique())
                reply = yield from bucket.put(bucket.wal, slot, again)
            return slot if reply is PutReply.CREATED else None
        other = yield from self.create(bucket.wal, slot, record)
        return slot if other is None else None

    def _flush(self, epoch: int, version: int, log: "_Log") -> Steps[int | None]:
        """Seals the whole log; returns the committed version, None when deposed."""
        while True:
            sealed = ManifestObject(
                put_id=self._unique(),
                epoch=epoch,
                floor_slot=log.tail,
                floor_seq=log.seq,
                floor_epoch=epoch,
                rows=frozenset(log.rows),
            )
            if (yield from self.commit(version + 1, sealed)):
                self.history.flushes += 1
                return version + 1
            version, newest = yield from self.newest_manifest()
            if newest.epoch != epoch:
                return None

    def collector(self) -> Steps[None]:
        """Deletes data below the newest floor, and old manifests once a marker says so."""
        bucket = self._bucket
        while True:
            version, manifest = yield from self.newest_manifest()
            for slot in (yield from bucket.list_above(bucket.wal, 0)):
                if slot > manifest.floor_slot:
                    continue
                stored = yield from bucket.get(bucket.wal, slot)
                if stored is None:
                    continue
                if not stored.is_fence or self._variant is Variant.FENCES_COLLECTED:
                    yield from bucket.delete(bucket.wal, slot)
            listed = yield from bucket.list_above(bucket.manifests, -1)
            old = [number for number in listed if number < version]
            if not old:
                continue
            if self._variant is not Variant.NO_FLOOR_CHECK:
                yield from self.create(bucket.floors, old[-1], Stored(put_id=self._unique()))
            for number in old:
                yield from bucket.delete(bucket.manifests, number)

    def replica(self) -> Steps[None]:
        """Serves one strong read after the other, with a lag of its own between them.

        Between the steps it answers session reads: see `_answer_sessions`.
        """
        bucket = self._bucket
        version, manifest = yield from self.newest_manifest()
        view = _View(manifest)
        while True:
            began = bucket.now
            while True:
                newer = False
                if self._variant is Variant.MANIFEST_PROBED_FIRST:
                    newer = yield from self._newer_manifest_listed(version)
                stored = yield from bucket.get(bucket.wal, view.slot + 1)
                if stored is not None:
                    if view.follows(stored) or self._variant is Variant.GAP_UNNOTICED:
                        view.apply(stored)
                    else:
                        version, manifest = yield from self.newest_manifest()
                        view = _View(manifest)
                    self._answer_sessions(view)
                    continue
                if self._variant is Variant.MANIFEST_PROBED_BY_GET:
                    newer = (yield from bucket.get(bucket.manifests, version + 1)) is not None
                elif self._variant not in (
                    Variant.NO_MANIFEST_PROBE,
                    Variant.MANIFEST_PROBED_FIRST,
                ):
                    newer = yield from self._newer_manifest_listed(version)
                if not newer:
                    break
                version, manifest = yield from self.newest_manifest()
                passed = manifest.floor_slot <= view.slot
                if not (passed and self._variant is Variant.FLOOR_PASSED_UNREAD):
                    view.rebase(manifest)
                self._answer_sessions(view)
            rows = view.rows()
            self.history.strong_reads.append(StrongRead(began=began, ended=bucket.now, rows=rows))
            for _ in range(self._random.randint(0, LAG_STEPS_MAX)):
                yield from bucket.idle()

    def _answer_sessions(self, view: "_View") -> None:
        """Lets a client with the token of each acknowledged row ask this replica at once.

        A replica whose position has not reached the token would wait; only answers count.
        """
        rows = view.rows()
        for row, token in self.history.tokens.items():
            if self._variant is Variant.TOKEN_LED_BY_EPOCH:
                reached = view.position >= token
            else:
                reached = view.position.seq >= token.seq
            if reached and row not in rows:
                self.history.stale_session_rows.add(row)

    def _newer_manifest_listed(self, version: int) -> Steps[bool]:
        listed = yield from self._bucket.list_above(self._bucket.manifests, version)
        return bool(listed)


# ---------------------------------------------------------------------------------- the schedule


@dataclass(slots=True)
class _Actor:
    steps: Steps[None]
    pace: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One schedule's end: a violation or None, and how much happened in it."""

    seed: int
    violation: Violation | None
    takeovers: int
    acks: int
    flushes: int
    strong_reads: int


def recover(bucket: Bucket) -> Rows:
    """Returns what a restart finds: the newest manifest and the contiguous log above its floor."""
    manifest = bucket.manifests.objects[max(bucket.manifests.objects)]
    rows = manifest.rows
    slot = manifest.floor_slot + 1
    while (stored := bucket.wal.objects.get(slot)) is not None:
        rows |= stored.rows
        slot += 1
    return rows


def run_schedule(seed: int, variant: Variant = Variant.CORRECT) -> Outcome:
    """Runs one schedule; the same seed and variant always give the same outcome."""
    random = Random(seed)
    chances = draw_chances(random)
    bucket = Bucket(random, chances)
    shard = Shard(bucket, random, chances, variant)
    actors = [
        _Actor(steps, random.choice(chances.paces))
        for steps in (
            shard.writer(),
            shard.writer(),
            shard.collector(),
            shard.replica(),
            shard.replica(),
        )
    ]
    if chances.collector_pace is not None:
        actors[2].pace = chances.collector_pace
    actor: _Actor | None = None
    for _ in range(STEPS_PER_SCHEDULE):
        if random.random() < chances.arrival:
            actors.append(_Actor(shard.writer(), random.choice(chances.paces)))
        if random.random() < chances.repacing:
            random.choice(actors).pace = random.choice(LATER_PACES)
        if actor is None or actor not in actors or random.random() >= chances.burst:
            (actor,) = random.choices(actors, [actor.pace + PACE_FLOOR for actor in actors])
        try:
            next(actor.steps)
        except StopIteration:
            actors.remove(actor)
    bucket.settle()
    history = shard.history
    return Outcome(
        seed=seed,
        violation=find_violation(history, recover(bucket)),
        takeovers=history.takeovers,
        acks=len(history.acked_at),
        flushes=history.flushes,
        strong_reads=len(history.strong_reads),
    )
