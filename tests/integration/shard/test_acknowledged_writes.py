"""Under faults: nothing acknowledged is lost, nothing deleted is back, no strong read is stale."""

import pytest

from tests.integration.shard.simulation import violation_of
from tests.unit.shard.nodes import run

SEEDS = 50
SEEDS_A_TEST = 10


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
@pytest.mark.slow
def test_no_promise_is_broken_under_any_legal_fault(tmp_path, first):
    """W-1 to W-4, P-2, P-3, D-1, D-2, L-1, R-1 to R-3; see simulation.find_violation."""
    acknowledged = reads = takeovers = 0
    for seed in range(first, first + SEEDS_A_TEST):
        violation, history = run(violation_of(tmp_path / str(seed), seed))
        assert not violation, f"seed {seed}: {violation}"
        acknowledged += sum(bool(operation.replies) for operation in history.operations)
        reads += len(history.reads)
        takeovers += history.takeovers
    # The check is worth something only if things were done.
    assert acknowledged > 20 * SEEDS_A_TEST and reads > 3 * SEEDS_A_TEST
    assert takeovers > 2 * SEEDS_A_TEST


def test_the_same_seed_gives_the_same_history(tmp_path):
    histories = [run(violation_of(tmp_path / name, 5))[1] for name in ("one", "two")]
    assert histories[0].operations == histories[1].operations
    assert histories[0].reads == histories[1].reads
