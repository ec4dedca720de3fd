"""Asks several shards the same kind of question and remembers what the answers reflect.

What the reads of explore.py share: they may take several rounds, and a later round must not show
an older state than the one before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.ids import ShardNumber
from shoal_cluster.domain.schema import CollectionSchema
from shoal_cluster.domain.session import Consistency, Position
from shoal_cluster.domain.shard_caller import TopologySource
from shoal_cluster.domain.topology import Topology
from shoal_cluster.query.gather import gather
from shoal_cluster.query.plan import Freshness, collection_of
from shoal_cluster.query.replica_reads import ReplicaReads, ShardAnswer, ShardRead
from shoal_cluster.query.rows import RowReader
from shoal_cluster.shard.calls import AsOf, ReadLevel

MICROSECONDS = 1_000_000


class ShardCall(Protocol):
    """A message of shard/calls.py or shard/exploring_calls.py."""

    METHOD: ClassVar[str]

    @property
    def shard(self) -> ShardNumber: ...

    @property
    def level(self) -> ReadLevel: ...

    def to_wire(self) -> list[Any]: ...


class ShardReply(Protocol):
    @property
    def as_of(self) -> AsOf: ...

    @property
    def explain(self) -> Mapping[str, Any] | None: ...


Reply = TypeVar("Reply", bound=ShardReply)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Reads the shards of any collection. Used from one event loop."""

    reads: ReplicaReads
    rows: RowReader
    topology: TopologySource
    clock: Clock

    def begin(self, collection: str, timeout_s: float) -> "Reading":
        """Starts a read. Raises: NotFound naming the collection; Unavailable before a topology."""
        started_s = self.clock.monotonic_s()
        topology = self.topology.current()
        return Reading(
            scatter=self,
            schema=collection_of(topology, collection).schema,
            topology=topology,
            started_s=started_s,
            deadline_s=started_s + timeout_s,
        )


@dataclass(slots=True, kw_only=True)
class Reading:
    """One read under way. as_of: what the latest answer of each shard reflects."""

    scatter: Scatter
    schema: CollectionSchema
    topology: Topology
    started_s: float
    deadline_s: float
    as_of: dict[ShardNumber, AsOf] | None = None
    stages_us: dict[str, int] | None = None

    def remaining_s(self) -> float:
        """Returns the time left; never so little that a call would be refused as one without."""
        return max(self.deadline_s - self.scatter.clock.monotonic_s(), 1e-3)

    async def ask(
        self,
        calls: Sequence[ShardCall],
        parse: Callable[[Any, memoryview], Reply],
        *,
        body: bytes | memoryview = b"",
        stage: str,
    ) -> Sequence[ShardAnswer[Reply]]:
        """Returns the answer to each call, in their order. stage: what explain calls the time.

        Raises: what query/replica_reads.py does. One shard that fails fails the read.
        """
        began_s = self.scatter.clock.monotonic_s()
        answers = await gather(
            [
                self.scatter.reads.read(
                    ShardRead(
                        collection=self.schema.name,
                        collection_id=self.schema.id,
                        shard=call.shard,
                        method=call.METHOD,
                        header=call.to_wire(),
                        body=body,
                        parse=parse,
                        consistency=call.level.consistency,
                        kind=call.METHOD,
                    ),
                    self.topology,
                    deadline_s=self.deadline_s,
                )
                for call in calls
            ]
        )
        self.as_of = self.as_of or {}
        for call, answer in zip(calls, answers, strict=True):
            self.as_of[call.shard] = answer.reply.as_of
        self.note(stage, began_s)
        return answers

    def note(self, stage: str, began_s: float) -> None:
        """Adds the time since `began_s` to a stage."""
        self.stages_us = self.stages_us or {}
        spent_us = round((self.scatter.clock.monotonic_s() - began_s) * MICROSECONDS)
        self.stages_us[stage] = self.stages_us.get(stage, 0) + spent_us

    @property
    def positions(self) -> dict[ShardNumber, Position]:
        return {shard: reflected.position for shard, reflected in (self.as_of or {}).items()}

    @property
    def staleness_ms(self) -> float:
        return max((reflected.staleness_ms for reflected in (self.as_of or {}).values()), default=0)

    def continued(self, freshness: Freshness) -> Freshness:
        """Returns how fresh the next round must be, so that it shows no older state than so far.

        A strong read has seen all that was acknowledged before it began; its later rounds need not
        ask the bucket again.
        """
        if freshness.consistency is Consistency.EVENTUAL or not self.as_of:
            return freshness
        seen = self.positions
        if freshness.collection_id in ("", self.schema.id):
            seen = {
                shard: max(position, freshness.token.get(shard, position))
                for shard, position in seen.items()
            }
        return replace(
            freshness,
            consistency=Consistency.SESSION,
            token={**freshness.token, **seen},
            collection_id=self.schema.id,
        )
