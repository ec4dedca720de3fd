"""Ray calls with a deadline of our own, whose errors come back as ours."""

import asyncio
from typing import Any

from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from shoal_cluster.domain.errors import Indeterminate, NotFound, Outcome, ShoalError, Unavailable


async def bounded(
    reference: Any, timeout_s: float, whom: str, *, on_lost: Outcome = Outcome.NOT_APPLIED
) -> Any:
    """Awaits a Ray call, for so long; its errors come back as ours.

    on_lost: what a call without an answer means. Ray may run a method although it reports an error.

    Raises: NotFound when the actor is dead for good; Unavailable when it does not answer, or
    Indeterminate where that may mean it was applied; the ShoalError that the method raised.
    """
    lost = Unavailable if on_lost is Outcome.NOT_APPLIED else Indeterminate
    try:
        # Not wait_for: Python 3.11's loses a cancellation that meets the result.
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(_as_future(reference))
    except (TimeoutError, GetTimeoutError) as error:
        raise lost(f"{whom} did not answer within {timeout_s:g} s") from error
    except ActorDiedError as error:
        raise NotFound(f"{whom} is dead: {str(error).splitlines()[0]}") from error
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ShoalError):
            raise cause from None
        raise lost(f"{whom} could not be called: {str(error).splitlines()[0]}") from error


def _as_future(reference: Any) -> "asyncio.Future[Any]":
    future: asyncio.Future[Any] = asyncio.ensure_future(reference)
    return future
