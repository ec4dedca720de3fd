"""What every actor process sets up alike: links out, links in, garbage collection."""

import functools
import gc
from collections.abc import Mapping
from pathlib import Path

import ray

from shoal_cluster.actors.configuration import ClusterConfiguration
from shoal_cluster.links.address import LinkAddress, parse_address, tcp_address
from shoal_cluster.links.connection import connect
from shoal_cluster.links.handshake import shared_secret
from shoal_cluster.links.listener import Listener
from shoal_cluster.links.messages import Handler
from shoal_cluster.links.pool import LinkPool

GARBAGE_THRESHOLD = 10_000
"""Containers made and not freed before the youngest are looked through; Python's 700 are the
requests of one turn of a busy loop, all of them still needed."""


def spare_collector() -> None:
    """Tells garbage collection to leave alone what a started process keeps for ever.

    Ray, gRPC and our modules are some 100,000 objects. Looking through them took 45 ms of a core
    each time (half a second on a busy machine), every other second under a load of writes, and for
    as long nothing was served.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)


def make_pool(configuration: ClusterConfiguration, name: str) -> LinkPool:
    """Returns a pool of outgoing links that authenticate with the cluster's secret."""
    return LinkPool(functools.partial(connect, secret=configuration.secret, name=name))


async def start_listener(
    configuration: ClusterConfiguration, name: str, handlers: Mapping[str, Handler]
) -> tuple[Listener, LinkAddress]:
    """Listens for links; returns the listener and the address others reach it at."""
    listener = Listener(handlers, shared_secret(configuration.secret))
    if configuration.link_host is None:
        address = parse_address(f"unix:{_sockets(configuration) / name}")
    else:
        host = configuration.link_host or ray.util.get_node_ip_address()
        address = tcp_address(host, 0)
    return listener, await listener.listen(address)


def lane_socket_path(configuration: ClusterConfiguration, incarnation: str) -> str:
    """Returns where a coordinator's fast lanes listen on a cluster of one machine, "" otherwise."""
    if configuration.link_host is not None:
        return ""
    return str(_sockets(configuration) / f"lanes-{incarnation[:8]}")


def _sockets(configuration: ClusterConfiguration) -> Path:
    sockets = Path(configuration.run_directory) / "links"
    sockets.mkdir(parents=True, exist_ok=True)
    return sockets
