"""What clients saw, and what must hold of it, whatever happened inside.

Pure: a list of operations in, a list of violations out; the simulation and the chaos runs share it.
Every acknowledgement carries a position (epoch, seq) of its shard and every row its seq, so the
order of versions is known and checking is a matter of sorting: O(operations × ids).

Values are unique: each upsert writes a `value` into vector, payload and attribute, each patch sets
a `mark`. So a row says which write made it.

What is checked (ViolationKind): reads reflect what they must (acknowledged writes for strong ones,
the session's token for session ones, what they claim in `as_of` for all); what was once seen or
acknowledged stays; batches of one shard are whole; no request is applied twice; no two
acknowledgements share a position; replicas at rest agree; index, payload and attributes agree.
"""

import enum
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Position(NamedTuple):
    epoch: int
    seq: int


NOWHERE = Position(0, 0)


class Level(enum.Enum):
    EVENTUAL = "eventual"
    SESSION = "session"
    STRONG = "strong"


class Ending(enum.Enum):
    """UNKNOWN: may take effect at any later moment, or never."""

    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"


class WriteType(enum.Enum):
    UPSERT = "upsert"
    PATCH = "patch"
    DELETE = "delete"
    DELETE_WHERE = "delete_where"


class Change(NamedTuple):
    """What a write does to one point. value: of an upsert; mark: of a patch; neither: a delete."""

    shard: int
    point: str
    value: int | None = None
    mark: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One request, its retries included. Times are of the client.

    changes: in the order of the request (none for a delete by filter, whose `group` says what it
    removes). positions: per shard, of the last operation. seqs: of an upsert, by change.
    answers: one more acknowledgement of the same request each, as a retry may get.
    """

    client: str
    request: int
    type: WriteType
    invoked_s: float
    returned_s: float
    ending: Ending
    changes: tuple[Change, ...] = ()
    group: str | None = None
    shards: tuple[int, ...] = ()
    positions: Mapping[int, Position] = field(default_factory=dict)
    seqs: tuple[int, ...] = ()
    affected: int = 0
    answers: tuple[Mapping[int, Position], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.type.value} {self.client}/{self.request}"


class Seen(NamedTuple):
    """A row in an answer. agrees: vector, payload, attribute and distance tell one value."""

    shard: int
    point: str
    seq: int
    value: int
    mark: int | None = None
    group: str = ""
    agrees: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """asked: points it would have shown if they existed; a filtered read asked for none.

    token: of the session when it was sent. at_once: whether `as_of` is of the very state that was
    read (a scroll reads page by page, and its as_of is that of the last page).
    """

    client: str
    invoked_s: float
    returned_s: float
    level: Level
    token: Mapping[int, Position]
    as_of: Mapping[int, Position]
    asked: tuple[tuple[int, str], ...] = ()
    rows: tuple[Seen, ...] = ()
    at_once: bool = True
    what: str = "read"


class RestingReplica(NamedTuple):
    """A replica when everything had come to rest. sum: set checksum of its live rows."""

    shard: int | str
    replica: str
    position: Position
    rows: int
    sum: int


class ViolationKind(enum.Enum):
    ACKED_WRITE_LOST = "acknowledged write lost"
    STALE_STRONG_READ = "stale strong read"
    READ_YOUR_WRITES = "session guarantee broken"
    AS_OF_UNTRUE = "read older than it claims"
    DIRTY_READ = "dirty read"
    DELETED_POINT_BACK = "deleted point back"
    TORN_BATCH = "torn batch"
    DOUBLE_APPLY = "double apply"
    TWO_ACKS_ONE_POSITION = "two acknowledgements of one position"
    ORDER_AGAINST_TIME = "order of the shard contradicts real time"
    REPLICAS_DISAGREE = "replicas disagree at rest"
    INDEX_AND_PAYLOAD = "index and payload disagree"


@dataclass(frozen=True, slots=True)
class Violation:
    kind: ViolationKind
    what: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.what}"


@dataclass(slots=True)
class _Version:
    """What is known of one sequence number of one point. deleted: it removed the point."""

    seq: int
    deleted: bool
    source: str
    acked: bool
    batch: bool = False


@dataclass(slots=True)
class History:
    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    resting: list[RestingReplica] = field(default_factory=list)

    def operations(self) -> int:
        return len(self.writes) + len(self.reads)


def check(history: History) -> list[Violation]:
    """Returns everything that contradicts the promises; an empty list is what we want."""
    return _Trial(history).run()


class _Trial:
    def __init__(self, history: History) -> None:
        self._history = history
        self._found: list[Violation] = []
        self._versions: dict[tuple[int, str], dict[int, _Version]] = defaultdict(dict)
        self._by_value: dict[int, tuple[Write, int]] = {}
        self._by_mark: dict[int, tuple[Write, int]] = {}
        for write in history.writes:
            for i, change in enumerate(write.changes):
                if change.value is not None:
                    self._by_value[change.value] = (write, i)
                if change.mark is not None:
                    self._by_mark[change.mark] = (write, i)

    def run(self) -> list[Violation]:
        self._learn_from_acknowledgements()
        self._learn_from_rows()
        self._check_positions()
        self._check_real_time()
        for read in self._history.reads:
            self._check_level(read)
            self._check_rows(read)
        self._check_rest()
        return self._found

    def _say(self, kind: ViolationKind, what: str) -> None:
        violation = Violation(kind, what)
        if violation not in self._found:
            self._found.append(violation)

    # -- what is known of each point's versions

    def _learn_from_acknowledgements(self) -> None:
        for write in self._history.writes:
            for other in write.answers:
                if dict(other) != dict(write.positions):
                    self._say(
                        ViolationKind.DOUBLE_APPLY,
                        f"{write.name} was acknowledged at {dict(write.positions)} and {other}",
                    )
            if write.ending is not Ending.OK:
                continue
            for change, seq in _acked_changes(write):
                self._learn(change, _Version(seq, _is_delete(change), write.name, True), write.name)

    def _learn_from_rows(self) -> None:
        seq_of_value: dict[tuple[str, int, int | None], int] = {}
        seq_of_mark: dict[tuple[str, int], int] = {}
        for read in self._history.reads:
            for row in read.rows:
                if not row.agrees:
                    self._say(
                        ViolationKind.INDEX_AND_PAYLOAD, f"{read.what} returned {row} inconsistent"
                    )
                self._check_origin(read, row)
                identity = (row.point, row.value, row.mark)
                if seq_of_value.setdefault(identity, row.seq) != row.seq:
                    self._say(
                        ViolationKind.DOUBLE_APPLY,
                        f"{row.point}={row.value} (mark {row.mark}) was seen at seqs "
                        f"{seq_of_value[identity]} and {row.seq}",
                    )
                if row.mark is not None:
                    marked = (row.point, row.mark)
                    if seq_of_mark.setdefault(marked, row.seq) != row.seq:
                        self._say(
                            ViolationKind.DOUBLE_APPLY,
                            f"patch {row.mark} of {row.point} was seen at seqs "
                            f"{seq_of_mark[marked]} and {row.seq}",
                        )
                source = f"the row {row.point}={row.value}@{row.seq}"
                version = _Version(row.seq, False, source, False)
                self._learn(Change(row.shard, row.point, row.value, row.mark), version, source)
                self._learn_rest_of_batch(row)

    def _learn_rest_of_batch(self, row: Seen) -> None:
        """A batch is whole: one row of it tells where the others of its shard are."""
        if row.mark is not None or row.value not in self._by_value:
            return
        write, at = self._by_value[row.value]
        of_shard = [i for i, change in enumerate(write.changes) if change.shard == row.shard]
        if len(of_shard) < 2:
            return
        first = row.seq - of_shard.index(at)
        for offset, i in enumerate(of_shard):
            change = write.changes[i]
            known = self._versions[(change.shard, change.point)]
            if first + offset not in known:
                known[first + offset] = _Version(
                    first + offset, False, write.name, write.ending is Ending.OK, batch=True
                )

    def _learn(self, change: Change, version: _Version, source: str) -> None:
        known = self._versions[(change.shard, change.point)]
        earlier = known.get(version.seq)
        if earlier is None:
            known[version.seq] = version
        elif earlier.deleted != version.deleted:
            self._say(
                ViolationKind.TWO_ACKS_ONE_POSITION,
                f"seq {version.seq} of {change.point} is {earlier.source} and {source}",
            )

    def _check_origin(self, read: Read, row: Seen) -> None:
        """A row must come from a write that was sent, and did not fail for certain."""
        made_by = self._by_value.get(row.value)
        if made_by is None:
            self._say(ViolationKind.DIRTY_READ, f"{row} in {read.what}: nobody wrote it")
            return
        origins = [made_by]
        if row.mark is not None:
            if row.mark not in self._by_mark:
                self._say(ViolationKind.DIRTY_READ, f"{row} in {read.what}: nobody marked it")
                return
            origins.append(self._by_mark[row.mark])
        for write, at in origins:
            if write.ending is Ending.FAIL:
                self._say(
                    ViolationKind.DIRTY_READ, f"{row} in {read.what}, but {write.name} failed"
                )
            if write.invoked_s > read.returned_s:
                self._say(ViolationKind.DIRTY_READ, f"{row} in {read.what} before {write.name}")
            change = write.changes[at]
            if (change.shard, change.point) != (row.shard, row.point):
                self._say(
                    ViolationKind.INDEX_AND_PAYLOAD,
                    f"{read.what} shows {row}, which was written to {change.point}",
                )
        last_write, last_at = origins[-1]
        acked = dict(_acked_by_place(last_write))
        if last_at in acked and acked[last_at] != row.seq:
            self._say(
                ViolationKind.DOUBLE_APPLY,
                f"{last_write.name} was acknowledged at seq {acked[last_at]}, seen at {row.seq}",
            )

    # -- acknowledgements among themselves

    def _check_positions(self) -> None:
        owner: dict[tuple[int, int], str] = {}
        acks: dict[int, list[Position]] = defaultdict(list)
        for write in self._history.writes:
            if write.ending is not Ending.OK:
                continue
            for change, seq in _acked_changes(write):
                other = owner.setdefault((change.shard, seq), write.name)
                if other != write.name:
                    self._say(
                        ViolationKind.TWO_ACKS_ONE_POSITION,
                        f"seq {seq} of shard {change.shard}: {other} and {write.name}",
                    )
            for shard, position in write.positions.items():
                acks[shard].append(position)
        for shard, positions in acks.items():
            ordered = sorted(positions, key=lambda position: position.seq)
            for earlier, later in itertools.pairwise(ordered):
                if later.epoch < earlier.epoch and later.seq > earlier.seq:
                    self._say(
                        ViolationKind.TWO_ACKS_ONE_POSITION,
                        f"shard {shard}: {later} follows {earlier}; the epoch went back",
                    )

    def _check_real_time(self) -> None:
        """A write that began after another was acknowledged comes later in the shard's order."""
        ended = sorted(
            (write for write in self._history.writes if write.ending is Ending.OK),
            key=lambda write: write.returned_s,
        )
        begun = sorted(ended, key=lambda write: write.invoked_s)
        highest: dict[int, int] = defaultdict(int)
        at = 0
        for write in begun:
            while at < len(ended) and ended[at].returned_s < write.invoked_s:
                for shard, position in ended[at].positions.items():
                    highest[shard] = max(highest[shard], position.seq)
                at += 1
            for shard, position in write.positions.items():
                if position.seq < highest[shard]:
                    self._say(
                        ViolationKind.ORDER_AGAINST_TIME,
                        f"{write.name} got seq {position.seq} of shard {shard} after "
                        f"{highest[shard]} had been acknowledged",
                    )

    # -- reads

    def _floor(self, read: Read, shard: int) -> Position:
        """Returns the position a read of the shard must reflect."""
        if read.level is Level.SESSION:
            return read.token.get(shard, NOWHERE)
        if read.level is Level.STRONG:
            acked = (
                write.positions[shard]
                for write in self._history.writes
                if write.ending is Ending.OK
                and shard in write.positions
                and write.returned_s < read.invoked_s
            )
            return max(acked, key=lambda position: position.seq, default=NOWHERE)
        return NOWHERE

    def _check_level(self, read: Read) -> None:
        for shard, position in read.as_of.items():
            floor = self._floor(read, shard)
            if position.seq < floor.seq or (read.level is Level.SESSION and position < floor):
                kind = (
                    ViolationKind.STALE_STRONG_READ
                    if read.level is Level.STRONG
                    else ViolationKind.READ_YOUR_WRITES
                )
                self._say(kind, f"{read.what} at {position} of shard {shard}, due was {floor}")

    def _check_rows(self, read: Read) -> None:
        rows = {(row.shard, row.point): row for row in read.rows}
        for shard, point in {**dict.fromkeys(read.asked), **dict.fromkeys(rows)}:
            floor = self._floor(read, shard).seq
            reflected = max(floor, read.as_of[shard].seq) if read.at_once else floor
            due = _newest(self._versions[(shard, point)].values(), reflected)
            row = rows.get((shard, point))
            if row is not None:
                self._check_shown(read, row, due, floor)
            elif due is not None and not due.deleted:
                self._check_missing(read, shard, point, due)
            if row is not None and read.at_once and row.seq > read.as_of[shard].seq:
                self._say(ViolationKind.AS_OF_UNTRUE, f"{read.what} as of {read.as_of} shows {row}")

    def _check_shown(self, read: Read, row: Seen, due: _Version | None, floor: int) -> None:
        if due is not None and row.seq < due.seq:
            if due.deleted:
                kind = ViolationKind.DELETED_POINT_BACK
            elif due.batch:
                kind = ViolationKind.TORN_BATCH
            elif due.seq <= floor:
                kind = (
                    ViolationKind.STALE_STRONG_READ
                    if read.level is Level.STRONG
                    else ViolationKind.READ_YOUR_WRITES
                )
            else:
                kind = ViolationKind.AS_OF_UNTRUE
            self._say(kind, f"{read.what} shows {row}, due was {due.source} at seq {due.seq}")
        for write in self._history.writes:
            if (
                write.type is WriteType.DELETE_WHERE
                and write.ending is Ending.OK
                and write.group == row.group
                and row.shard in write.positions
                and row.seq <= write.positions[row.shard].seq - write.affected
                and write.positions[row.shard].seq
                <= (read.as_of[row.shard].seq if read.at_once else floor)
            ):
                self._say(
                    ViolationKind.DELETED_POINT_BACK,
                    f"{read.what} shows {row}, which {write.name} removed",
                )

    def _check_missing(self, read: Read, shard: int, point: str, due: _Version) -> None:
        if any(
            _may_have_deleted(write, shard, point, due.seq, read.returned_s)
            for write in self._history.writes
        ):
            return
        if due.batch:
            kind = ViolationKind.TORN_BATCH
        elif due.acked:
            kind = ViolationKind.ACKED_WRITE_LOST
        else:
            kind = ViolationKind.DIRTY_READ
        self._say(kind, f"{read.what} lacks {point}: {due.source} at seq {due.seq} of {shard}")

    def _check_rest(self) -> None:
        first: dict[int | str, RestingReplica] = {}
        for replica in self._history.resting:
            other = first.setdefault(replica.shard, replica)
            if (other.position, other.rows, other.sum) != (
                replica.position,
                replica.rows,
                replica.sum,
            ):
                self._say(ViolationKind.REPLICAS_DISAGREE, f"{other} and {replica}")


