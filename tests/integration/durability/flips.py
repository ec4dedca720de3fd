"""Flips one bit of one byte at a time of a small bucket, and says who noticed and what was shown.

    python -m tests.integration.durability.flips            every byte of every object
    python -m tests.integration.durability.flips --stride 9 every ninth

Per position, three looks: a server that starts (`load`), a server that has the shard open
(`scrub`), and the offline check (`check`). A position passes when at least one of them names the
object, no look shows anything but the right rows, and no error but Corrupt comes up.
"""

import argparse
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import structlog

from shoal_cluster.bucket.identity import open_identity
from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.control.catalog import CatalogLog, CollectionRecord
from shoal_cluster.domain.errors import Corrupt, ShoalError
from shoal_cluster.domain.keys import CATALOG_PREFIX, CLUSTER_KEY
from shoal_cluster.index import cost_model
from shoal_cluster.index.cost_model import CostModel, FamilyChoice
from shoal_cluster.index.families import CodeShape, Family
from shoal_cluster.shard import rows, search
from shoal_cluster.shard.checking import check_bucket
from shoal_cluster.shard.replica import Replica
from shoal_cluster.shard.scrubbing import Scrubber
from tests.unit.shard import nodes
from tests.unit.shard.in_place import InPlaceStore, flip
from tests.unit.shard.nodes import (
    SCHEMA,
    LoopClock,
    Node,
    SeededIds,
    Shard,
    colored,
    delete,
    run,
    upsert,
    vector,
)

ROWS = 18
"""Just enough for codes of 16 centroids, so that every byte of every file takes its turn."""

Shown = tuple[Any, ...]


@dataclass(slots=True)
class Findings:
    """Per class of object: positions tried, how many each look noticed, and what went wrong."""

    positions: Counter[str] = field(default_factory=Counter)
    noticed: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def table(self) -> str:
        header = ("object", "bytes", "load refused", "load", "scrub", "check", "cache")
        lines = ["{:<18} {:>7} {:>13} {:>7} {:>7} {:>7} {:>7}".format(*header)]
        for name in sorted(self.positions):
            looks = [self.noticed[name, look] for look in ("load", "scrub", "check", "cache")]
            lines.append(
                f"{name:<18} {self.positions[name]:>7} {self.refused[name]:>13} "
                + " ".join(f"{count:>7}" for count in looks)
            )
        total = self.positions.total()
        return "\n".join([*lines, f"{total} positions, {len(self.wrong)} wrong", *self.wrong[:20]])


def class_of(key: str, body: bytes) -> str:
    """Returns the class of an object: what a row of the table is about."""
    if "/wal/" in key:
        return "fence" if b"\xa4kind\xa5fence" in body else "log data"
    if "/seg/" in key:
        return key.rpartition("/")[2].partition("-")[0]
    if key.startswith(CATALOG_PREFIX):
        return "catalog" if "/v/" in key else "catalog floor"
    for part, name in (("/man/", "manifest"), ("/floor/", "manifest floor"), ("/gc/", "deletion")):
        if part in key:
            return name
    assert key == CLUSTER_KEY, key
    return "cluster"


def shown(replica: Replica) -> Shown:
    """Returns everything a replica can be asked for."""
    snapshot = replica.state.snapshot()
    ids, places = rows.scroll(snapshot, b"", 1000, None)
    order = search.SearchOrder(
        queries=np.stack([vector(3.2), vector(90.0)]),
        k=4,
        filter=None,
        exact=False,
        recall_target=0.9,
    )
    hits = search.execute(search.prepare(replica.state, order), SCHEMA.metric)
    return (
        list(ids),
        rows.vectors_of(snapshot, places, SCHEMA.dimension).tolist(),
        list(rows.tails_of(snapshot, places)),
        list(rows.seqs_of(snapshot, places)),
        rows.count(snapshot, colored("blue")),
        (hits.ids, hits.keys.tolist()),
        replica.state.sum,
        replica.state.position,
    )


