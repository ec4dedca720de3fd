"""Several coordinators on one port: clients are dealt out, and one that dies takes nobody along."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import shoal
from chaos import cluster as clusters
from shoal import connection

CLIENTS = 24
"""All at one of two coordinators: once in eight million runs."""


def coordinators_of(client: shoal.Client) -> dict[str, int]:
    return {actor.id: actor.pid for actor in client.status().actors if actor.kind == "coordinator"}


def test_clients_are_dealt_out_and_survive_a_killed_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in processes of their own: gRPC shares one connection among the channels of a process.
    options = (*connection.CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    monkeypatch.setattr(connection, "CHANNEL_OPTIONS", options)
    with clusters.running(tmp_path, servers=1, coordinators=2) as cluster:
        clients = [shoal.Client(cluster.grpc_address) for _ in range(CLIENTS)]
        try:
            collection = clients[0].create_collection("docs", dimension=2)
            collection.upsert(ids=["a", "b"], vectors=np.eye(2, dtype=np.float32))
            pids = coordinators_of(clients[0])
            assert set(pids) == {"coordinator", "coordinator-2"}

            def search_with_all() -> set[str]:
                """Returns where the clients' lanes lead."""
                for client in clients:
                    found = client.collection("docs").search([1.0, 0.0], k=1)
                    assert found.ids == ["a"]
                lanes = [client._connection._route().lanes for client in clients]
                return {lane._offer.socket_path for lane in lanes if lane and lane._offer}

            # A coordinator that has not heard of the collection yet says so; both do in a moment.
            for client in clients:
                clusters.wait_until(
                    lambda client=client: [c.name for c in client.list_collections()],  # type: ignore[misc]
                    timeout_s=10.0,
                    what="every coordinator knows the collection",
                )
            before = search_with_all()
            assert len(before) == 2

            os.kill(pids["coordinator-2"], signal.SIGKILL)
            search_with_all()
            clusters.wait_until(
                lambda: (
                    coordinators_of(clients[0])["coordinator-2"] not in (0, pids["coordinator-2"])
                ),
                timeout_s=30.0,
                what="the killed coordinator is back",
            )
            assert coordinators_of(clients[0])["coordinator"] == pids["coordinator"]
            search_with_all()
        finally:
            for client in clients:
                client.close()
