"""Asks a store to prove that it is fit to hold Shoal: the probe run when a bucket is formatted.

It catches stores and gateways that ignore the precondition, cache a 404 or list late. It cannot
prove what happens at the edge of a quorum; docs/design/protocol.md 1.10 lists what is known there.
"""

import asyncio
from contextlib import suppress

from shoal_cluster.bucket.create import create
from shoal_cluster.bucket.envelope import EnvelopeKind, encode, put_id_of
from shoal_cluster.bucket.store import PutOutcome, Store
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import Conflict, ShoalError
from shoal_cluster.domain.ids import IdGenerator

ROUNDS = 20
RACERS = 8
DEADLINE_S = 60.0
"""For each race; a healthy bucket needs a second."""

ProbeRecord = dict[str, int | list[int]]


async def probe(
    first: Store, second: Store, *, clock: Clock, ids: IdGenerator, rounds: int = ROUNDS
) -> ProbeRecord:
    """Races creates through two handles to one bucket and checks R1 and R2 on the way.

    Each round: a get that misses, 8 racing creates, one more create of the existing key, gets and
    a listing through both handles. Everything is put under `probe/` and deleted again.

    Returns counts and milliseconds, msgpack-able, to be kept in the bucket's `cluster` object:
    rounds, racers, won (races won through each handle), create_ms_max, duration_ms.

    Raises: Conflict naming the requirement when the store is unfit; Unavailable, PermissionDenied
    or Indeterminate when it does not answer.
    """
    prefix = f"probe/{ids.hex(8)}/"
    handles = (first, second)
    won = [0, 0]
    create_ms_max = 0
    started_s = clock.monotonic_s()
    keys = [f"{prefix}{number}" for number in range(rounds + 1)]
    try:
        # Alone first: in a race against a cached 404 the losers would wait for their deadline.
        await _require_absent(handles, keys[0])
        await _put(first, keys[0], ids.put_id(), clock)
        await _require_kept(handles, keys[0], ids)
        for key in keys[1:]:
            await _require_absent(handles, key)
            race_s = clock.monotonic_s()
            winner = await _race(handles, key, clock=clock, ids=ids)
            create_ms_max = max(create_ms_max, round(1000 * (clock.monotonic_s() - race_s)))
            won[winner] += 1
            await _require_kept(handles, key, ids)
        await _require_listed(handles, prefix, keys)
    finally:
        for key in keys:
            # Of two failures the first one counts; what stays is under probe/ and tiny.
            with suppress(ShoalError):
                await first.delete(key)
    await _require_deleted(handles, keys)
    return {
        "rounds": rounds,
        "racers": RACERS,
        "won": won,
        "create_ms_max": create_ms_max,
        "duration_ms": round(1000 * (clock.monotonic_s() - started_s)),
    }


async def _race(handles: tuple[Store, Store], key: str, *, clock: Clock, ids: IdGenerator) -> int:
    """Lets 8 creates race and returns the handle (0 or 1) through which the winner went."""
    put_ids = [ids.put_id() for _ in range(RACERS)]

    others = await asyncio.gather(
        *(_put(handles[racer % 2], key, put_ids[racer], clock) for racer in range(RACERS))
    )
    winners = [racer for racer, other in enumerate(others) if other is None]
    if len(winners) != 1:
        raise _unfit(
            f"R1: {len(winners)} of {RACERS} racing creates of one key were told they won; "
            "put-if-absent is ignored or not atomic"
        )
    seen = {put_id_of(other) for other in others if other is not None}
    if seen != {put_ids[winners[0]]}:
        raise _unfit("R2: the losers of a race read back different objects")
    return winners[0] % 2


async def _put(handle: Store, key: str, put_id: bytes, clock: Clock) -> bytes | None:
    return await create(
        handle,
        key,
        encode(EnvelopeKind.PROBE, {"put_id": put_id}),
        put_id=put_id,
        read_put_id=put_id_of,
        clock=clock,
        deadline_s=clock.monotonic_s() + DEADLINE_S,
    )


async def _require_absent(handles: tuple[Store, Store], key: str) -> None:
    """Misses the key through both handles, so that a cached 404 would show later."""
    for handle in handles:
        if await handle.get(key) is not None:
            raise _unfit(f"R2: a get of {key}, never created, found an object")


async def _require_kept(handles: tuple[Store, Store], key: str, ids: IdGenerator) -> None:
    bodies = [await handle.get(key) for handle in handles]
    if None in bodies:
        raise _unfit(
            "R2: a get after a create does not see the object (a cached 404?); "
            "read-after-write consistency is required"
        )
    if bodies[0] != bodies[1]:
        raise _unfit("R2: two handles read different objects at one key")
    rival = encode(EnvelopeKind.PROBE, {"put_id": ids.put_id()})
    for handle in handles:
        if await handle.create(key, rival) is PutOutcome.CREATED:
            raise _unfit("R1: a create of an existing key succeeded; put-if-absent is ignored")
    if await handles[0].get(key) != bodies[0]:
        raise _unfit("R3: a refused create changed the object")


async def _require_listed(handles: tuple[Store, Store], prefix: str, keys: list[str]) -> None:
    for handle in handles:
        entries = await handle.list(prefix)
        if sorted(entry.key for entry in entries) != sorted(keys):
            raise _unfit(
                f"R2: a listing shows {len(entries)} objects right after {len(keys)} were created"
            )


async def _require_deleted(handles: tuple[Store, Store], keys: list[str]) -> None:
    for key in keys:
        if await handles[0].get(key) is not None:
            raise _unfit(f"delete of {key} has no effect; garbage collection needs it")


def _unfit(reason: str) -> Conflict:
    return Conflict(f"this store cannot hold Shoal: requirement {reason}")
