"""Changing a collection's memory tier while its shards serve."""

import asyncio
from dataclasses import replace

from shoal_cluster.domain.schema import MemoryTier
from tests.unit.shard.nodes import SCHEMA, Node, Shard, points_of, run, upsert

IN_MEMORY = replace(SCHEMA, tier=MemoryTier.FULL, version=2)
ON_DISK = replace(SCHEMA, tier=MemoryTier.DISK, version=3)


def tiers_of(node: Node) -> list[MemoryTier]:
    return [view.reader.tier for view in node.replica.state.segments.values()]


async def moved(node: Node) -> None:
    while node.replica._moving is not None:
        await asyncio.sleep(0)


def test_opened_segments_move_to_the_tier_that_was_altered(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        for turn in range(2):
            await node.write(upsert(turn + 1, {f"{turn}-{number}": number for number in range(4)}))
            await node.seal()
        before = points_of(node.replica)
        assert tiers_of(node) == [MemoryTier.COMPACT] * 2

        for schema in (IN_MEMORY, ON_DISK):
            node.replica.alter(schema)
            await moved(node)

            assert tiers_of(node) == [schema.tier] * 2
            assert points_of(node.replica) == before
        await node.crash()

    run(scenario())


def test_a_segment_sealed_while_the_tier_changes_ends_in_the_new_one(tmp_path, monkeypatch):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        await node.write(upsert(1, {"a": 1}))
        await node.seal()
        await node.write(upsert(2, {"b": 2}))
        build = node.ports.builds.build

        async def altering(order):
            entry = await build(order)
            node.replica.alter(IN_MEMORY)
            return entry

        monkeypatch.setattr(node.ports.builds, "build", altering)
        await node.seal()
        await moved(node)

        assert tiers_of(node) == [MemoryTier.FULL] * 2
        await node.crash()

    run(scenario())


def test_a_replica_that_closes_stops_moving(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        await node.write(upsert(1, {"a": 1}))
        await node.seal()
        node.replica.alter(IN_MEMORY)
        await node.crash()
        assert node.replica._moving is None

    run(scenario())
