"""Positions in a shard's order, and the tokens that sessions carry.

A position (epoch, seq) is compared lexicographically. A token maps shards to positions; the SDK
merges the token of every reply into its own, so that a session never goes back.
"""

import enum
from collections.abc import Mapping
from typing import NamedTuple

from shoal_cluster.domain.ids import Epoch, Seq, ShardNumber


class Consistency(enum.Enum):
    EVENTUAL = "eventual"
    SESSION = "session"
    STRONG = "strong"


class Position(NamedTuple):
    epoch: Epoch
    seq: Seq


ORIGIN = Position(Epoch(0), Seq(0))

SessionToken = Mapping[ShardNumber, Position]


def merge_tokens(left: SessionToken, right: SessionToken) -> dict[ShardNumber, Position]:
    """Returns the larger position of each shard."""
    merged = dict(left)
    for shard, position in right.items():
        merged[shard] = max(position, merged.get(shard, ORIGIN))
    return merged
