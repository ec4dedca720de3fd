"""A store that misbehaves on purpose, the way real ones do, from a seed.

Legal faults are those the protocol must live through: replies lost, puts that land late, refusals,
slowness. Illegal ones (a damaged or short read, a stale listing) break R2 or the medium; they test
that damage is noticed and that a weak store is refused.

One random number decides each operation, so a run is reproducible if its event loop is.
"""

import enum
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shoal_cluster.bucket.create import Uniform
from shoal_cluster.bucket.store import ObjectEntry, PutOutcome, Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Unavailable

LISTINGS_REMEMBERED_MAX = 64
"""Prefixes whose last listing is kept to be served again as a stale one."""


class Fault(enum.Enum):
    """What befell one operation; the names are FaultPlan's fields."""

    OK = "ok"
    LOST_REPLY = "lost_reply"
    """create, delete: applied, and the caller learns nothing."""
    NOT_APPLIED = "not_applied"
    """create, delete: not applied, and the caller learns nothing."""
    APPLIED_LATE = "applied_late"
    """create: no answer now; the put lands some operations later, if the key is still absent."""
    CONFLICT_NOT_STORED = "conflict_not_stored"
    """create: S3's 409, which obstore reports as "already exists" although nothing is stored."""
    UNAVAILABLE = "unavailable"
    """all: the first 503 of a burst."""
    SLOW = "slow"
    """all: the operation waits first."""
    NO_SPACE = "no_space"
    """create: refused for certain, Unavailable."""
    TORN_READ = "torn_read"
    """get: fewer bytes than there are."""
    BIT_FLIP = "bit_flip"
    """get: one bit is wrong."""
    STALE_LIST = "stale_list"
    """list: the previous listing of the same prefix again."""


_PUT_FAULTS = (
    Fault.LOST_REPLY,
    Fault.NOT_APPLIED,
    Fault.APPLIED_LATE,
    Fault.CONFLICT_NOT_STORED,
    Fault.UNAVAILABLE,
    Fault.SLOW,
    Fault.NO_SPACE,
)
_GET_FAULTS = (Fault.UNAVAILABLE, Fault.SLOW, Fault.TORN_READ, Fault.BIT_FLIP)
_LIST_FAULTS = (Fault.UNAVAILABLE, Fault.SLOW, Fault.STALE_LIST)
_DELETE_FAULTS = (Fault.LOST_REPLY, Fault.NOT_APPLIED, Fault.UNAVAILABLE, Fault.SLOW)
LEGAL_FAULTS = _PUT_FAULTS


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """Probability of each fault per operation it can befall; at most 1 in sum for a put.

    burst_operations: length of a burst of 503. late_operations_max: operations on this store
    before a late put lands at the latest. slow_s_max: longest wait of a slow operation.
    """

    lost_reply: float = 0.0
    not_applied: float = 0.0
    applied_late: float = 0.0
    conflict_not_stored: float = 0.0
    unavailable: float = 0.0
    slow: float = 0.0
    no_space: float = 0.0
    torn_read: float = 0.0
    bit_flip: float = 0.0
    stale_list: float = 0.0
    burst_operations: int = 3
    late_operations_max: int = 20
    slow_s_max: float = 1.0

    def __post_init__(self) -> None:
        for faults in (_PUT_FAULTS, _GET_FAULTS, _LIST_FAULTS, _DELETE_FAULTS):
            odds = [self.probability(fault) for fault in faults]
            assert min(odds) >= 0.0 and sum(odds) <= 1.0, f"fault probabilities {odds}"

    def probability(self, fault: Fault) -> float:
        return float(getattr(self, fault.value))


NO_FAULTS = FaultPlan()


