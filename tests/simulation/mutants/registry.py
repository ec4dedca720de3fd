"""What a mutant is, and the hunt for it.

A mutant replaces a few functions while a run lasts. Caught means that some seed ends with a
violation, be it the history's, the audit's, or the code's own invariants crying out.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.simulation.scenario import Outcome, simulate

Patch = tuple[Any, str, Any]
"""Where, which name, and what it becomes."""

Trial = Callable[[int], Outcome]
"""Runs a seed."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """what: the mistake, as one would make it. trial: what is to show it."""

    name: str
    what: str
    patches: Callable[[], list[Patch]]
    trial: Trial

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Breaks the code for as long as the context lasts."""
        with contextlib.ExitStack() as stack:
            for owner, name, broken in self.patches():
                before = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
                stack.callback(setattr, owner, name, before)
                setattr(owner, name, broken)
            yield


MUTANTS: dict[str, Mutant] = {}


def mutant(
    what: str, *, trial: Trial = simulate
) -> Callable[[Callable[[], list[Patch]]], Callable[[], list[Patch]]]:
    """Registers a function that returns a mutant's patches, under the function's name."""

    def register(patches: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
        name = patches.__name__
        assert name not in MUTANTS, f"two mutants are called {name}"
        MUTANTS[name] = Mutant(name, what, patches, trial)
        return patches

    return register


@dataclass(frozen=True, slots=True)
class Verdict:
    """seeds: how many were run. violation: what the last of them showed, None: it survived."""

    name: str
    seeds: int
    violation: str | None


def hunt(victim: Mutant, seeds: range) -> Verdict:
    """Runs seeds with the mutant until one shows a violation."""
    for count, seed in enumerate(seeds, start=1):
        with victim.applied():
            outcome = victim.trial(seed)
        if outcome.violations:
            return Verdict(victim.name, count, outcome.violations[0])
    return Verdict(victim.name, len(seeds), None)
