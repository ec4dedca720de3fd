"""Executable model of bulk loads in one shard (docs/design/bulk-load.md), in random schedules.

Rows of a load are seen to be all there or none, once, and only after the decision; the rest is
checked as for other rows (history.py). Points are the rows' remainders, so loads and appends
overwrite each other: what a read shows of a point must be what came last (order of visibility).
"""

import enum
from dataclasses import dataclass, field, replace
from random import Random

from tests.model.bucket import (
    EMPTY_MANIFEST,
    Bucket,
    Folder,
    LoadEntry,
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
from tests.model.history import Position, find_violation
from tests.model.protocol_model import (
    EVEN_PACES,
    LATER_PACES,
    PACE_FLOOR,
    Actor,
    Chances,
    Shard,
    Term,
    Variant,
)

REMEMBERED = 1
POINTS = 5
LOADS = 4
STEPS = 600


class Flaw(enum.Enum):
    """The rule of a load that is broken."""

    NONE = "loads"
    NOT_READ_AGAIN = "load_not_read_again"
    UNDECIDED = "load_undecided"
    BASE_RESERVED = "load_base_reserved"
    GAP_PASSED = "load_gap_passed"
    PREPARED_IGNORED = "load_prepared_ignored"
    NOT_RECORDED = "load_not_recorded"
    FORGOTTEN = "load_forgotten"
    READ_NOT_HELD = "load_read_not_held"
    NO_JUMP = "load_no_jump"
    LISTED_FIRST = "load_listed_first"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment(Stored):
    """What an epoch built of a load; as `prepared` object, what it names."""

    epoch: int
    load: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Stored):
    commit: bool
    epoch: int


