"""What every actor of a cluster is told when it starts; picklable, the same for all."""

from dataclasses import dataclass, field
from typing import Any

from shoal_cluster.domain.ids import ServerId

NAMESPACE = "shoal"
CONTROLLER = "controller"
COORDINATOR = "coordinator"


def coordinator_names(count: int) -> list[str]:
    """Returns the names of a cluster's coordinators."""
    return [COORDINATOR] + [f"{COORDINATOR}-{number}" for number in range(2, count + 1)]


def environment(*, niceness: int = 0) -> dict[str, Any]:
    """Returns the runtime environment of an actor's process.

    niceness: added to that of Ray itself. Left alone, Ray gives every worker 15, and then its own
    daemons, and every process that is just starting, take the cores from those that serve.
    """
    return {
        "env_vars": {
            "OMP_NUM_THREADS": "1",
            # A build that uses several threads shares its cores: one that waits must not spin.
            # 100,000 x 384 on two busy cores took 20 s of processor time spinning, 4.7 s without.
            "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_worker_niceness": str(niceness),
        }
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfiguration:
    """cluster: short name that prefixes actor names, so that clusters can share a Ray.

    bucket: directory or URL. run_directory: sockets, caches and scratch of this cluster on every
    node; short, because socket paths may have 107 bytes. link_host: None for Unix sockets (one
    node), else the interface to listen on, "" meaning the node's own address. secret: shared by all
    links of the cluster. servers: every shard server. grpc_host, grpc_port: where coordinators
    listen; coordinators: how many. metrics_port: of the controller, at the same host; None: none.
    """

    cluster: str
    incarnation: str
    cluster_uuid: bytes
    bucket: str
    run_directory: str
    link_host: str | None
    secret: bytes = field(repr=False)
    servers: tuple[ServerId, ...]
    search_threads: int
    coordinators: int
    grpc_host: str
    grpc_port: int
    metrics_port: int | None = None

    def actor_name(self, name: str) -> str:
        """Returns the name of an actor within Ray's namespace."""
        return f"{self.cluster}:{name}"
