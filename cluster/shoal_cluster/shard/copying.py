"""Puts a cached copy of a segment file into the bucket again, beside the object that is damaged."""

import functools
from dataclasses import replace

from shoal_cluster.bucket.create import create_file_once
from shoal_cluster.domain.ids import SegmentId
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.manifest.manifest import FileEntry
from shoal_cluster.segment.verification import verify_files
from shoal_cluster.shard.ports import ShardPorts
from shoal_cluster.shard.segment_files import LocalFile

_UNIQUE_BYTES = 8


async def put_copy(
    ports: ShardPorts, keys: ShardKeys, segment: SegmentId, copy: LocalFile
) -> FileEntry:
    """Returns the entry of a new object with the copy's bytes, for the manifest to list.

    Raises: Corrupt when the copy is not what the manifest lists; Unavailable.
    """
    entry = copy.entry
    verify = functools.partial(verify_files, {entry.name: copy.path}, (entry,))
    await ports.background.run(verify)
    key = f"{keys.segment(segment)}{entry.name}-{ports.ids.hex(_UNIQUE_BYTES)}"
    await create_file_once(
        ports.store,
        key,
        copy.path,
        sha256=entry.sha256,
        size_bytes=entry.size_bytes,
        clock=ports.clock,
        deadline_s=None,
    )
    return replace(entry, key=key)