def _is_delete(change: Change) -> bool:
    return change.value is None and change.mark is None


def _acked_by_place(write: Write) -> list[tuple[int, int]]:
    """Returns (index of the change, its seq) for what an acknowledgement tells exactly."""
    if write.ending is not Ending.OK:
        return []
    if write.type is WriteType.UPSERT:
        return list(enumerate(write.seqs))
    if write.affected != len(write.changes):
        return []  # some points did not exist: which seq is whose cannot be told
    of_shard: dict[int, list[int]] = defaultdict(list)
    for i, change in enumerate(write.changes):
        of_shard[change.shard].append(i)
    return [
        (i, write.positions[shard].seq - len(places) + 1 + offset)
        for shard, places in of_shard.items()
        for offset, i in enumerate(places)
    ]


def _acked_changes(write: Write) -> list[tuple[Change, int]]:
    return [(write.changes[i], seq) for i, seq in _acked_by_place(write)]


def _newest(versions: Iterable[_Version], reflected: int) -> _Version | None:
    due = [version for version in versions if version.seq <= reflected]
    return max(due, key=lambda version: version.seq, default=None)


def _may_have_deleted(write: Write, shard: int, point: str, after: int, before_s: float) -> bool:
    """Says whether a write can have removed the point after seq `after`."""
    if write.invoked_s > before_s or write.ending is Ending.FAIL:
        return False
    if write.type is WriteType.DELETE_WHERE:
        if shard not in write.shards:
            return False
    elif not any(
        _is_delete(change) and (change.shard, change.point) == (shard, point)
        for change in write.changes
    ):
        return False
    if write.ending is Ending.OK:
        return write.positions[shard].seq > after
    return True


def summary(violations: Sequence[Violation]) -> dict[str, int]:
    """Returns how many violations there are of each kind."""
    counts: dict[str, int] = defaultdict(int)
    for violation in violations:
        counts[violation.kind.value] += 1
    return dict(counts)