class SmallBucket:
    """A bucket with one object of every class, and what it should show."""

    def __init__(self, folder: Path, *, in_place: bool = True) -> None:
        self.folder = folder
        self.shard = Shard(folder / "build")
        self.store = InPlaceStore(folder / "bucket") if in_place else MemoryStore()
        self.shard.objects = self.store.objects
        self.expected: Shown = ()
        self._scratches = 0

    async def build(self) -> "SmallBucket":
        clock, ids = LoopClock(), SeededIds(7)
        with mock.patch("shoal_cluster.bucket.identity.probe", _unprobed):
            identity = await open_identity(self.store, self.store, clock=clock, ids=ids)
        nodes_uuid = mock.patch.object(nodes, "CLUSTER_UUID", identity.cluster_uuid)
        nodes_uuid.start()
        self._patches = [nodes_uuid]
        catalog = CatalogLog(self.store, clock, ids)
        record = CollectionRecord(schema=SCHEMA, assignment=(("server-1",),))
        await catalog.update(lambda current: current.with_record(record))
        await catalog._versions.collect(0, ids.put_id())
        await catalog.update(lambda current: current.with_record(record).without("none"))
        await catalog._versions.collect(1, ids.put_id())
        await self.shard.create()
        first = await self.shard.node(store=self.store).load()
        await first.promote()
        points = {f"p{number:02d}": float(number) for number in range(ROWS)}
        await first.write(upsert(1, points))
        await first.seal()
        await first.write(delete(2, "p01", "p07"))
        await first.seal()
        await first.crash()
        heir = await self.shard.node(store=self.store).load()
        await heir.promote()
        await heir.write(upsert(3, {"p02": 90.0, "tail": 91.0}, color="blue"))
        await heir.replica.manifests.versions.collect(1, ids.put_id())
        self.expected = shown(heir.replica)
        await heir.crash()
        return self

    def close(self) -> None:
        for patch in self._patches:
            patch.stop()

    def objects(self) -> list[str]:
        return sorted(self.store.objects)

    def node(self, scratch: Path | None = None) -> Node:
        """Makes a server that knows only the bucket."""
        self._scratches += 1
        scratch = scratch or self.folder / f"server-{self._scratches}"
        return Node(self.store, 10_000 + self._scratches, scratch, self.shard.network)


async def _unprobed(*_: object, **__: object) -> dict[str, Any]:
    return {"probed": False}


async def look_by_loading(bucket: SmallBucket, key: str) -> tuple[str, str]:
    """Starts a server; returns ("refused" | "salvaged" | "right", "") or ("wrong", why)."""
    node = bucket.node()
    try:
        await node.load()
        found = shown(node.replica)
        salvages = [node.ports.files.salvage_of(segment) for segment in node.replica.state.segments]
    except Corrupt as error:
        return ("refused", "") if key in error.message else ("wrong", f"blames {error.message}")
    finally:
        await node.crash()
        shutil.rmtree(node.ports.builds._scratch, ignore_errors=True)
    if found != bucket.expected:
        return "wrong", "other rows were shown"
    if any(salvage is not None and key in salvage.reason for salvage in salvages):
        return "salvaged", ""
    return "right", ""


async def look_by_reading_catalog(bucket: SmallBucket, key: str) -> tuple[str, str]:
    """Does what a cluster does when it starts on the bucket."""
    clock, ids = LoopClock(), SeededIds(8)
    try:
        await open_identity(bucket.store, bucket.store, clock=clock, ids=ids)
        catalog = await CatalogLog(bucket.store, clock, ids).read()
    except Corrupt as error:
        return ("refused", "") if key in error.message else ("wrong", f"blames {error.message}")
    right = [record.schema for record in catalog.collections.values()] == [SCHEMA]
    return ("right", "") if right else ("wrong", "another catalog was read")


async def look_by_scrubbing(bucket: SmallBucket, node: Node, key: str) -> bool:
    """Has the scrubber read what an open replica depends on; says whether it names the object."""
    scrubber = Scrubber(node.ports, dict, lambda *_: None)
    return any([damage.key == key async for damage in scrubber.scrub(node.replica)])


async def look_by_checking(bucket: SmallBucket, key: str) -> tuple[bool, str]:
    """Returns whether `shoal check` names the object, and whom it accuses besides."""
    report = await check_bucket(bucket.store, deep=False, progress=lambda *_: None)
    accused = {problem.key for problem in report.problems}
    return key in accused, ", ".join(sorted(accused - {key}))