def draw_legal_plan(rng: Uniform) -> FaultPlan:
    """Returns a random plan of legal faults; one in three has a single kind of them.

    A mixture hides what one fault alone would show, and the other way round (FoundationDB's BUGGIFY
    draws per run for the same reason).
    """
    weights = {fault: rng.random() ** 2 for fault in LEGAL_FAULTS}
    if rng.random() < 1 / 3:
        only = LEGAL_FAULTS[int(rng.random() * len(LEGAL_FAULTS))]
        weights = {only: 1.0}
    rate = 0.6 * rng.random() / max(sum(weights.values()), 1e-9)
    odds = {fault: weights.get(fault, 0.0) * rate for fault in LEGAL_FAULTS}
    return FaultPlan(
        lost_reply=odds[Fault.LOST_REPLY],
        not_applied=odds[Fault.NOT_APPLIED],
        applied_late=odds[Fault.APPLIED_LATE],
        conflict_not_stored=odds[Fault.CONFLICT_NOT_STORED],
        unavailable=odds[Fault.UNAVAILABLE],
        slow=odds[Fault.SLOW],
        no_space=odds[Fault.NO_SPACE],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _LatePut:
    due: int
    key: str
    body: bytes


class FaultStore:
    """Wraps a store. `counts` says how many operations met which fault.

    One instance per simulated process: late puts belong to the network, so they still land after
    the process died, provided somebody calls `settle`.
    """

    def __init__(
        self, inner: Store, *, plan: FaultPlan = NO_FAULTS, rng: Uniform, clock: Clock
    ) -> None:
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self._inner = inner
        self._rng = rng
        self._clock = clock
        self._operations = 0
        self._burst_left = 0
        self._late: list[_LatePut] = []
        self._listings: dict[str, list[ObjectEntry]] = {}

    async def create(self, key: str, body: bytes) -> PutOutcome:
        fault = await self._begin(_PUT_FAULTS)
        if fault is Fault.NO_SPACE:
            raise Unavailable(f"no space left to put {key} (injected)")
        if fault is Fault.APPLIED_LATE:
            wait = 1 + int(self._rng.random() * self.plan.late_operations_max)
            self._late.append(_LatePut(due=self._operations + wait, key=key, body=body))
        elif fault in (Fault.OK, Fault.SLOW, Fault.LOST_REPLY):
            outcome = await self._inner.create(key, body)
            if fault is not Fault.LOST_REPLY:
                return outcome
        return PutOutcome.UNRESOLVED

    async def create_file(self, key: str, path: Path) -> PutOutcome:
        return await self.create(key, path.read_bytes())

    async def get(self, key: str) -> bytes | None:
        fault = await self._begin(_GET_FAULTS)
        self._refuse_if_unavailable(fault, key)
        return self._damaged(fault, await self._inner.get(key))

    async def get_range(self, key: str, start: int, length: int) -> bytes | None:
        fault = await self._begin(_GET_FAULTS)
        self._refuse_if_unavailable(fault, key)
        return self._damaged(fault, await self._inner.get_range(key, start, length))

    async def list(self, prefix: str) -> list[ObjectEntry]:
        fault = await self._begin(_LIST_FAULTS)
        self._refuse_if_unavailable(fault, prefix)
        if fault is Fault.STALE_LIST and prefix in self._listings:
            return [*self._listings[prefix]]
        entries = await self._inner.list(prefix)
        if prefix in self._listings or len(self._listings) < LISTINGS_REMEMBERED_MAX:
            self._listings[prefix] = [*entries]
        return entries

    async def delete(self, key: str) -> None:
        fault = await self._begin(_DELETE_FAULTS)
        self._refuse_if_unavailable(fault, key)
        if fault is not Fault.NOT_APPLIED:
            await self._inner.delete(key)
        if fault in (Fault.NOT_APPLIED, Fault.LOST_REPLY):
            raise Unavailable(f"no reply to the delete of {key} (injected)")

    async def make_durable(self, prefix: str) -> None:
        await self._inner.make_durable(prefix)

    def local_path(self, key: str) -> Path | None:
        return self._inner.local_path(key)

    async def settle(self) -> None:
        """Lands every put still under way."""
        late, self._late = self._late, []
        for put in late:
            await self._inner.create(put.key, put.body)

    async def close(self) -> None:
        await self.settle()
        await self._inner.close()

    async def _begin(self, faults: tuple[Fault, ...]) -> Fault:
        """Draws what befalls this operation, lands late puts that are due, and waits if slow."""
        self._operations += 1
        fault = self._draw(faults)
        self.counts[fault.value] += 1
        due = [put for put in self._late if put.due <= self._operations]
        self._late = [put for put in self._late if put.due > self._operations]
        for put in due:
            await self._inner.create(put.key, put.body)
        if fault is Fault.SLOW:
            await self._clock.sleep(self._rng.random() * self.plan.slow_s_max)
        return fault

    def _draw(self, faults: tuple[Fault, ...]) -> Fault:
        point = self._rng.random()
        if self._burst_left > 0:
            self._burst_left -= 1
            return Fault.UNAVAILABLE
        for fault in faults:
            point -= self.plan.probability(fault)
            if point < 0.0:
                if fault is Fault.UNAVAILABLE:
                    self._burst_left = self.plan.burst_operations - 1
                return fault
        return Fault.OK

    def _refuse_if_unavailable(self, fault: Fault, key: str) -> None:
        if fault is Fault.UNAVAILABLE:
            raise Unavailable(f"the bucket asks to slow down: {key} (injected)")

    def _damaged(self, fault: Fault, body: bytes | None) -> bytes | None:
        if not body or fault not in (Fault.TORN_READ, Fault.BIT_FLIP):
            return body
        at = int(self._rng.random() * len(body))
        if fault is Fault.TORN_READ:
            return body[:at]
        bit = 1 << int(self._rng.random() * 8)
        return body[:at] + bytes([body[at] ^ bit]) + body[at + 1 :]
