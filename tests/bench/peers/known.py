"""The engines by the name they are asked for. Importing this imports none of them."""

import importlib
from typing import Final

from tests.bench.peers.peer import Peer

SHOAL: Final = "shoal"
EXACT: Final = "exact"

OURS: Final = {
    SHOAL: "tests.bench.peers.shoal_cluster_peer",
    EXACT: "tests.bench.peers.exact_peer",
}
"""Run in the project's own environment."""

THEIRS: Final = {
    "pgvector": "tests.bench.peers.pgvector_peer",
    "chroma": "tests.bench.peers.chroma_peer",
    "milvus": "tests.bench.peers.milvus_peer",
    "seekdb": "tests.bench.peers.seekdb_peer",
    "qdrant-edge": "tests.bench.peers.qdrant_edge_peer",
    "zvec": "tests.bench.peers.zvec_peer",
    "lancedb": "tests.bench.peers.lancedb_peer",
}
"""Each has an environment of its own."""

ENGINES: Final = OURS | THEIRS
OF_THE_FULL_RUN: Final = (SHOAL, *THEIRS)


def adapter(name: str) -> Peer:
    """Returns the adapter of an engine, or of `module:Class`; imports what it needs."""
    module, _, class_name = ENGINES.get(name, name).partition(":")
    peer: Peer = getattr(importlib.import_module(module), class_name or "Adapter")()
    return peer


def needs_own_network(name: str) -> bool:
    """Asked outside the engine's own environment: adapters import what they wrap lazily."""
    return name in THEIRS and adapter(name).needs_own_network


def builds_of(name: str) -> int:
    """Returns how many builds an engine has to compare."""
    return len(adapter(name).builds) if name in THEIRS else 1
