"""The check of simulation.py over a protocol with one rule broken: it must notice.

A check that cannot fail is no evidence.
"""

from pathlib import Path

import pytest

from shoal_cluster.bucket.faults import FaultPlan
from shoal_cluster.shard.composition import Composition
from shoal_cluster.shard.dedup import Dedup
from shoal_cluster.shard.memtable import Memtable
from shoal_cluster.shard.primary import Primary, _Group
from shoal_cluster.shard.replica import Replica
from shoal_cluster.wal import log as wal_log
from tests.integration.shard.simulation import violation_of
from tests.unit.shard.nodes import run

MUTANT_SEEDS_MAX = 40

# Faults that leave the caller in doubt, at a rate at which work still gets done.
DOUBT = FaultPlan(
    lost_reply=0.08, not_applied=0.05, applied_late=0.08, conflict_not_stored=0.04, slow=0.2
)


def first_violation(scratch: Path) -> str:
    """Returns what the check says of the broken protocol, '' if it noticed nothing."""
    for seed in range(MUTANT_SEEDS_MAX):
        violation, _ = run(violation_of(scratch / str(seed), seed, DOUBT))
        if violation:
            return violation
    return ""


@pytest.mark.slow
def test_the_unbroken_protocol_passes_where_the_mutants_fail(tmp_path):
    for seed in range(8):
        violation, _ = run(violation_of(tmp_path / str(seed), seed, DOUBT))
        assert not violation, f"seed {seed}: {violation}"


@pytest.mark.slow
def test_acknowledging_before_the_put_is_noticed(tmp_path, monkeypatch):
    append = Primary._append

    async def too_early(self: Primary, composition: Composition, group: _Group) -> bool:
        group.settle()
        return await append(self, composition, group)

    monkeypatch.setattr(Primary, "_append", too_early)
    assert first_violation(tmp_path)


@pytest.mark.slow
def test_taking_exists_for_success_is_noticed(tmp_path, monkeypatch):
    async def careless(store, key, body, **_):
        await store.create(key, body)

    monkeypatch.setattr(wal_log, "create", careless)
    assert first_violation(tmp_path)


@pytest.mark.slow
def test_forgetting_answered_requests_at_a_restart_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Dedup, "restore", staticmethod(lambda _: Dedup()))
    violation = first_violation(tmp_path)
    assert "twice" in violation or "two answers" in violation


@pytest.mark.slow
def test_following_out_of_order_is_noticed(tmp_path, monkeypatch):
    def at_once(self: Replica, slot: int, body: bytes) -> None:
        if self.leader is None and not self.advancing.locked():
            record = self.wal.decode(slot, body)
            # As apply does it, but without asking whether the record follows.
            self.state.slot = record.slot - 1
            self.state.seq = record.first_seq - 1
            self.state.last_put_id = record.prev_put_id
            self.state.epoch = min(self.state.epoch, record.epoch)
            self.state.apply(record)

    monkeypatch.setattr(Replica, "offer", at_once)
    assert first_violation(tmp_path)


@pytest.mark.slow
def test_a_delete_that_a_seal_forgets_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Memtable, "touched", lambda self: list(self.row_of))
    assert first_violation(tmp_path)


@pytest.mark.slow
def test_a_strong_read_that_does_not_ask_the_bucket_is_noticed(tmp_path, monkeypatch):
    async def answers_at_once(self: Replica, level: object) -> None:
        return None

    monkeypatch.setattr(Replica, "wait_for", answers_at_once)
    assert "strong read" in first_violation(tmp_path)
