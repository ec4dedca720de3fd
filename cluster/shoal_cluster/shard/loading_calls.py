"""What a coordinator asks a shard's primary about a bulk load; a message as in calls.py."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from shoal_cluster.domain.ids import CollectionId, Epoch, Seq, ShardNumber
from shoal_cluster.domain.session import ORIGIN, Position


class LoadStep(enum.Enum):
    """EXPECT: rows are being staged; answered at once."""

    EXPECT = "expect"
    PREPARE = "prepare"
    COMMIT = "commit"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCall:
    """Asks for a step of a load and waits for it, but no longer than `wait_s`.

    chunks: (name, rows in this shard), in order; schema_version: that they were checked with; both
    only for PREPARE. Asking again is harmless.
    """

    METHOD: ClassVar[str] = "load"
    collection: CollectionId
    shard: ShardNumber
    load: str
    step: LoadStep
    wait_s: float
    chunks: Sequence[tuple[str, int]] = ()
    schema_version: int = 0

    def to_wire(self) -> list[Any]:
        return [
            self.collection,
            self.shard,
            self.load,
            self.step.value,
            self.wait_s,
            [list(chunk) for chunk in self.chunks],
            self.schema_version,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "LoadCall":
        return LoadCall(
            collection=fields[0],
            shard=fields[1],
            load=fields[2],
            step=LoadStep(fields[3]),
            wait_s=fields[4],
            chunks=tuple((name, rows) for name, rows in fields[5]),
            schema_version=fields[6],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReply:
    """How far the shard is. prepared: by which epoch, None while segments are being built.

    committed: the rows are visible; position: what a session must see to see them.
    """

    segments_done: int = 0
    segments_total: int = 0
    prepared: Epoch | None = None
    committed: bool = False
    position: Position = ORIGIN

    def to_wire(self) -> list[Any]:
        return [
            self.segments_done,
            self.segments_total,
            self.prepared,
            self.committed,
            self.position.epoch,
            self.position.seq,
        ]

    @staticmethod
    def from_wire(fields: Sequence[Any]) -> "LoadReply":
        return LoadReply(
            segments_done=fields[0],
            segments_total=fields[1],
            prepared=fields[2],
            committed=fields[3],
            position=Position(Epoch(fields[4]), Seq(fields[5])),
        )
