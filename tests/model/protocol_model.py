"""Executable model of the durable protocol of one shard (docs/design/protocol.md).

One schedule interleaves writers, a garbage collector and tailing replicas over a bucket that knows
only put-if-absent, get, list and delete. Every step of an actor is one bucket operation. Between
any two of them any other actor may run, or this one may stall, perhaps for ever: a stalled writer
that wakes up is the zombie primary, one that never does is the crash. A put may be applied and
answered, applied with its answer lost, or linger in the network and land at any later time, or
never. At the end history.py checks what clients saw (H-1 to H-6).

Each `Variant` but CORRECT breaks one rule of the protocol. A checker that cannot fail is no
evidence, so the tests demand that every broken variant is caught.

Not modelled: more than one put in flight per shard, segments, the catalog, power loss of a local
disk. Those belong to the simulation of the real code.
"""

import enum
from dataclasses import dataclass, replace
from random import Random

from tests.model.bucket import (
    NO_ROWS,
    Bucket,
    Folder,
    LogObject,
    ManifestObject,
    Network,
    Place,
    PutReply,
    Row,
    Rows,
    S,
    Steps,
    Stored,
    recover,
)
from tests.model.history import History, Position, StrongRead, Violation, find_violation


class Variant(enum.Enum):
    """The protocol, or the protocol with one rule broken."""

    CORRECT = "correct"
    FENCES_COLLECTED = "fences_collected"
    """Garbage collection deletes fences like data."""
    NO_VALIDATION = "no_validation"
    """A takeover serves without reading the newest manifest again after its fence."""
    NO_FLOOR_CHECK = "no_floor_check"
    """A manifest commit ignores the markers that say which versions were collected.

    And a claimant takes fences on trust: looking for a newer manifest at each of them would catch
    the same sleepers, so that neither rule alone could be seen to matter.
    """
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
    FENCE_TAKEN_ON_TRUST = "fence_taken_on_trust"
    """A replica applies a fence without looking for a manifest that is newer than its own."""
    CLAIM_OUTLIVED = "claim_outlived"
    """A claimant that finds a manifest newer than its claim replays on from it and fences."""
    OWN_APPEND_TAKEN_FOR_TAIL = "own_append_taken_for_tail"
    """A primary's strong read ends at an append of its own that was under way when it began."""
    OWN_SLOT_TAKEN_FOR_FREE = "own_slot_taken_for_free"
    """A primary's strong read takes the slot it is writing for absent, though it was collected."""


