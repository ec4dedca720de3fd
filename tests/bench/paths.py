"""The ways to ask one query, each a step further from the index.

    raw           FAISS in this process: one index over all rows, rescored exactly
    raw segments  the same kernels over the segments that the shard happens to have
    link          a shard server without Ray, called over a link
    grpc          SDK, gRPC, coordinator, link, shard server: what other languages get
    grpc_stream   no SDK: SearchStream, as clients in other languages use it
    sdk           the same over a fast lane instead of gRPC: what users of the SDK get
    …_batch       64 queries in one call; raw on as many threads as there are cores

Each answers with whatever it calls a hit; `rows_of` turns that into rows after the clock stopped.
"""

import asyncio
import functools
import json
import os
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import grpc
import numpy as np
import numpy.typing as npt
import uvloop

import shoal
from shoal_cluster.bucket.open import open_store
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import Outcome
from shoal_cluster.domain.ids import CollectionId, ShardNumber
from shoal_cluster.domain.keys import ShardKeys
from shoal_cluster.domain.schema import CollectionSchema, Metric
from shoal_cluster.domain.session import Consistency
from shoal_cluster.index.distances import smallest
from shoal_cluster.index.families import Effort
from shoal_cluster.index.fast_scan import decode_codes
from shoal_cluster.index.rescoring import rescored_top_k
from shoal_cluster.links.address import LinkAddress
from shoal_cluster.links.connection import connect
from shoal_cluster.links.pool import LinkPool
from shoal_cluster.manifest.commit import Manifests
from shoal_cluster.segment.reader import SegmentReader
from shoal_cluster.shard.calls import ReadLevel, SearchCall, SearchReply
from shoal_cluster.shard.compute import InlineCompute
from shoal_cluster.shard.segment_files import SegmentFiles
from shoal_protos.v1 import search_pb2, types_pb2
from shoal_protos.v1.search_pb2_grpc import SearchStub
from tests.bench.corpus import Floats, K, row_of

VECTORS: Final = "vectors.npy"
QUERIES: Final = "queries.npy"
CODES: Final = "codes"
TIMEOUT_S: Final = 30.0
SHARD: Final = ShardNumber(0)
BATCH: Final = 64
CORES: Final = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where everything is. directory: holds VECTORS, QUERIES and CODES. depth, probes: Effort.

    recall_target: what every search asks for.
    """

    directory: str
    bucket: str
    grpc_address: str
    link_address: str
    link_secret: str
    collection: str
    collection_id: str
    schema: dict[str, Any]
    depth: int
    probes: int
    recall_target: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> "Setup":
        return Setup(**json.loads(path.read_text()))

    def queries(self) -> Floats:
        queries: Floats = np.load(Path(self.directory) / QUERIES)
        return queries


class RawSearch:
    """One FAISS index over all rows. Vectors are mapped from a file, as a segment's are."""

    def __init__(self, setup: Setup) -> None:
        directory = Path(setup.directory)
        self._vectors = np.load(directory / VECTORS, mmap_mode="r")
        rows, dimension = self._vectors.shape
        codes = np.fromfile(directory / CODES, dtype=np.uint8)
        self._index = decode_codes(codes, rows=rows, dimension=dimension, metric=Metric.COSINE)
        self._effort = Effort(depth=setup.depth, probes=setup.probes)

    def ask(self, query: Floats) -> npt.NDArray[np.int64]:
        rows: npt.NDArray[np.int64] = self.ask_batch(query)[0]
        return rows

    def ask_batch(self, queries: Floats) -> npt.NDArray[np.int64]:
        candidates = self._index.candidates(queries, self._effort)
        rows: npt.NDArray[np.int64] = rescored_top_k(
            self._vectors, queries, candidates, K, Metric.COSINE
        )[1]
        return rows


