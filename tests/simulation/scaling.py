"""What a run is given instead of what production has: small limits, files in memory."""

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal_cluster.control import catalog
from shoal_cluster.domain import limits
from shoal_cluster.shard import deletions, garbage, sealing

_MEMORY = Path("/dev/shm")
"""Linux's file system in memory: a run makes thousands of small files that nobody keeps."""


@contextmanager
def scaled_limits(
    rng: random.Random, memory: random.Random, *, hurried: bool, seal: int | None = None
) -> Iterator[None]:
    """Makes everything that is bounded small, for the run; as small as can be when `hurried`.

    memory: draws how much a shard remembers of answered requests. seal: operations after which a
    memtable is sealed; None: drawn.
    """
    clients = memory.choice((1, 2, 3, 1024))
    if seal is None:
        seal = 6 if hurried else rng.choice((6, 15, 40))
    scaled: list[tuple[Any, str, float]] = [
        (limits, "SEAL_OPERATIONS", seal),
        (limits, "MEMTABLE_OPERATIONS_MAX", max(12, seal * rng.choice((2, 8)))),
        (limits, "COMPACTION_FAN_IN", rng.choice((2, 3))),
        (limits, "WAL_RECORD_OPS_MAX", rng.choice((4, 50))),
        (limits, "WAL_REPLAY_WINDOW", rng.choice((1, 3, 16))),
        (sealing, "SEAL_SLOTS", rng.choice((10, 100))),
        (garbage, "GRACE_S", 0.0 if hurried else rng.choice((0.0, 2.0))),
        (garbage, "ROUND_S", 0.3 if hurried else rng.choice((0.5, 5.0))),
        (deletions, "ENTRIES_KEPT", 3),
        (garbage, "MANIFESTS_KEPT", 1 if hurried else rng.choice((1, 3))),
        (catalog, "VERSIONS_KEPT", rng.choice((2, 20))),
        (limits, "DEDUP_CLIENTS_MAX", clients),
        (limits, "DEDUP_REQUESTS_PER_CLIENT_MAX", memory.choice((2, 8, 512))),
        (limits, "DEDUP_REQUESTS_MAX", clients * memory.choice((1, 2, 16))),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in scaled]
    try:
        for module, name, value in scaled:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Makes a directory for one run, in memory where that is possible."""
    scratch = Path(
        tempfile.mkdtemp(prefix="shoal-simulation-", dir=_MEMORY if _MEMORY.is_dir() else None)
    )
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