BROKEN_VARIANTS = tuple(variant for variant in Variant if variant is not Variant.CORRECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chances:
    """How likely each nuisance is in one schedule.

    arrival: per step, that one more writer tries to take over. repacing: per step, that one actor
    gets another pace. burst: per step, that the actor of the last one goes on. nap: that a claimant
    sleeps just before or after its claim. lag_steps_max: a replica rests up to so many steps
    between reads. flush: per turn of a writer, that it seals instead of appending. primary_reads:
    whether primaries serve strong reads too. paces: what the speeds of all but the collector are
    drawn from.
    """

    arrival: float = 0.03
    repacing: float = 0.02
    burst: float = 0.0
    nap: float = 0.0
    lag_steps_max: int = 6
    flush: float = 0.35
    primary_reads: bool = True
    collector_pace: float = 1.0
    paces: tuple[float, ...] = (1.0,)


# Relative speeds: most actors run, some crawl, and one that falls to 0 runs only by rare accident,
# long after everybody else has moved on. The second set leaves one in four at full speed.
EVEN_PACES = (1.0, 1.0, 1.0, 0.15, 0.04)
UNEVEN_PACES = (1.0, 0.2, 0.03, 0.005)
LATER_PACES = (1.0, 1.0, 0.15, 0.02, 0.0)
PACE_FLOOR = 1e-9


def draw_chances(random: Random) -> Chances:
    """Draws the chances of one schedule, so that schedules differ in kind and not only in order.

    Source: Groce et al., "Swarm testing", ISSTA 2012. Bursts are what showed that a late fence can
    hide collected data (FENCE_TAKEN_ON_TRUST); 7,000 schedules of one setting without them had not.
    """
    return Chances(
        arrival=random.choice((0.03, 0.06)),
        repacing=random.choice((0.02, 0.06)),
        burst=random.choice((0.0, 0.7, 0.9)),
        nap=random.choice((0.0, 0.6)),
        lag_steps_max=random.choice((6, 60)),
        flush=random.choice((0.35, 0.7)),
        primary_reads=random.choice((False, True)),
        collector_pace=random.choice((0.2, 1.0, 3.0)),
        paces=random.choice((EVEN_PACES, UNEVEN_PACES)),
    )


STEPS_PER_SCHEDULE = 420
"""Long enough for about six takeovers and ten acknowledged rows."""

TURNS_MIN, TURNS_MAX = 2, 7
NAP_STEPS_MAX = 150

REPLICA_NAP_SHARE = 0.3
"""A replica naps between two slots less often than a claimant, since it passes many slots."""


@dataclass(slots=True, kw_only=True)
class Term:
    """What a primary knows: its epoch, the newest manifest version, and the log it holds.

    sealed: the manifest it committed or claimed with last. appending: the slot whose put is
    unresolved. loading: a manifest that brings a bulk load is unresolved (load_model.py). ended: it
    has learned that it was deposed.
    """

    epoch: int
    version: int
    sealed: ManifestObject
    tail: Place
    rows: set[Row]
    appending: int | None = None
    loading: bool = False
    ended: bool = False

    def add(self, stored: LogObject) -> None:
        self.tail = self.tail.after(stored)
        self.rows |= stored.rows


class View:
    """What a replica shows: the sealed rows of a manifest and the log it applied above them."""

    def __init__(self, manifest: ManifestObject) -> None:
        self.place = manifest.floor
        self.manifest = manifest
        self._applied: list[tuple[int, Rows]] = []

    @property
    def position(self) -> Position:
        return Position(self.place.epoch, self.place.seq)

    def rows(self) -> Rows:
        return self.manifest.rows.union(*(rows for _, rows in self._applied))

    def apply(self, stored: LogObject) -> None:
        self.place = self.place.after(stored)
        self._applied.append((self.place.slot, stored.rows))

    def rebase(self, manifest: ManifestObject) -> None:
        """Takes a newer manifest: below its floor only the sealed rows count, above it the log.

        Its floor may lie below the one before: a manifest that was created at a collected version
        is true of the log, though nobody committed it. Then the log is read again from there. A
        floor in our own slot may have a higher number (a bulk load), or the true one again.
        """
        floor = manifest.floor
        if self.manifest.floor.slot <= floor.slot < self.place.slot:
            self._applied = [entry for entry in self._applied if entry[0] > floor.slot]
        else:
            self._applied = []
            self.place = floor
        self.manifest = manifest


class Shard:
    """The protocol's actors over one bucket. The rules are those of docs/design/protocol.md."""

    def __init__(self, bucket: Bucket, random: Random, chances: Chances, variant: Variant) -> None:
        self.history = History()
        self.spawned: list[Steps[None]] = []
        self.loads_allowed = False
        self._bucket = bucket
        self._random = random
        self._chances = chances
        self._variant = variant
        self._last_id = 0

    def _unique(self) -> int:
        self._last_id += 1
        return self._last_id

    def _nap(self, share: float = 1.0) -> int:
        """Draws how long an actor sleeps at a place where oversleeping is dangerous."""
        if self._random.random() >= self._chances.nap * share:
            return 0
        return self._random.randint(1, NAP_STEPS_MAX)

    # ---- what several actors do

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

    def _newer_manifest_listed(self, version: int) -> Steps[bool]:
        listed = yield from self._bucket.list_above(self._bucket.manifests, version)
        return bool(listed)

    def _next_object(self, term: Term, *, rows: Rows) -> LogObject:
        """Returns what a primary or claimant puts next: a fence when there are no rows."""
        return LogObject(
            put_id=self._unique(),
            epoch=term.epoch,
            is_fence=not rows,
            previous=term.tail.put_id,
            next_seq=term.tail.seq + 1,
            rows=rows,
        )

    def _follows(self, place: Place, stored: LogObject) -> bool:
        """Says whether an object may follow; notes it (H-6) when not."""
        if place.leads_to(stored):
            return True
        self.history.broken_slots.add(place.slot + 1)
        return False

    # ---- the writer

    def writer(self) -> Steps[None]:
        """Takes the shard over, then appends and flushes until it is fenced or has had enough.

        Its strong reads run beside it, as an actor of their own.
        """
        term = yield from self.take_over()
        if term is None:
            return
        if self._chances.primary_reads:
            self.spawned.append(self.primary_reads(term))
        for _ in range(self._random.randint(TURNS_MIN, TURNS_MAX)):
            flush = self._random.random() < self._chances.flush
            serving = yield from (self.flush(term) if flush else self.append_row(term))
            if not serving:
                term.ended = True
            if term.ended:
                return

    def take_over(self) -> Steps[Term | None]:
        """Claims an epoch, fences the log, validates; None when somebody else is ahead."""
        bucket = self._bucket
        version, manifest = yield from self.newest_manifest()
        yield self._nap()
        epoch = manifest.epoch + 1
        claim = replace(manifest, put_id=self._unique(), epoch=epoch)
        if not (yield from self.commit(version + 1, claim)):
            return None
        yield self._nap()

        term = Term(
            epoch=epoch,
            version=version + 1,
            sealed=claim,
            tail=manifest.floor,
            rows=set(manifest.rows),
        )
        while True:
            slot = term.tail.slot + 1
            stored = yield from bucket.get(bucket.wal, slot)
            if stored is None:
                fence = self._next_object(term, rows=NO_ROWS)
                stored = yield from self.create(bucket.wal, slot, fence)
                if stored is None:
                    term.add(fence)
                    break
            if stored.epoch > epoch:
                return None
            looks = stored.is_fence and self._variant is not Variant.NO_FLOOR_CHECK
            looks = looks or (stored.next_seq > term.tail.seq + 1 and self.loads_allowed)
            if looks and (yield from self._newer_manifest_listed(term.version)):
                if self._variant is not Variant.CLAIM_OUTLIVED:
                    return None
                term.version, manifest = yield from self.newest_manifest()
                if manifest.floor.slot >= slot:
                    term.tail, term.rows = manifest.floor, set(manifest.rows)
                    continue
            if not self._follows(term.tail, stored):
                return None
            term.add(stored)

        if self._variant is not Variant.NO_VALIDATION:
            term.version, newest = yield from self.newest_manifest()
            if newest.epoch != epoch or newest.floor.slot >= term.tail.slot:
                return None
        self.history.takeovers += 1
        return term

    def append_row(self, term: Term) -> Steps[bool]:
        """Appends and acknowledges one row; False when another primary has fenced this one."""
        bucket = self._bucket
        row = self._unique()
        record = self._next_object(term, rows=frozenset({row}))
        slot = term.appending = term.tail.slot + 1
        if self._variant is Variant.AMBIGUOUS_PUT_SKIPPED:
            reply = yield from bucket.put(bucket.wal, slot, record)
            if reply is PutReply.UNKNOWN:
                record = replace(record, put_id=self._unique())
                term.tail = replace(term.tail, slot=slot)
                reply = yield from bucket.put(bucket.wal, slot + 1, record)
            mine = reply is PutReply.CREATED
        else:
            mine = (yield from self.create(bucket.wal, slot, record)) is None
        term.appending = None
        if term.ended:
            return False  # even if it is ours: whoever follows the log applies it now
        if mine:
            term.add(record)
            self.history.acked_at[row] = bucket.now
            self.history.tokens[row] = Position(term.epoch, record.next_seq)
        return mine

    def flush(self, term: Term) -> Steps[bool]:
        """Seals the whole log and commits the manifest; False when deposed."""
        while True:
            sealed = replace(
                term.sealed,
                put_id=self._unique(),
                epoch=term.epoch,
                floor=term.tail,
                rows=frozenset(term.rows),
            )
            if (yield from self.commit(term.version + 1, sealed)):
                term.version += 1
                term.sealed = sealed
                self.history.flushes += 1
                return True
            term.version, newest = yield from self.newest_manifest()
            if newest.epoch != term.epoch:
                return False

    def primary_reads(self, term: Term) -> Steps[None]:
        """Serves one strong read after the other at a primary, until it meets a fence."""
        bucket = self._bucket
        while not term.ended:
            began = bucket.now
            yield from self._primary_probe(term)
            if term.ended:
                return
            rows = frozenset(term.rows)
            self.history.strong_reads.append(StrongRead(began=began, ended=bucket.now, rows=rows))
            yield self._random.randint(0, self._chances.lag_steps_max)

    def _primary_probe(self, term: Term) -> Steps[None]:
        """Looks for whatever is durable and not in the term, which ends if it is another's.

        Only a put that began before the probe may have landed before it: whoever led since may have
        appended after it, and even have sealed and collected it.
        """
        bucket = self._bucket
        doubtful = term.appending
        while True:
            slot = term.tail.slot + 1
            stored = yield from bucket.get(bucket.wal, slot)
            if stored is not None:
                if stored.epoch != term.epoch:
                    term.ended = True
                while term.tail.slot < slot and not term.ended:
                    yield 0
                if term.ended or slot != doubtful:
                    return
                if self._variant is Variant.OWN_APPEND_TAKEN_FOR_TAIL:
                    return
            else:
                if slot != doubtful or self._variant is Variant.OWN_SLOT_TAKEN_FOR_FREE:
                    return
                if not (yield from self._newer_manifest_listed(term.version)):
                    return
                while term.appending == slot:
                    yield 0
            doubtful = None

    # ---- the garbage collector

    def collector(self) -> Steps[None]:
        while True:
            yield from self.collect()

    def collect(self) -> Steps[None]:
        """Deletes data below the newest floor, then old manifests once a marker says so."""
        bucket = self._bucket
        version, manifest = yield from self.newest_manifest()
        for slot in (yield from bucket.list_above(bucket.wal, 0)):
            if slot > manifest.floor.slot:
                continue
            stored = yield from bucket.get(bucket.wal, slot)
            if stored is None:
                continue
            if not stored.is_fence or self._variant is Variant.FENCES_COLLECTED:
                yield from bucket.delete(bucket.wal, slot)
        listed = yield from bucket.list_above(bucket.manifests, -1)
        old = [number for number in listed if number < version]
        if not old:
            return
        if self._variant is not Variant.NO_FLOOR_CHECK:
            yield from self.create(bucket.floors, old[-1], Stored(put_id=self._unique()))
        for number in old:
            yield from bucket.delete(bucket.manifests, number)

    # ---- the replica

    def replica(self) -> Steps[None]:
        """Serves one strong read after the other, with a lag of its own between them.

        After each slot and each manifest it answers session reads: see `_answer_sessions`.
        """
        bucket = self._bucket
        version, manifest = yield from self.newest_manifest()
        view = View(manifest)
        while True:
            began = bucket.now
            while True:
                newer = False
                if self._variant is Variant.MANIFEST_PROBED_FIRST:
                    newer = yield from self._newer_manifest_listed(version)
                stored = yield from bucket.get(bucket.wal, view.place.slot + 1)
                if stored is not None:
                    gap = self.loads_allowed and stored.next_seq > view.place.seq + 1
                    fence = stored.is_fence and self._variant is not Variant.FENCE_TAKEN_ON_TRUST
                    if gap or fence:
                        slot = view.place.slot + 1
                        if (yield from self._newer_manifest_listed(version)):
                            version, manifest = yield from self.newest_manifest()
                            view.rebase(manifest)
                        if view.place.slot >= slot:
                            continue  # a fence that landed late, where data was collected
                    if not self._follows(view.place, stored):
                        return
                    view.apply(stored)
                    self._answer_sessions(view)
                    yield self._nap(REPLICA_NAP_SHARE)
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
                view.rebase(manifest)
                self._answer_sessions(view)
            rows = view.rows()
            self.history.strong_reads.append(StrongRead(began=began, ended=bucket.now, rows=rows))
            yield self._random.randint(0, self._chances.lag_steps_max)

    def _answer_sessions(self, view: View) -> None:
        """Lets a client with the token of each acknowledged row ask this replica at once.

        A replica whose position has not reached the token would wait; only answers count.
        """
        rows = view.rows()
        for row, token in self.history.tokens.items():
            if view.position >= token and row not in rows:
                self.history.stale_session_rows.add(row)


# ---------------------------------------------------------------------------------- the schedule


@dataclass(slots=True, eq=False)
class Actor:
    steps: Steps[None]
    pace: float
    wakes_at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One schedule's end: a violation or None, and how much happened in it."""

    seed: int
    violation: Violation | None
    takeovers: int
    acks: int
    flushes: int
    strong_reads: int


def run_schedule(seed: int, variant: Variant = Variant.CORRECT) -> Outcome:
    """Runs one schedule; the same seed and variant always give the same outcome."""
    random = Random(seed)
    chances = draw_chances(random)
    bucket = Bucket(random, Network())
    shard = Shard(bucket, random, chances, variant)
    actors = [Actor(shard.collector(), chances.collector_pace)]
    for steps in (shard.writer(), shard.writer(), shard.replica(), shard.replica()):
        actors.append(Actor(steps, random.choice(chances.paces)))
    last: Actor | None = None
    for step in range(STEPS_PER_SCHEDULE):
        if random.random() < chances.arrival:
            actors.append(Actor(shard.writer(), random.choice(chances.paces)))
        if random.random() < chances.repacing:
            random.choice(actors).pace = random.choice(LATER_PACES)
        if last is None or last.wakes_at > step or random.random() >= chances.burst:
            # Never empty: the collector does not nap.
            awake = [actor for actor in actors if actor.wakes_at <= step]
            (last,) = random.choices(awake, [actor.pace + PACE_FLOOR for actor in awake])
        try:
            last.wakes_at = step + next(last.steps)
        except StopIteration:
            actors.remove(last)
            last = None
        while shard.spawned:
            actors.append(Actor(shard.spawned.pop(), random.choice(chances.paces)))
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
