"""Every bound of the system, with its reason. Nothing in Shoal grows without one of these."""

KIB = 1024
MIB = 1024 * KIB

# Names and schema
NAME_LENGTH_MAX = 64
DIMENSION_MIN, DIMENSION_MAX = 2, 4096
SHARDS_MAX = 1024
REPLICAS_MAX = 8
ATTRIBUTES_MAX = 64
RECALL_TARGET_MIN, RECALL_TARGET_MAX = 0.5, 1.0
SEARCH_COST_MS_MAX = 60_000.0
"""Comparing a hundred million rows of 384-d takes a minute of one core."""
RECALL_SAMPLE_SHARE_MAX = 1.0
"""Of the searches; a process takes no more than fit 2 % of a core (shard/recall_sampling.py)."""

# Points
POINT_ID_BYTES_MAX = 256
KEYWORD_BYTES_MAX = 1024
KEYWORD_LIST_LENGTH_MAX = 256
PAYLOAD_BYTES_MAX = 256 * KIB

# Requests. gRPC messages are refused above REQUEST_BYTES_MAX before they are decoded.
BATCH_POINTS_MAX = 1000
REQUEST_BYTES_MAX = 32 * MIB
SEARCH_K_MAX = 1000
SEARCH_BATCH_MAX = 256
SCROLL_LIMIT_MAX = 1000
RECOMMEND_EXAMPLES_MAX = 100
DIVERSE_CANDIDATES_MAX = 1000
"""As SEARCH_K_MAX: candidates come with their vectors, of 4,096 floats at most 16 MiB."""
RANGE_HITS_MAX = 100_000
"""Hits of one range search: with ids of 20 bytes, 4 MB; whoever wants more wants a scroll."""
SHARD_PAGE_BYTES_MAX = 4 * MIB
"""Tails and vectors in one page of a shard: a quarter of what a frame's header may hold."""
GATHERED_BYTES_MAX = 64 * MIB
"""Such pages of all shards together, which a coordinator holds for one read; and tails and vectors
of all rows that one answer gives: twice the largest request, so what was written by one is read by
one."""
HITS_TAIL_BYTES_MAX = 28 * MIB
HITS_ID_BYTES_MAX = 11 * MIB
"""Of all hits in a shard's answer to one call. With 32 MiB of vectors and 4 MiB of sequence numbers
and scores they fit a frame, and the ids its header."""
GROUPS_MAX = 100
GROUP_ROUNDS_MAX = 32
"""Searches by which one shard looks for groups; each finds one at least, or that there is none."""
FACETS_MAX = 1000
FACET_VALUES_MAX = 100_000
"""Distinct values under one filter, all of which travel so that counts are exact; with the next,
half of what the header of a frame between actors holds."""
FACET_VALUE_BYTES_MAX = 8 * MIB
FILTER_NODES_MAX = 1000
FILTER_DEPTH_MAX = 32
FILTER_VALUES_MAX = 10_000
DELETE_BY_FILTER_MAX = 10_000
"""Rows one pass of delete-by-filter removes from a shard; the coordinator repeats the pass."""

# WAL: one PUT in flight per shard, so a record is as large as what queued meanwhile.
WAL_RECORD_BYTES_MAX = 8 * MIB
WAL_RECORD_OPS_MAX = 5000
WAL_QUEUE_BYTES_MAX = 64 * MIB
WAL_REPLAY_WINDOW = 16

# Memtable: searched exactly, so its size is a latency bound (8,192 × 384 floats: about 1 ms).
SEAL_OPERATIONS = 4096
"""A memtable with so many operations is sealed as soon as the one before it is. Comparing so many
rows of 384-d takes half a millisecond. Fewer make segments that are compared row by row as well, so
that sealing them gains nothing, and of which four have to be merged for the first that has codes.
"""
MEMTABLE_OPERATIONS_MAX = 16_384
MEMTABLE_BYTES_MAX = 64 * MIB
"""Past either, while a seal is under way or failing, writes wait: Overloaded with retry_after_ms.
All memtables of a shard together hold at most twice as much, and so does the build of a seal."""

# Segments: four of about one size are merged into one of the next tier.
COMPACTION_FAN_IN = 4
SEGMENTS_WHILE_LOADING_MAX = 12
"""While writers fill memtables faster than they are sealed, merging waits until there are so many:
a bulk load needs the cores, and its segments are merged in fewer, larger steps once it is over. A
search pays for each: seven took 1.5 ms longer than one (docs/design/hot-path.md)."""
SETTLE_OPERATIONS = 256
"""A quiet shard seals a memtable with so many operations; fewer cost nothing to search."""
SEGMENT_ROWS_MAX = 1_000_000
BUILD_MEMORY_BYTES_MAX = 6 * 1024 * MIB
"""Planners merge no more than fits into so much (shard/build_memory.py): a whole segment's rows at
384-d with a kilobyte of payload each, 440,000 at 1,536-d. A vectors file stays below half of it,
well within one PUT."""

# Bulk loads (docs/design/bulk-load.md)
LOAD_CHUNK_ROWS_MAX = 8192
LOAD_CHUNK_BYTES_MAX = 16 * MIB
"""Vectors of a chunk; with attributes and payloads it is a request like any other, 32 MiB."""
LOAD_CHUNKS_MAX = 20_000
"""Of one load: 160 million short rows; their names make a message of half a megabyte."""
LOAD_SEGMENT_ROWS = 131_072
LOAD_SEGMENT_CHUNKS = 48
"""Of one segment of a load, about: its build holds all rows, 1.5 GiB if each chunk is a request of
32 MiB. Larger segments are what compaction is for."""
LOADS_MAX = 64
"""Loads that a shard prepares at once, or keeps prepared."""
LOADS_REMEMBERED = 1024
"""Loads that a shard takes in its life: its manifest names each that was committed, 40 kB. One that
was forgotten could be committed again, over what was written since (docs/design/bulk-load.md)."""
LOAD_ABANDONED_S = 24 * 3600.0
"""A load without decision to which nothing was added for so long is aborted."""

# Deduplication of retried writes, per shard: answers to REQUESTS_MAX requests, about 4 MB. However
# many write, a client keeps REQUESTS_MAX / CLIENTS_MAX = 16 answers, as many as the SDK's bulk load
# keeps in flight at most.
DEDUP_CLIENTS_MAX = 1024
DEDUP_REQUESTS_PER_CLIENT_MAX = 512
DEDUP_REQUESTS_MAX = 16_384

# Links
FRAME_BYTES_MAX = 64 * MIB
PUSHES_MAX = 64
PUSH_BYTES_MAX = 32 * MIB
"""Records on their way to one follower of one shard, and those that wait there for an earlier one:
four of the largest. Past either, a slow follower misses pushes and fetches the records itself."""
LINK_IN_FLIGHT_MAX = 4096
