"""A shard server without Ray: the shard's code behind a listener, in a process of its own.

    python -m tests.bench.shard_process --bucket DIR --collection ID --listen unix:PATH

Follows the shard of a running cluster, so it searches the very same segments; it never writes.
The links' secret comes as the first line of standard input; serves until that input ends.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import uvloop

from shoal_cluster.bucket.identity import open_identity
from shoal_cluster.bucket.open import open_store
from shoal_cluster.control.catalog import CatalogLog
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.ids import CollectionId, Slot, SystemIdGenerator
from shoal_cluster.domain.observation import ReplicaState
from shoal_cluster.links.address import parse_address
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.messages import Reply, Request
from shoal_cluster.shard.building import LocalBuilds
from shoal_cluster.shard.calls import SearchCall
from shoal_cluster.shard.compute import ThreadCompute
from shoal_cluster.shard.host import ShardHost, ShardName
from shoal_cluster.shard.ports import Publisher, ShardPorts
from shoal_cluster.shard.segment_files import SegmentFiles
from tests.bench.paths import SHARD

SEARCH_THREADS = 2
_POLL_S = 0.05


class NoFollowers:
    """The Publisher of a replica that never leads."""

    def record(self, slot: Slot, body: bytes) -> None:
        raise AssertionError("the bench's shard process does not write")

    def manifest(self) -> None:
        raise AssertionError("the bench's shard process does not write")


async def serve(bucket: str, collection: CollectionId, listen: str, secret: bytes) -> None:
    """Opens the replica, prints the address it listens at, and serves until standard input ends."""
    store = open_store(bucket)
    clock, ids = SystemClock(), SystemIdGenerator()
    identity = await open_identity(store, store, clock=clock, ids=ids)
    catalog = await CatalogLog(store, clock, ids).read()
    compute = ThreadCompute(SEARCH_THREADS)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        scratch = Path(folder)
        ports = ShardPorts(
            store=store,
            clock=clock,
            ids=ids,
            compute=compute,
            search_workers=SEARCH_THREADS,
            background=compute,
            files=SegmentFiles(store, scratch / "cache", compute),
            builds=LocalBuilds(store, scratch, clock, compute),
            cluster_uuid=identity.cluster_uuid,
        )
        host = ShardHost(ports, _no_followers)
        host.open(catalog.collections[collection].schema, SHARD)
        while host.reports()[0].state is ReplicaState.LOADING:
            await asyncio.sleep(_POLL_S)
        report = host.reports()[0]
        assert report.state is ReplicaState.READY, report.reason

        async def search(request: Request) -> Reply:
            call = SearchCall.from_wire(request.header)  # type: ignore[arg-type]
            reply, vectors = await host.search(call, request.body)
            return Reply(reply.to_wire(), vectors)

        listener = Listener({SearchCall.METHOD: search}, shared_secret(secret))
        print(await listener.listen(parse_address(listen)), report.segments, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await listener.close(drain_s=1.0)
        await host.close_all()
        compute.close()
        await store.close()


def _no_followers(name: ShardName) -> Publisher:
    return NoFollowers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--collection", required=True, type=CollectionId)
    parser.add_argument("--listen", required=True, metavar="ADDRESS")
    options = parser.parse_args()
    secret = bytes.fromhex(sys.stdin.readline())
    uvloop.run(serve(options.bucket, options.collection, options.listen, secret))


if __name__ == "__main__":
    main()
