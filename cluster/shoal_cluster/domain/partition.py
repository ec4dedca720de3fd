"""Which shard a row belongs to. Fixed by format version 1: a change would misplace stored rows."""

import xxhash

from shoal_cluster.domain.ids import PointId, ShardNumber


def shard_of_value(value: str, shards: int) -> ShardNumber:
    """Returns the shard of a partition value: xxh3-64 of its UTF-8 modulo the number of shards."""
    return ShardNumber(xxhash.xxh3_64_intdigest(value.encode()) % shards)


def shard_of_id(point_id: PointId, shards: int) -> ShardNumber:
    """Returns the shard of a point in a collection that is not partitioned by an attribute."""
    return ShardNumber(xxhash.xxh3_64_intdigest(point_id.encode()) % shards)