class SegmentsSearch:
    """The shard's own segments, opened from the bucket and searched one after the other."""

    def __init__(self, setup: Setup) -> None:
        self._readers = asyncio.run(_open_segments(setup))
        self._target = setup.recall_target

    @property
    def segments(self) -> int:
        return len(self._readers)

    def ask(self, query: Floats) -> list[bytes]:
        hits = [reader.search(query, K, recall_target=self._target) for reader in self._readers]
        keys = np.concatenate([found.keys[0] for found in hits])
        places = smallest(keys, None, K)[1].tolist()
        return [
            self._readers[place // K].id_of(int(hits[place // K].rows[0, place % K]))
            for place in places
        ]


async def _open_segments(setup: Setup) -> list[SegmentReader]:
    store = open_store(setup.bucket)
    try:
        keys = ShardKeys(CollectionId(setup.collection_id), SHARD)
        manifest = await Manifests(store, keys, SystemClock()).newest()
        assert manifest is not None, "the shard was created"
        files = SegmentFiles(store, Path(setup.directory) / "cache", InlineCompute())
        schema = CollectionSchema.from_wire(setup.schema)
        return [await files.open_reader(entry, schema) for entry in manifest.segments]
    finally:
        await store.close()


class LinkSearch:
    """Calls the shard process as a coordinator does. `ask_all` runs on a loop of its own."""

    def __init__(self, setup: Setup) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._address = LinkAddress(setup.link_address)
        self._pool = LinkPool(functools.partial(connect, secret=bytes.fromhex(setup.link_secret)))
        self._call = SearchCall(
            collection=CollectionId(setup.collection_id),
            shard=SHARD,
            k=K,
            recall_target=setup.recall_target,
            level=ReadLevel(consistency=Consistency.SESSION),
        )

    def run(self, work: Any) -> Any:
        """Runs a coroutine on the loop that the link belongs to."""
        return self._runner.run(work)

    async def ask(self, query: Floats) -> Sequence[bytes]:
        reply = await self._pool.call(
            self._address,
            SearchCall.METHOD,
            self._call.to_wire(),
            query.data.cast("B"),
            timeout_s=TIMEOUT_S,
            on_lost=Outcome.NOT_APPLIED,
        )
        return SearchReply.from_wire(reply.header, reply.body).ids  # type: ignore[arg-type]

    def close(self) -> None:
        self._runner.run(self._pool.close_all())
        self._runner.close()


class RawThreads:
    """The same index, all cores: a thread each, as many searches at once."""

    def __init__(self, setup: Setup) -> None:
        self._raw = RawSearch(setup)
        self._pool = ThreadPoolExecutor(CORES)

    def ask_batch(self, queries: Floats) -> list[npt.NDArray[np.int64]]:
        parts = self._pool.map(self._raw.ask_batch, np.array_split(queries, CORES))
        return [rows for part in parts for rows in part]

    def ask_for(self, queries: Sequence[Floats], seconds: float) -> list[float]:
        """Returns the latencies of searches that both threads do one after the other."""

        def work(first: int) -> list[float]:
            latencies_s, number = [], first
            end_s = time.perf_counter() + seconds
            while (before_s := time.perf_counter()) < end_s:
                self._raw.ask(queries[number % len(queries)])
                latencies_s.append(time.perf_counter() - before_s)
                number += CORES
            return latencies_s

        return [each for part in self._pool.map(work, range(CORES)) for each in part]

    def close(self) -> None:
        self._pool.shutdown()


class SdkSearch:
    """The SDK's synchronous client, as its README shows it."""

    def __init__(
        self,
        setup: Setup,
        *,
        transport: Literal["auto", "grpc"] = "auto",
        with_payload: bool = False,
    ) -> None:
        self._client = shoal.Client(setup.grpc_address, timeout_s=TIMEOUT_S, transport=transport)
        self._collection = self._client.collection(setup.collection)
        self._target = setup.recall_target
        self._with_payload = with_payload

    def ask(self, query: Floats) -> list[str]:
        found = self._collection.search(
            query[0], k=K, recall_target=self._target, with_payload=self._with_payload
        )
        if self._with_payload:
            return [hit.id for hit in found.hits]
        return found.ids

    def ask_batch(self, queries: Floats) -> list[list[str]]:
        found = self._collection.search_batch(
            queries, k=K, recall_target=self._target, with_payload=False
        )
        return [each.ids for each in found]

    def close(self) -> None:
        self._client.close()


class StreamSearch:
    """Generated code alone: one search after the other on one long-lived gRPC stream."""

    def __init__(self, setup: Setup) -> None:
        self._channel = grpc.insecure_channel(setup.grpc_address)
        self._collection = setup.collection
        self._target = setup.recall_target
        self._requests: queue.SimpleQueue[search_pb2.SearchStreamRequest | None] = (
            queue.SimpleQueue()
        )
        self._answers = SearchStub(self._channel).SearchStream(iter(self._requests.get, None))
        self._tag = 0

    def ask(self, query: Floats) -> list[str]:
        self._tag += 1
        search = search_pb2.SearchRequest(
            collection=self._collection,
            vectors=query.tobytes(),
            dimension=query.shape[1],
            k=K,
            recall_target=self._target,
            consistency=types_pb2.CONSISTENCY_SESSION,
        )
        self._requests.put(search_pb2.SearchStreamRequest(tag=self._tag, search=search))
        answer = next(self._answers)
        assert answer.tag == self._tag and not answer.HasField("error"), answer
        return list(answer.found.results[0].rows.ids)

    def close(self) -> None:
        self._requests.put(None)
        self._channel.close()


def rows_of(answer: Any) -> list[int]:
    """Returns the rows an answer names, K of them, padded with -1."""
    rows = [
        row_of(hit.decode())
        if isinstance(hit, bytes)
        else row_of(hit)
        if isinstance(hit, str)
        else int(hit)
        for hit in answer
    ]
    return (rows + [-1] * K)[:K]
