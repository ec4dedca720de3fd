"""Garbage collection keeps up with the fastest writer: the bucket stays bounded under any load."""

import asyncio

from shoal_cluster.shard import garbage
from tests.unit.shard.nodes import KEYS, Shard, run, upsert

WRITES = 400
DELETIONS_MAX = 20


def test_a_collector_that_is_behind_does_not_wait_a_whole_round(tmp_path, monkeypatch):
    async def scenario():
        shard = await Shard(tmp_path).create()
        node = await shard.lead()
        for number in range(1, WRITES + 1):
            await node.write(upsert(number, {f"p{number % 7}": float(number)}))
        await node.seal()
        monkeypatch.setattr(garbage, "DELETIONS_MAX", DELETIONS_MAX)
        collector = node.primary._sealer._garbage

        def log_objects():
            return sum(key.startswith(KEYS.wal) for key in shard.objects)

        before = log_objects()
        await collector.collect(lambda segment: False)
        await asyncio.sleep(garbage.GRACE_S)
        started_s = asyncio.get_running_loop().time()
        while log_objects() > before - WRITES:
            if collector.due():
                await collector.collect(lambda segment: False)
            await asyncio.sleep(0.1)
        # Twenty rounds are needed; at the usual pace they would take ten times as long.
        took_s = asyncio.get_running_loop().time() - started_s
        assert took_s < WRITES / DELETIONS_MAX * garbage.ROUND_S / 4
        # Nothing is left to do: the pace is the usual one again.
        await collector.collect(lambda segment: False)
        await asyncio.sleep(garbage.BEHIND_ROUND_S)
        assert not collector.due()

    run(scenario())
