"""Small, named breakages of the real code. Each must be caught: a checker that cannot fail proves
nothing. They register themselves in `registry.MUTANTS` when their modules are imported.
"""

from tests.simulation.mutants import local_store, reads, takeover, upkeep, writes
from tests.simulation.mutants.registry import MUTANTS, Verdict, hunt

__all__ = ["MUTANTS", "Verdict", "hunt", "local_store", "reads", "takeover", "upkeep", "writes"]
