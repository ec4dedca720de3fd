"""Runs the parts of a write on their shards, and says which of them were applied.

A write to several shards is not atomic: each part is, on its own. So no part is cancelled because
another failed, and an error names the shards that applied their part and those that may have.
"""

import asyncio
import re
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from shoal_cluster.domain.errors import (
    Conflict,
    Indeterminate,
    Outcome,
    Overloaded,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.ingest.primary_calls import PrimaryCalls
from shoal_cluster.ingest.route import Part
from shoal_cluster.shard.calls import WriteReply

T = TypeVar("T")

_RETRYABLE = (Unavailable, Overloaded, Indeterminate)
"""Kinds after which the same request may be sent again, and then completes what is missing."""

_POSITION = re.compile(r"\[(\d+)\]")


async def write_parts(
    parts: Sequence[Part], schema: CollectionSchema, calls: PrimaryCalls, *, deadline_s: float
) -> list[WriteReply]:
    """Returns the reply of each part, in their order.

    Raises: the error of the only part; else an error that covers all parts (`combined_failure`).
    """
    if len(parts) == 1:
        return [await _write_part(parts[0], schema, calls, deadline_s)]
    return await each_shard(
        {part.call.shard: _write_part(part, schema, calls, deadline_s) for part in parts}
    )


async def each_shard(work: Mapping[ShardNumber, Coroutine[Any, Any, T]]) -> list[T]:
    """Runs one coroutine per shard side by side, all of them to their end, and returns the results.

    Raises: one error that covers all shards (`combined_failure`).
    """
    tasks = {shard: asyncio.ensure_future(coroutine) for shard, coroutine in work.items()}
    try:
        if tasks:
            await asyncio.wait(tasks.values())
    finally:
        # Only when we are cancelled ourselves is anything still running here.
        for task in tasks.values():
            if not task.cancel() and not task.cancelled():
                task.exception()  # noted, so that asyncio does not complain
    failed: dict[ShardNumber, ShoalError] = {}
    for shard, task in tasks.items():
        error = task.exception()
        if isinstance(error, ShoalError):
            failed[shard] = error
        elif error is not None:
            raise error
    if failed:
        raise combined_failure([shard for shard in tasks if shard not in failed], failed)
    return [task.result() for task in tasks.values()]


def combined_failure(
    applied: Sequence[ShardNumber], failed: dict[ShardNumber, ShoalError]
) -> ShoalError:
    """Returns one error for a write of which some parts failed.

    Nothing applied anywhere: the first error as it is. Otherwise its outcome is MAYBE_APPLIED; its
    kind is Indeterminate when sending the same request again can complete it, else that of the
    first error which cannot be retried.
    """
    maybe = [s for s, error in failed.items() if error.outcome is Outcome.MAYBE_APPLIED]
    shard, first = next(
        ((s, error) for s, error in failed.items() if not isinstance(error, _RETRYABLE)),
        next(iter(failed.items())),
    )
    if not applied and not maybe:
        return first
    kind = Indeterminate if isinstance(first, _RETRYABLE) else type(first)
    refused = [s for s in failed if s not in maybe]
    fate = [
        f"{verb} shard {_listed(shards)}"
        for verb, shards in (
            ("applied on", applied),
            ("maybe applied on", maybe),
            ("not applied on", refused),
        )
        if shards
    ]
    return kind(
        f"{'; '.join(fate)}; shard {shard} said: {first.message}",
        field=first.field,
        limit=first.limit,
        retry_after_ms=first.retry_after_ms,
        outcome=Outcome.MAYBE_APPLIED,
    )


async def _write_part(
    part: Part, schema: CollectionSchema, calls: PrimaryCalls, deadline_s: float
) -> WriteReply:
    try:
        return await calls.write(part.call, schema, deadline_s=deadline_s)
    except Conflict as error:
        # The shard counts within its part; the caller counts within the request.
        position = _POSITION.search(error.field or "")
        if position is not None and int(position[1]) < len(part.rows):
            error.field = f"conditions[{part.rows[int(position[1])]}]"
        raise


def _listed(shards: Iterable[ShardNumber]) -> str:
    return ", ".join(str(shard) for shard in sorted(shards))
