"""Every place where the cluster waits for its bucket, and a crash at each of them.

The places are read from the source: each `await` of a call on a port to the bucket (`store`, `wal`,
`manifests`, …) or of the put primitive. A crash point is a place and a side: `before`, the call
never leaves; `after`, it took effect and the answer never came. At run time a store call is known
by the chain of awaits above it, so one crash hits every place on the chain.
"""

import ast
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import shoal_cluster
from tests.simulation.bucket import CrashPlan, Site
from tests.simulation.scenario import Outcome, simulate

SOURCES = ("wal", "manifest", "shard", "control", "bucket/create.py")
PORTS = frozenset(
    {"store", "_store", "wal", "manifests", "versions", "_versions", "_catalog_log", "files"}
)
PRIMITIVES = frozenset({"create", "create_file_once", "attempt", "read_back"})

OUT_OF_REACH: Mapping[tuple[str, str], str] = {
    ("control/catalog.py", "read"): "asked by bootstrap.py before a cluster runs",
    ("shard/segment_files.py", "_require_present"): "only for files that fail their checksum",
    ("shard/garbage_survey.py", "*"): "`shoal check` looks at a bucket that nobody serves",
    ("shard/deletions.py", "read_deletions"): "`shoal check` looks at a bucket that nobody serves",
    ("shard/checking.py", "*"): "`shoal check` looks at a bucket that nobody serves",
    ("shard/segment_checking.py", "*"): "`shoal check` looks at a bucket that nobody serves",
    ("shard/load_objects.py", "*"): "the simulation does not load in bulk yet",
    ("shard/scrubbing.py", "*"): "the scrubber only reads; it is not part of the simulation yet",
    ("shard/paced_reading.py", "*"): "as the scrubber",
    ("shard/object_scrubbing.py", "*"): "as the scrubber",
    ("shard/copying.py", "*"): "only after the scrubber has found something",
}
"""Places that no simulated process comes to, and why. `*`: the whole file."""

ATTEMPTS_MAX = 6
"""Crashes tried at one point before it counts as missed."""


class Place(NamedTuple):
    """One await in the source. Its lines are those of the whole expression."""

    file: str
    function: str
    first_line: int
    last_line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.first_line} {self.function}"


class CrashPoint(NamedTuple):
    place: Place
    after: bool

    def __str__(self) -> str:
        return f"{'after' if self.after else 'before'} {self.place}"


def places() -> list[Place]:
    """Returns every place of the source, in order, but those out of reach."""
    root = Path(shoal_cluster.__file__).parent
    found: list[Place] = []
    for source in SOURCES:
        paths = [root / source] if source.endswith(".py") else sorted((root / source).glob("*.py"))
        for path in paths:
            name = path.relative_to(root).as_posix()
            found += _places_of(ast.parse(path.read_text()), name)
    return [
        place
        for place in found
        if (place.file, place.function) not in OUT_OF_REACH
        and (place.file, "*") not in OUT_OF_REACH
    ]


def _places_of(tree: ast.AST, file: str, function: str = "") -> Iterator[Place]:
    for node in ast.iter_child_nodes(tree):
        inside = function
        if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
            inside = node.name
        if isinstance(node, ast.Await) and _waits_for_bucket(node.value):
            yield Place(file, inside, node.lineno, node.end_lineno or node.lineno)
        yield from _places_of(node, file, inside)


def _waits_for_bucket(awaited: ast.expr) -> bool:
    if not isinstance(awaited, ast.Call):
        return False
    called = awaited.func
    if isinstance(called, ast.Name):
        return called.id in PRIMITIVES
    if isinstance(called, ast.Attribute):
        owner = called.value
        if isinstance(owner, ast.Attribute):
            return owner.attr in PORTS
        return isinstance(owner, ast.Name) and owner.id in PORTS
    return False


def places_on(chain: tuple[Site, ...], known: Mapping[str, list[Place]]) -> list[Place]:
    """Returns the places that an await chain passes."""
    found = []
    for file, _, line in chain:
        for place in known.get(file, ()):
            if place.first_line <= line <= place.last_line:
                found.append(place)
    return found


def by_file(all_places: list[Place]) -> dict[str, list[Place]]:
    known: dict[str, list[Place]] = {}
    for place in all_places:
        known.setdefault(place.file, []).append(place)
    return known


@dataclass(slots=True)
class Sweep:
    """Crashes at every point, one run a crash. `step` until `missing` is empty, or time is up."""

    seed: int
    points: list[CrashPoint] = field(init=False)
    hit: set[CrashPoint] = field(default_factory=set)
    known: dict[str, list[Place]] = field(init=False)
    where: dict[Place, list[tuple[int, tuple[Site, ...], int]]] = field(default_factory=dict)
    attempts: dict[CrashPoint, int] = field(default_factory=dict)
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        found = places()
        self.points = [CrashPoint(place, after) for place in found for after in (False, True)]
        self.known = by_file(found)
        self._rng = random.Random(f"sweep {self.seed}")

    def missing(self) -> list[CrashPoint]:
        return [point for point in self.points if point not in self.hit]

    def learn(self, outcome: Outcome) -> None:
        """Takes from a run which places it passed, so that crashes can be put there."""
        for chain, calls in outcome.chains.items():
            for place in places_on(chain, self.known):
                entries = self.where.setdefault(place, [])
                if len(entries) < 50:
                    entries.append((outcome.seed, chain, calls))

    def step(self) -> tuple[Outcome, str] | None:
        """Crashes once at a point that was not hit yet; None when there is none that is known.

        Returns the outcome and how to see it again.
        """
        waiting = [
            point
            for point in self.missing()
            if point.place in self.where and self.attempts.get(point, 0) < ATTEMPTS_MAX
        ]
        if not waiting:
            return None
        point = min(waiting, key=lambda one: (self.attempts.get(one, 0), one))
        self.attempts[point] = self.attempts.get(point, 0) + 1
        return self.crash_at(point)

    def again(self) -> tuple[Outcome, str]:
        """Crashes at a random point that was hit already, at another moment."""
        known = [point for point in self.points if point.place in self.where]
        return self.crash_at(self._rng.choice(known))

    def crash_at(self, point: CrashPoint) -> tuple[Outcome, str]:
        seed, chain, calls = self._rng.choice(self.where[point.place])
        occurrence = self._rng.randrange(calls)
        plan = CrashPlan(chain, occurrence, after=point.after)
        how = f"crash {point}: --replay {seed} --crash '{plan.show()}'"
        outcome = simulate(seed, crash=plan)
        for struck, after in outcome.hit:
            self.hit |= {CrashPoint(place, after) for place in places_on(struck, self.known)}
        return outcome, how
