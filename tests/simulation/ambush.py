"""Where a process falls asleep, and what the others do meanwhile: most protocols break there.

A random stall hits one await in a thousand, and mostly one where sleeping does no harm. An ambush
is laid for one section of the code for a whole run: whoever comes by may fall asleep there, one at
a time, while the rest of the cluster makes haste behind its back. Section and chance are drawn from
the seed; what happens is up to the real code.
"""

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.simulation.loop import Process

Site = tuple[str, str, int]
"""File below shoal_cluster, function, line."""


class Role(enum.Enum):
    """What a process is to a shard. CLAIMANT: it is taking it over."""

    FOLLOWER = enum.auto()
    CLAIMANT = enum.auto()
    LEADER = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """functions: (file, function); an await chain with all of them passes the section.

    alone: nothing but them is on the chain, as in a task of its own. chance: of each store call in
    the section. misfortunes: what brings processes there. rival_after_s: when another replica is
    told to take the sleeper's shard over, from and to; None: never. only: who falls asleep. apart:
    the chance that servers cannot connect to each other. frozen, before: the shares of sleepers
    whose whole process stops (of others only the call is slow), and who sleep before the call takes
    effect, are drawn from them. inspectors, inspect_s: per server, and the longest pause of each;
    every strong read of theirs also makes a replica catch up. seal: after how many operations;
    silence_s: for how long all clients pause at once, in turns with bursts. Sealed after every one,
    a silent shard has nothing above its floor. sleep_s: from and to; a takeover, a seal and a round
    of garbage collection take about a second. calm_s: between two misfortunes, on average. weight:
    how often it is drawn.
    """

    name: str
    functions: frozenset[tuple[str, str]]
    chance: float
    alone: bool = False
    misfortunes: Sequence[str] = ()
    rival_after_s: tuple[float, float] | None = None
    only: Role | None = None
    apart: float = 0.7
    frozen: Sequence[float] = (0.0, 0.5, 1.0)
    before: Sequence[float] = (0.3, 1.0)
    inspectors: int = 2
    inspect_s: float = 0.6
    seal: Sequence[int] = (1, 6, 6)
    silence_s: Sequence[float] = (0.0, 1.5)
    sleep_s: tuple[float, float] = (1.0, 4.0)
    calm_s: Sequence[float] = (0.5, 1.5)
    weight: int = 1


_PUT = ("bucket/create.py", "_put_until_resolved")

SECTIONS: Sequence[Section] = (
    Section(
        name="claiming an epoch",
        functions=frozenset({("shard/takeover.py", "_claim_epoch"), _PUT}),
        chance=0.5,
        misfortunes=("forced takeover",),
        rival_after_s=(0.0, 0.1),
    ),
    Section(
        name="replaying",
        functions=frozenset({("wal/log.py", "read")}),
        alone=True,
        chance=0.4,
        misfortunes=("takeovers in a row",),
        before=(0.0, 0.3),
        rival_after_s=(0.0, 1.0),
        only=Role.CLAIMANT,
        apart=1.0,
        inspectors=0,
        seal=(1,),
        silence_s=(1.5,),
        sleep_s=(2.5, 5.0),
        weight=3,
    ),
    Section(
        name="fencing",
        functions=frozenset({("shard/takeover.py", "_fence"), _PUT}),
        chance=0.5,
        misfortunes=("forced takeover",),
        rival_after_s=(0.0, 2.0),
    ),
    Section(
        name="appending",
        functions=frozenset({("shard/primary.py", "_append"), _PUT}),
        chance=0.1,
        rival_after_s=(0.0, 0.1),
        frozen=(0.0, 0.0, 0.5),
        before=(0.0, 0.3),
        inspectors=1,
        inspect_s=4.0,
        weight=2,
    ),
    Section(
        name="probing",
        functions=frozenset({("shard/replica.py", "_run_probe")}),
        chance=0.1,
        misfortunes=("replica closed", "replica closed", "forced takeover"),
    ),
    Section(
        name="following",
        functions=frozenset({("shard/replica.py", "_next_record")}),
        chance=0.2,
        only=Role.FOLLOWER,
        apart=1.0,
        frozen=(0.0, 0.0, 0.5),
    ),
    Section(
        name="committing a manifest",
        functions=frozenset({("shard/sealing.py", "_commit"), _PUT}),
        chance=0.2,
        rival_after_s=(0.0, 1.0),
    ),
    Section(
        name="collecting garbage",
        functions=frozenset({("shard/garbage.py", "collect")}),
        chance=0.1,
        rival_after_s=(0.0, 1.0),
    ),
    Section(
        name="changing the catalog",
        functions=frozenset({("control/catalog.py", "update"), _PUT}),
        chance=0.5,
        misfortunes=("second controller", "collection comes and goes"),
        calm_s=(3.0, 6.0),
    ),
)


class Ambush:
    """One run's. sleeper: who sleeps in it now.

    on_sleep: called when somebody falls asleep; role_of: what a process is to a shard; both of a
    process and a key of the shard.
    """

    def __init__(self, rng: random.Random) -> None:
        self.section = rng.choices(SECTIONS, [section.weight for section in SECTIONS])[0]
        self.apart = rng.random() < self.section.apart
        self.sleeper: Process | None = None
        self.on_sleep: Callable[[Process, str], None] = lambda process, key: None
        self.role_of: Callable[[Process, str], Role] = lambda process, key: Role.FOLLOWER
        self._frozen_share = rng.choice(self.section.frozen)
        self._before_share = rng.choice(self.section.before)
        self.seal = rng.choice(self.section.seal)
        self.silence_s = rng.choice(self.section.silence_s)
        self._rng = rng

    def catches(self, process: Process, key: str, chain: Sequence[Site]) -> bool:
        """Says whether this store call, with this await chain, falls asleep."""
        section = self.section
        if self.sleeper is not None:
            return False
        passed = {site[:2] for site in chain}
        if not (passed == section.functions if section.alone else section.functions <= passed):
            return False
        if section.only is not None and self.role_of(process, key) is not section.only:
            return False
        return self._rng.random() < section.chance

    def draw_sleep(self) -> tuple[float, bool, bool]:
        """Returns for how long, whether before the call takes effect, and whether all of the
        process sleeps or only this call.
        """
        shortest_s, longest_s = self.section.sleep_s
        sleep_s = shortest_s + (longest_s - shortest_s) * self._rng.random()
        before = self._rng.random() < self._before_share
        return sleep_s, before, self._rng.random() < self._frozen_share
