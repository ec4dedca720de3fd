"""A process that listens at the address given as argument until it is killed.

Prints the address once it listens. `hang` never answers; `pid` says which process this is.
"""

import asyncio
import os
import sys

import uvloop

from shoal_cluster.links.address import parse_address
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.messages import Reply, Request

SECRET = b"0123456789abcdef0123456789abcdef"


async def hang(request: Request) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError("an event nobody sets was set")


def pid(request: Request) -> Reply:
    return Reply(os.getpid())


async def main() -> None:
    listener = Listener({"hang": hang, "pid": pid}, shared_secret(SECRET))
    print(await listener.listen(parse_address(sys.argv[1])), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
