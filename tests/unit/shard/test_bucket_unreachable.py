"""A bucket that answers nothing for a while: what goes on, what is refused, what is unknown."""

import asyncio

import pytest

from shoal_cluster.bucket.memory import MemoryStore
from shoal_cluster.bucket.store import PutOutcome
from shoal_cluster.domain.errors import Unavailable
from shoal_cluster.domain.session import Consistency
from shoal_cluster.shard.calls import ReadLevel
from tests.unit.shard.nodes import Shard, points_of, run, upsert

OUTAGE_S = 600.0
STRONG = ReadLevel(consistency=Consistency.STRONG)


class CutOffStore(MemoryStore):
    """A handle to the bucket that can be cut off: puts stay unresolved, reads are refused."""

    def __init__(self, objects):
        super().__init__(objects)
        self.cut_off = False

    async def create(self, key, body):
        if self.cut_off:
            await asyncio.sleep(1.0)
            return PutOutcome.UNRESOLVED
        return await super().create(key, body)

    async def get(self, key):
        await self._refuse()
        return await super().get(key)

    async def list(self, prefix):
        await self._refuse()
        return await super().list(prefix)

    async def _refuse(self):
        if self.cut_off:
            await asyncio.sleep(1.0)
            raise Unavailable("the bucket does not answer")


def test_an_unreachable_bucket_stops_strong_reads_and_writes_only(tmp_path):
    async def scenario():
        shard = await Shard(tmp_path).create()
        store = CutOffStore(shard.objects)
        node = await shard.node(store=store).load()
        await node.promote()
        written = await node.write(upsert(1, {"a": 1.0}))
        seen = ReadLevel(consistency=Consistency.SESSION, at_least=written.position)

        store.cut_off = True
        writing = asyncio.ensure_future(node.write(upsert(2, {"b": 2.0})))
        await asyncio.sleep(OUTAGE_S)
        await node.replica.wait_for(ReadLevel())
        await node.replica.wait_for(seen)
        assert points_of(node.replica) == {"a": 1.0}, "nothing that is not durable is seen"
        assert node.replica.as_of().staleness_ms >= OUTAGE_S * 1000
        with pytest.raises(Unavailable):
            await node.replica.wait_for(STRONG)
        # Neither acknowledged nor refused: the put may land at any moment.
        assert not writing.done()

        store.cut_off = False
        reply = await writing
        await node.replica.wait_for(STRONG)
        assert points_of(node.replica) == {"a": 1.0, "b": 2.0}
        # Whoever gave up waiting and asks again gets the first answer.
        assert await node.write(upsert(2, {"b": 2.0})) == reply
        await node.crash()

    run(scenario())