async def enumerate_flips(bucket: SmallBucket, *, stride: int) -> Findings:
    """Tries every `stride`-th byte of every object. The bucket is whole again afterwards."""
    findings = Findings()
    running = await bucket.node().load()
    for key in bucket.objects():
        sound = bucket.store.objects[key]
        name = class_of(key, sound)
        for at in range(len(key) % stride, len(sound), stride):
            bit = (5 * at + 3) % 8
            bucket.store.objects[key] = flip(sound, at, bit)
            where = f"{name} {key} byte {at} bit {bit}"
            try:
                noticed = await _look(bucket, running, key, name, findings)
            except (ShoalError, ValueError, TypeError, LookupError, RuntimeError) as error:
                findings.wrong.append(f"{where}: {type(error).__name__}: {error}")
                continue
            finally:
                bucket.store.objects[key] = sound
            findings.positions[name] += 1
            findings.wrong += [f"{where}: {why}" for why in noticed.wrong]
            if not noticed.looks:
                findings.wrong.append(f"{where}: nobody noticed")
    if shown(running.replica) != bucket.expected:
        findings.wrong.append("the server that had the shard open shows other rows")
    await running.crash()
    return findings


@dataclass(slots=True)
class _Noticed:
    looks: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


async def _look(
    bucket: SmallBucket, running: Node, key: str, name: str, findings: Findings
) -> _Noticed:
    noticed = _Noticed()
    starting = (
        look_by_reading_catalog
        if name in ("cluster", "catalog", "catalog floor")
        else look_by_loading
    )
    outcome, why = await starting(bucket, key)
    if outcome == "wrong":
        noticed.wrong.append(why)
    elif outcome != "right":
        noticed.looks.append("load")
        findings.refused[name] += outcome == "refused"
    if starting is look_by_loading and await look_by_scrubbing(bucket, running, key):
        noticed.looks.append("scrub")
    named, others = await look_by_checking(bucket, key)
    if named:
        noticed.looks.append("check")
    if others:
        noticed.wrong.append(f"`shoal check` accuses {others}")
    for look in noticed.looks:
        findings.noticed[name, look] += 1
    return noticed


async def enumerate_cache_flips(bucket: SmallBucket, *, stride: int) -> Findings:
    """The same for the fetched copies of a server that is stopped, damaged and started again.

    bucket: one that is not mapped in place. A damaged copy must be replaced before it is used.
    """
    findings = Findings()
    scratch = bucket.folder / "cached"
    node = await bucket.node(scratch).load()
    await node.crash()
    for path in sorted(path for path in (scratch / "cache").rglob("*") if path.is_file()):
        sound = path.read_bytes()
        name = f"cached {path.name}"
        for at in range(0, len(sound), stride):
            path.write_bytes(flip(sound, at, (3 * at + 1) % 8))
            started = bucket.node(scratch)
            try:
                await started.load()
                right = shown(started.replica) == bucket.expected
            except (ShoalError, ValueError, TypeError, LookupError, RuntimeError) as error:
                findings.wrong.append(f"{name} byte {at}: {type(error).__name__}: {error}")
                continue
            finally:
                await started.crash()
            findings.positions[name] += 1
            findings.noticed[name, "cache"] += path.read_bytes() == sound
            if not right or path.read_bytes() != sound:
                findings.wrong.append(f"{name} byte {at}: served, or left as it was")
    return findings


def codes_for_few_rows(rows: int, model: CostModel, recall_target: float) -> FamilyChoice:
    """Gives small segments codes too, so that there is a `codes` file to damage."""
    if rows < ROWS // 2:
        return FamilyChoice(family=Family.FLAT, shape=None, reason="for the test")
    shape = CodeShape(values_a_code=2)
    return FamilyChoice(family=Family.FAST_SCAN, shape=shape, reason="for the test")


@contextlib.contextmanager
def _faiss_is_quiet() -> Iterator[None]:
    """Hides what FAISS writes past Python: that so few rows train poor codes."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


async def _whole(folder: Path, stride: int) -> list[Findings]:
    in_place = await SmallBucket(folder / "in-place").build()
    findings = [await enumerate_flips(in_place, stride=stride)]
    in_place.close()
    cached = await SmallBucket(folder / "cached", in_place=False).build()
    findings.append(await enumerate_cache_flips(cached, stride=stride))
    cached.close()
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stride", type=int, default=1, help="try every so manyth byte (1)")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with mock.patch.object(cost_model, "choose_family", codes_for_few_rows):
        with tempfile.TemporaryDirectory(prefix="shoal-flips-") as folder, _faiss_is_quiet():
            found = run(_whole(Path(folder), arguments.stride))
    for findings in found:
        sys.stdout.write(findings.table() + "\n\n")
    return 1 if any(findings.wrong for findings in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
