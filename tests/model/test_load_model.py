"""Bulk loads of one shard (docs/design/bulk-load.md) in schedules written out by hand.

Each plays the rule as it should be, and as the design had it first.
"""

from dataclasses import replace
from random import Random

import pytest

from tests.model.bucket import FAULTLESS, Bucket, Folder, LoadEntry, Steps, Stored, recover
from tests.model.history import Position, find_violation
from tests.model.load_model import Flaw, run_loads
from tests.model.protocol_model import Chances, Shard, Term, Variant
from tests.model.test_protocol_model import advance, finish

REMEMBERED = 1


class LoadingShard(Shard):
    """Commits loads by manifest. `prepared` has one object per load, decided to commit."""

    def __init__(self, *, waits: bool = True, marks: bool = True) -> None:
        self.bucket = Bucket(Random(0), FAULTLESS)
        super().__init__(self.bucket, Random(0), Chances(lag_steps_max=0), Variant.CORRECT)
        self.loads_allowed = True
        self.prepared: Folder[Stored] = Folder()
        self.marks: Folder[Stored] = Folder()
        self._waits, self._marks = waits, marks

    def commit_load(self, term: Term, load: int) -> Steps[bool]:
        bucket = self.bucket
        if load in term.sealed.remembered:
            return True
        if self._marks and (yield from bucket.get(self.marks, load)) is not None:
            return True
        if (yield from bucket.get(self.prepared, load)) is None:
            return True
        rows = (self._unique(), self._unique())
        entry = LoadEntry(load=load, base=term.tail.seq, rows=rows)
        remembered = (*term.sealed.remembered, load)
        for forgotten in remembered[:-REMEMBERED] if self._marks else ():
            yield from self.create(self.marks, forgotten, Stored(put_id=self._unique()))
        sealed = replace(
            term.sealed,
            put_id=self._unique(),
            floor=replace(term.tail, seq=term.tail.seq + len(rows)),
            rows=frozenset(term.rows) | frozenset(rows),
            entries=(*term.sealed.entries, entry),
            remembered=remembered[-REMEMBERED:],
        )
        term.loading = self._waits
        committed = yield from self.commit(term.version + 1, sealed)
        term.loading = False
        if committed:
            term.version, term.sealed = term.version + 1, sealed
            term.tail = sealed.floor
            term.rows |= sealed.rows
            for row in rows:
                self.history.acked_at[row] = bucket.now
                self.history.tokens[row] = Position(term.epoch, sealed.floor.seq)
        return committed

    def _primary_probe(self, term: Term) -> Steps[None]:
        yield from super()._primary_probe(term)
        while term.loading and not term.ended:
            yield 0


def led(shard: LoadingShard) -> Term:
    term = finish(shard.take_over())
    assert isinstance(term, Term)
    return term


@pytest.mark.parametrize("waits", [True, False])
def test_a_primarys_strong_read_waits_for_the_manifest_of_a_load(waits):
    """A follower shows the load once its manifest has landed; the primary must not go back."""
    shard = LoadingShard(waits=waits)
    term = led(shard)
    shard.prepared.apply(1, Stored(put_id=99))
    committing = shard.commit_load(term, 1)
    advance(committing, lambda: max(shard.bucket.manifests.objects) == term.version + 1)
    advance(shard.replica(), lambda: len(shard.history.strong_reads) == 1)
    reading = shard.primary_reads(term)
    for _ in range(4):
        next(reading)
        if len(shard.history.strong_reads) == 2:
            break
    finish(committing)
    advance(reading, lambda: len(shard.history.strong_reads) == 2)
    assert (find_violation(shard.history, recover(shard.bucket)) is None) == waits


@pytest.mark.parametrize("marks", [True, False])
def test_a_load_that_the_manifest_has_forgotten_is_not_committed_again(marks):
    """Cleaning up is late: `prepared` is still there when `loads` no longer has the load."""
    shard = LoadingShard(marks=marks)
    term = led(shard)
    for load in (1, 2, 1):
        shard.prepared.apply(load, Stored(put_id=99))
        assert finish(shard.commit_load(term, load))
    committed = [entry.load for entry in term.sealed.entries]
    assert (committed == [1, 2]) == marks


def test_a_follower_that_meets_the_gap_takes_the_manifest_first():
    shard = LoadingShard()
    term = led(shard)
    replica = shard.replica()
    advance(replica, lambda: len(shard.history.strong_reads) == 1)
    shard.prepared.apply(1, Stored(put_id=99))
    assert finish(shard.commit_load(term, 1))
    assert finish(shard.append_row(term))
    advance(replica, lambda: len(shard.history.strong_reads) == 2)
    assert find_violation(shard.history, recover(shard.bucket)) is None
    assert len(shard.history.strong_reads[-1].rows) == 3


# Where `python -m tests.model.run` found the first violation of each.
CAUGHT_AT = {
    Flaw.NOT_READ_AGAIN: 96,
    Flaw.UNDECIDED: 42,
    Flaw.BASE_RESERVED: 55,
    Flaw.GAP_PASSED: 0,
    Flaw.PREPARED_IGNORED: 19,
    Flaw.NOT_RECORDED: 66,
    Flaw.FORGOTTEN: 66,
    Flaw.READ_NOT_HELD: 282,
    Flaw.NO_JUMP: 0,
    Flaw.LISTED_FIRST: 2,
}


def test_loads_survive_random_schedules():
    outcomes = [run_loads(seed) for seed in range(400)]
    assert {violation for violation, _, _ in outcomes} == {None}
    assert sum(loads for _, loads, _ in outcomes) > 40


@pytest.mark.parametrize("flaw", [flaw for flaw in Flaw if flaw is not Flaw.NONE])
def test_a_load_without_one_of_its_rules_is_caught(flaw):
    assert run_loads(CAUGHT_AT[flaw], flaw)[0] is not None
    assert run_loads(CAUGHT_AT[flaw])[0] is None