class Kept(Folder[S]):
    """Keeps the first body of each name, which is the one that counts for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[int, S] = {}

    def apply(self, number: int, body: S) -> PutReply:
        reply = super().apply(number, body)
        if reply is PutReply.CREATED:
            self.first.setdefault(number, body)
        return reply


@dataclass(slots=True)
class Findings:
    kinds: set[str] = field(default_factory=set)
    loads: int = 0


def key_of(load: int, epoch: int) -> int:
    return load * 1000 + epoch


class LoadingShard(Shard):
    """A shard whose writers prepare and commit loads as well."""

    def __init__(self, random: Random, chances: Chances, flaw: Flaw, network: Network) -> None:
        self.bucket = Bucket(random, network)
        self.wal: Kept[LogObject] = Kept()
        self.manifests: Kept[ManifestObject] = Kept()
        self.bucket.wal, self.bucket.manifests = self.wal, self.manifests
        self.manifests.apply(0, EMPTY_MANIFEST)
        super().__init__(self.bucket, random, chances, Variant.CORRECT)
        self.loads_allowed = flaw is not Flaw.GAP_PASSED
        self.segments: Folder[Segment] = Folder()
        self.prepared: Folder[Segment] = Folder()
        self.decisions: Folder[Decision] = Folder()
        self.marks: Folder[Stored] = Folder()
        self.replies: dict[int, int] = {}
        self.bases: dict[int, int] = {}
        self.found = Findings()
        self.flaw = flaw

    def _follows(self, place: Place, stored: LogObject) -> bool:
        if self.flaw is Flaw.GAP_PASSED and stored.next_seq > place.seq + 1:
            return True
        return super()._follows(place, stored)

    def writer(self) -> Steps[None]:
        term = yield from self.take_over()
        if term is None:
            return
        self.spawned.append(self.primary_reads(term))
        for _ in range(12):
            turn = self._random.random()
            load = self._random.randrange(1, LOADS + 1)
            if turn < 0.25:
                serving = yield from self.append_row(term)
            elif turn < 0.4:
                serving = yield from self.flush(term)
            elif turn < 0.65:
                serving = yield from self.prepare(term, load)
            else:
                serving = yield from self.commit_load(term, load)
            if not serving or term.ended:
                term.ended = True
                return

    def flush(self, term: Term) -> Steps[bool]:
        """As ever; one time in two it merges the loads' segments away."""
        if self._random.random() < 0.5:
            term.sealed = replace(term.sealed, segments=frozenset())
        return (yield from super().flush(term))

    def prepare(self, term: Term, load: int) -> Steps[bool]:
        """Steps 4 to 7."""
        if load in self.replies:
            return True
        key = key_of(load, term.epoch)
        body = Segment(put_id=self._unique(), epoch=term.epoch, load=load)
        self.bases[load] = term.tail.seq
        yield from self.create(self.segments, key, body)
        yield self._nap()
        yield from self.create(self.prepared, key, body)
        if self.flaw is not Flaw.NOT_READ_AGAIN:
            _, newest = yield from self.newest_manifest()
            if newest.epoch != term.epoch:
                return False
        self.replies.setdefault(load, term.epoch)
        return True

    def coordinator(self, load: int, *, commit: bool) -> Steps[None]:
        while commit and load not in self.replies:
            yield 1
        epoch = self.replies.get(load, 0)
        yield self._random.randint(0, 60)
        body = Decision(put_id=self._unique(), commit=commit, epoch=epoch)
        yield from self.create(self.decisions, load, body)

    def commit_load(self, term: Term, load: int) -> Steps[bool]:
        """Steps 9 to 15. Between appends, since a writer does one thing after the other."""
        if load in term.sealed.remembered:
            return True
        decision = yield from self.bucket.get(self.decisions, load)
        if self.flaw is Flaw.UNDECIDED and decision is None and load in self.replies:
            decision = Decision(put_id=0, commit=True, epoch=self.replies[load])
        if decision is None or not decision.commit:
            return True
        marked = self.flaw is not Flaw.FORGOTTEN
        if marked and (yield from self.bucket.get(self.marks, load)) is not None:
            return True
        key = key_of(load, decision.epoch)
        if (yield from self.bucket.get(self.prepared, key)) is None:
            return True
        if (yield from self.bucket.get(self.segments, key)) is None:
            if load not in self.committed():
                self.found.kinds.add("decided load lost")
            return True
        rows = tuple(self._unique() for _ in range(3))
        remembered = term.sealed.remembered
        if self.flaw is not Flaw.NOT_RECORDED:
            remembered = (*remembered, load)
        for forgotten in remembered[:-REMEMBERED] if marked else ():
            yield from self.create(self.marks, forgotten, Stored(put_id=self._unique()))
        q = term.tail.seq
        base = self.bases[load] if self.flaw is Flaw.BASE_RESERVED else q
        jump = 0 if self.flaw is Flaw.NO_JUMP else len(rows)
        sealed = replace(
            term.sealed,
            put_id=self._unique(),
            epoch=term.epoch,
            floor=replace(term.tail, seq=q + jump),
            rows=frozenset(term.rows) | frozenset(rows),
            entries=(*term.sealed.entries, LoadEntry(load=load, base=base, rows=rows)),
            remembered=remembered[-REMEMBERED:],
            segments=term.sealed.segments | {key},
        )
        term.loading = self.flaw is not Flaw.READ_NOT_HELD
        committed = yield from self.commit(term.version + 1, sealed)
        term.loading = False
        if committed and not term.ended:
            term.version, term.sealed, term.tail = term.version + 1, sealed, sealed.floor
            term.rows |= sealed.rows
            self.found.loads += 1
            for row in rows:
                self.history.acked_at[row] = self.bucket.now
                self.history.tokens[row] = Position(term.epoch, sealed.floor.seq)
        return committed

    def _primary_probe(self, term: Term) -> Steps[None]:
        yield from super()._primary_probe(term)
        while term.loading and not term.ended:
            yield 0

    def collect(self) -> Steps[None]:
        """Collects loads as G-3 says, then the rest.

        Of epochs before the one that was newest when it began: what a later one deposed meanwhile
        may have prepared after the listing. A primary collects, so its claim came first.
        """
        _, before = yield from self.newest_manifest()
        segments = yield from self.bucket.list_above(self.segments, 0)
        names = yield from self.bucket.list_above(self.prepared, 0)
        decisions = {}
        for load in range(1, LOADS + 1):
            decisions[load] = yield from self.bucket.get(self.decisions, load)
        _, newest = yield from self.newest_manifest()
        epoch = newest.epoch if self.flaw is Flaw.LISTED_FIRST else before.epoch
        kept = set(newest.segments)
        for name in names:
            decision = decisions[name // 1000]
            ended = decision is not None and (
                not decision.commit or name // 1000 in newest.remembered
            )
            if ended:
                yield from self.bucket.delete(self.prepared, name)
            elif self.flaw is not Flaw.PREPARED_IGNORED:
                kept.add(name)
        for name in segments:
            if name not in kept and name % 1000 < epoch:
                yield from self.bucket.delete(self.segments, name)
        yield from super().collect()

    # ---- what is checked at the end

    def committed(self) -> list[int]:
        last: tuple[LoadEntry, ...] = ()
        for version in sorted(self.manifests.first):
            entries = self.manifests.first[version].entries
            last = entries if len(entries) > len(last) else last
        return [entry.load for entry in last]

    def check(self) -> str | None:
        self.bucket.settle()
        recovered = recover(self.bucket)
        violation = find_violation(self.history, recovered)
        if violation is not None:
            return violation.kind.value
        loads = self.committed()
        if len(set(loads)) < len(loads):
            return "load committed twice"
        for load in loads:
            decision = self.decisions.objects.get(load)
            if decision is None or not decision.commit:
                return "undecided load seen"
        if self.found.kinds:
            return sorted(self.found.kinds)[0]
        return self._order(recovered)

    def _order(self, recovered: Rows) -> str | None:
        number: dict[Row, tuple[int, int]] = {}
        visible: dict[Row, tuple[int, int]] = {}
        for slot, stored in self.wal.first.items():
            for row in stored.rows:
                number[row], visible[row] = (stored.next_seq, 0), (slot, stored.next_seq)
        sets = [read.rows for read in self.history.strong_reads] + [recovered]
        for version in sorted(self.manifests.first):
            manifest = self.manifests.first[version]
            for entry in manifest.entries:
                for i, row in enumerate(entry.rows):
                    number[row] = (entry.base, i + 1)
                    visible.setdefault(row, (manifest.floor.slot, manifest.floor.seq))
                whole = set(entry.rows)
                if any(0 < len(whole & rows) < len(whole) for rows in sets):
                    return "part of a load seen"
        for rows in sets:
            for point in range(POINTS):
                of = [row for row in rows if row % POINTS == point]
                if of and max(of, key=number.__getitem__) != max(of, key=visible.__getitem__):
                    return "older write wins"
        return None


def run_loads(seed: int, flaw: Flaw = Flaw.NONE) -> tuple[str | None, int, int]:
    """Returns the violation, how many loads were committed, and the takeovers."""
    random = Random(seed)
    chances = Chances(nap=random.choice((0.0, 0.6)), lag_steps_max=random.choice((6, 60)))
    shard = LoadingShard(random, chances, flaw, Network())
    actors = [shard.collector(), shard.writer(), shard.writer(), shard.replica(), shard.replica()]
    for load in range(1, LOADS + 1):
        actors.append(shard.coordinator(load, commit=True))
        actors.append(shard.coordinator(load, commit=random.random() < 0.8))
    paced = [Actor(steps, random.choice(EVEN_PACES)) for steps in actors]
    for step in range(STEPS):
        if random.random() < 0.03:
            paced.append(Actor(shard.writer(), random.choice(EVEN_PACES)))
        if random.random() < 0.04:
            random.choice(paced).pace = random.choice(LATER_PACES)
        awake = [actor for actor in paced if actor.wakes_at <= step]
        (actor,) = random.choices(awake, [one.pace + PACE_FLOOR for one in awake])
        try:
            actor.wakes_at = step + next(actor.steps)
        except StopIteration:
            paced.remove(actor)
        while shard.spawned:
            paced.append(Actor(shard.spawned.pop(), random.choice(EVEN_PACES)))
    return shard.check(), shard.found.loads, shard.history.takeovers
