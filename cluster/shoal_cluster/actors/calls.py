"""Ray calls with a deadline of our own, whose errors come back as ours."""

import asyncio
from typing import Any

from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from shoal_cluster.domain.errors import NotFound, ShoalError, Unavailable


async def bounded(reference: Any, timeout_s: float, whom: str) -> Any:
    """Awaits a Ray call, for so long; its errors come back as ours.

    Raises: NotFound when the actor is dead for good; Unavailable when it does not answer; the
    ShoalError that the method raised.
    """
    try:
        return await asyncio.wait_for(asyncio.shield(_as_future(reference)), timeout_s)
    except (TimeoutError, GetTimeoutError) as error:
        raise Unavailable(f"{whom} did not answer within {timeout_s:g} s") from error
    except ActorDiedError as error:
        raise NotFound(f"{whom} is dead: {str(error).splitlines()[0]}") from error
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ShoalError):
            raise cause from None
        raise Unavailable(f"{whom} could not be called: {str(error).splitlines()[0]}") from error


def _as_future(reference: Any) -> "asyncio.Future[Any]":
    future: asyncio.Future[Any] = asyncio.ensure_future(reference)
    return future
