"""Bulk loads, the coordinator's part: stages chunks, decides, has every shard prepare and commit.

Steps 1 to 3 and 8 of docs/design/bulk-load.md, and who is asked for the others. What it holds of a
load between two calls it can read again: any coordinator can go on with any load.
"""

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal_cluster.bucket.store import Store
from shoal_cluster.domain import limits
from shoal_cluster.domain.clock import Clock
from shoal_cluster.domain.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    Outcome,
    ShoalError,
    Unavailable,
)
from shoal_cluster.domain.ids import Epoch, IdGenerator, PointId, ServerId, ShardNumber
from shoal_cluster.domain.keys import LoadKeys
from shoal_cluster.domain.partition import shard_of_id
from shoal_cluster.domain.point import Provenance, Vectors
from shoal_cluster.domain.request import RequestName
from shoal_cluster.domain.schema import CollectionSchema, EmbeddingModel
from shoal_cluster.domain.session import Position
from shoal_cluster.domain.shard_caller import ShardCaller, TopologySource
from shoal_cluster.domain.topology import require_topology
from shoal_cluster.ingest.validate import Tails, UpsertRequest, check_batch, encode_tails
from shoal_cluster.shard.load_objects import (
    ABORT,
    Decision,
    Receipt,
    StagedRows,
    decide,
    give_receipt,
    read_decision,
    read_receipt,
    stage_rows,
)
from shoal_cluster.shard.loading_calls import LoadCall, LoadReply, LoadStep

SLICE_ROWS = 256
"""Rows encoded between two turns of the event loop: a few ms, so searches are not held up."""

CALL_S_MAX = 2.0
"""How long a shard is asked to wait before it says how far it is."""

PAUSE_S = 0.1

RECEIPTS_AT_ONCE = 32

LOADS_KNOWN_MAX = 8
"""Loads whose receipts are kept, some MB each at most: a commit is asked for every few seconds."""

_NAME = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRequest:
    """Rows of one chunk, as in ingest/validate.py UpsertRequest. digest: the client's, of them."""

    collection: str
    load: str
    chunk: str
    digest: int
    ids: Sequence[str]
    vectors: Vectors
    attributes: Sequence[Mapping[str, object]] = ()
    payloads: Sequence[bytes] = ()
    provenance: Sequence[Provenance] = ()
    model: EmbeddingModel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStatus:
    """chunks: staged ones, with the client's digests. decided: True commit, False abort."""

    chunks: Mapping[str, int]
    decided: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """committed: every shard shows its rows, and `token` sees them."""

    schema: CollectionSchema
    committed: bool
    rows: int
    segments_done: int
    segments_total: int
    token: Mapping[ShardNumber, Position] = field(default_factory=dict)


class Loader:
    """Carries out the loads of one coordinator. Used from one event loop.

    All methods raise InvalidRequest, NotFound (the collection), Conflict and Unavailable; every one
    may be called again.
    """

    def __init__(
        self,
        *,
        store: Callable[[], Store],
        caller: ShardCaller,
        topology: TopologySource,
        clock: Clock,
        ids: IdGenerator,
    ) -> None:
        """store: opened when first needed; a coordinator without loads needs none."""
        self._open = store
        self._opened: Store | None = None
        self._caller = caller
        self._topology = topology
        self._clock = clock
        self._ids = ids
        self._telling: set[asyncio.Task[None]] = set()
        self._known: dict[LoadKeys, dict[str, Receipt]] = {}

    @property
    def _store(self) -> Store:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    async def stage(self, request: ChunkRequest) -> None:
        """Makes a chunk's rows durable, visible to nobody; the same chunk again does nothing."""
        schema = self._schema(request.collection, request.load)
        _require_name(request.chunk, field="chunk")
        batch_request = UpsertRequest(
            collection=request.collection,
            name=RequestName(request.load, 1),
            ids=request.ids,
            vectors=request.vectors,
            attributes=request.attributes,
            payloads=request.payloads,
            provenance=request.provenance,
            model=request.model,
        )
        batch = check_batch(batch_request, schema, points_max=limits.LOAD_CHUNK_ROWS_MAX)
        tails = Tails()
        for start in range(0, len(batch.ids), SLICE_ROWS):
            if start:
                await self._clock.sleep(0)
            rows = range(start, min(start + SLICE_ROWS, len(batch.ids)))
            encode_tails(batch_request, schema, batch, rows=rows, tails=tails)
        staged = StagedRows(ids=batch.ids, vectors=batch.vectors, tails=tails.encoded)
        parts = _by_shard(staged, request.ids, schema)
        put_ids = await asyncio.gather(
            *(
                stage_rows(
                    self._store,
                    self._clock,
                    LoadKeys(schema.id, shard, request.load),
                    request.chunk,
                    part,
                )
                for shard, part in parts.items()
            )
        )
        receipt = Receipt(
            digest=request.digest,
            schema_version=schema.version,
            rows={shard: len(part.ids) for shard, part in parts.items()},
        )
        await give_receipt(
            self._store,
            self._clock,
            self._keys(schema, request.load),
            request.chunk,
            receipt,
            b"".join(put_ids),
        )

    async def status(self, collection: str, load: str) -> LoadStatus:
        """Says which chunks are staged and what was decided: how an interrupted load goes on."""
        schema = self._schema(collection, load)
        keys = self._keys(schema, load)
        decision = await read_decision(self._store, keys)
        if decision is None:
            self._announce(schema, load)
        names = [] if decision is not None else await self._staged(keys)
        receipts = await self._receipts(keys, names)
        return LoadStatus(
            chunks={
                name: receipt.digest
                for name, receipt in zip(names, receipts, strict=True)
                if receipt is not None
            },
            decided=None if decision is None else decision.commit,
        )

    def _announce(self, schema: CollectionSchema, load: str) -> None:
        """Tells each server that leads a shard, once, that rows are coming; waits for nothing."""
        place = self._topology.current().collections[schema.name]
        primaries = {shard.primary: shard.shard for shard in place.shards}
        for primary, shard in primaries.items():
            if primary is not None:
                call = LoadCall(
                    collection=schema.id, shard=shard, load=load, step=LoadStep.EXPECT, wait_s=0.0
                )
                task = asyncio.ensure_future(self._tell(primary, call))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

    async def _tell(self, primary: ServerId, call: LoadCall) -> None:
        with contextlib.suppress(ShoalError):  # it only starts a process early
            await self._caller.call(
                primary,
                call.METHOD,
                call.to_wire(),
                timeout_s=CALL_S_MAX,
                on_lost=Outcome.NOT_APPLIED,
            )

    async def commit(
        self, collection: str, load: str, chunks: Sequence[str], *, timeout_s: float
    ) -> LoadProgress:
        """Makes the load visible, or as much progress as `timeout_s` allows; call until committed.

        chunks: all of the load, in order; what else was staged under its id is left out.
        """
        deadline_s = self._clock.monotonic_s() + timeout_s
        schema = self._schema(collection, load)
        keys = self._keys(schema, load)
        decision = await read_decision(self._store, keys)
        if decision is None:
            rows = await self._rows_of(keys, chunks)
            prepared = await self._prepare(schema, load, chunks, rows, deadline_s)
            if isinstance(prepared, LoadProgress):
                return prepared
            total = sum(sum(receipt.rows.values()) for receipt in rows)
            decision = await decide(
                self._store,
                self._clock,
                keys,
                Decision(commit=True, rows=total, epochs=prepared),
                self._ids.put_id(),
            )
        if not decision.commit:
            raise Conflict(
                f"load {load} was aborted; nothing of it is visible, choose another id",
                field="load_id",
            )
        return await self._commit(schema, load, decision, deadline_s)

    async def abort(self, collection: str, load: str) -> None:
        """Gives a load up: nothing of it will ever be visible.

        Raises: Conflict when it is decided to commit.
        """
        schema = self._schema(collection, load)
        keys = self._keys(schema, load)
        decision = await decide(self._store, self._clock, keys, ABORT, self._ids.put_id())
        if decision.commit:
            raise Conflict(
                f"load {load} is decided: its rows are visible, or will be when it is run again",
                field="load_id",
            )

    async def _prepare(
        self,
        schema: CollectionSchema,
        load: str,
        chunks: Sequence[str],
        receipts: Sequence[Receipt],
        deadline_s: float,
    ) -> LoadProgress | dict[ShardNumber, Epoch]:
        """Returns who prepared each shard, or how far they are when the time is over."""
        parts: dict[ShardNumber, list[tuple[str, int]]] = {}
        for name, receipt in zip(chunks, receipts, strict=True):
            for shard, count in receipt.rows.items():
                parts.setdefault(shard, []).append((name, count))
        replies = await self._ask_all(
            [
                LoadCall(
                    collection=schema.id,
                    shard=shard,
                    load=load,
                    step=LoadStep.PREPARE,
                    wait_s=CALL_S_MAX,
                    chunks=part,
                    schema_version=max(receipt.schema_version for receipt in receipts),
                )
                for shard, part in sorted(parts.items())
            ],
            schema,
            lambda reply: reply.prepared is not None or reply.committed,
            deadline_s,
        )
        epochs = {}
        for shard, reply in replies.items():
            if reply.prepared is None:
                # Also if it is committed: then there is a decision, and the next call finds it.
                return self._progress(schema, False, 0, replies)
            epochs[shard] = reply.prepared
        return epochs

    async def _commit(
        self, schema: CollectionSchema, load: str, decision: Decision, deadline_s: float
    ) -> LoadProgress:
        replies = await self._ask_all(
            [
                LoadCall(
                    collection=schema.id,
                    shard=shard,
                    load=load,
                    step=LoadStep.COMMIT,
                    wait_s=CALL_S_MAX,
                )
                for shard in sorted(decision.epochs)
            ],
            schema,
            lambda reply: reply.committed,
            deadline_s,
        )
        committed = all(reply.committed for reply in replies.values())
        return self._progress(schema, committed, decision.rows, replies)

    @staticmethod
    def _progress(
        schema: CollectionSchema,
        committed: bool,
        rows: int,
        replies: Mapping[ShardNumber, LoadReply],
    ) -> LoadProgress:
        return LoadProgress(
            schema=schema,
            committed=committed,
            rows=rows,
            segments_done=sum(reply.segments_done for reply in replies.values()),
            segments_total=sum(reply.segments_total for reply in replies.values()),
            token={shard: reply.position for shard, reply in replies.items()} if committed else {},
        )

    async def _ask_all(
        self,
        calls: Sequence[LoadCall],
        schema: CollectionSchema,
        is_done: Callable[[LoadReply], bool],
        deadline_s: float,
    ) -> dict[ShardNumber, LoadReply]:
        """Asks each shard's primary until it is done or the time is over."""
        replies = await asyncio.gather(
            *(self._ask(call, schema, is_done, deadline_s) for call in calls)
        )
        return {call.shard: reply for call, reply in zip(calls, replies, strict=True)}

    async def _ask(
        self,
        call: LoadCall,
        schema: CollectionSchema,
        is_done: Callable[[LoadReply], bool],
        deadline_s: float,
    ) -> LoadReply:
        """Raises: Unavailable when no primary answered before the deadline; what it says else."""
        reply = None
        failure: ShoalError = Unavailable("a takeover is under way")
        while True:
            topology = self._topology.current()
            place = topology.collections.get(schema.name)
            if place is None or place.schema.id != schema.id:
                raise NotFound(f"collection {schema.name!r} was dropped", field="collection")
            primary = place.shards[call.shard].primary
            if primary is not None:
                try:
                    header, _ = await self._caller.call(
                        primary,
                        call.METHOD,
                        call.to_wire(),
                        timeout_s=call.wait_s + 5.0,
                        on_lost=Outcome.NOT_APPLIED,
                    )
                    reply = LoadReply.from_wire(header)
                    if is_done(reply):
                        return reply
                except Unavailable as error:  # NotPrimary as well: look for the next one
                    failure = error
            if self._clock.monotonic_s() >= deadline_s:
                break
            await self._topology.newer_than(topology.version, PAUSE_S)
        if reply is None:
            raise Unavailable(
                f"the primary of shard {call.shard} of {schema.name!r} did not answer in time: "
                f"{failure.message}"
            )
        return reply

    async def _rows_of(self, keys: LoadKeys, chunks: Sequence[str]) -> list[Receipt]:
        """Raises: InvalidRequest when the chunks are none, too many, there twice or not staged."""
        if not 1 <= len(chunks) <= limits.LOAD_CHUNKS_MAX or len(set(chunks)) < len(chunks):
            raise InvalidRequest(
                f"the load names {len(chunks)} chunks",
                field="chunks",
                limit=f"1 to {limits.LOAD_CHUNKS_MAX} distinct chunks",
            )
        receipts = []
        for name, receipt in zip(chunks, await self._receipts(keys, chunks), strict=True):
            if receipt is None:
                raise InvalidRequest(f"chunk {name} is not staged", field="chunks")
            receipts.append(receipt)
        return receipts

    async def _receipts(self, keys: LoadKeys, chunks: Sequence[str]) -> list[Receipt | None]:
        known = self._known.pop(keys, {})
        self._known[keys] = known  # the newest is last
        while len(self._known) > LOADS_KNOWN_MAX:
            del self._known[next(iter(self._known))]
        turns = asyncio.Semaphore(RECEIPTS_AT_ONCE)

        async def learn(chunk: str) -> None:
            async with turns:
                receipt = await read_receipt(self._store, keys, chunk)
                if receipt is not None:
                    known[chunk] = receipt

        await asyncio.gather(*(learn(chunk) for chunk in chunks if chunk not in known))
        return [known.get(chunk) for chunk in chunks]

    async def _staged(self, keys: LoadKeys) -> list[str]:
        found = await self._store.list(keys.receipts)
        return sorted(entry.key.removeprefix(keys.receipts) for entry in found)

    @staticmethod
    def _keys(schema: CollectionSchema, load: str) -> LoadKeys:
        """Of the shard that has the receipts."""
        return LoadKeys(schema.id, ShardNumber(0), load)

    def _schema(self, collection: str, load: str) -> CollectionSchema:
        _require_name(load, field="load_id")
        topology = self._topology.current()
        place = topology.collections.get(collection)
        if place is None:
            require_topology(topology)
            raise NotFound(f"collection {collection[:80]!r} does not exist", field="collection")
        schema = place.schema
        if schema.partition_by is not None and schema.shards > 1:
            raise InvalidRequest(
                f"{schema.name!r} has {schema.shards} shards that {schema.partition_by!r} chooses: "
                "a point that is there may be in another shard, where a bulk load cannot replace "
                "it; use bulk_upsert",
                field="collection",
            )
        return schema


def _by_shard(
    rows: StagedRows, ids: Sequence[str], schema: CollectionSchema
) -> dict[ShardNumber, StagedRows]:
    """Splits rows by the shard of their ids, keeping their order."""
    if schema.shards == 1:
        return {ShardNumber(0): rows}
    places: dict[ShardNumber, list[int]] = {}
    for place, point_id in enumerate(ids):
        places.setdefault(shard_of_id(PointId(point_id), schema.shards), []).append(place)
    return {
        shard: StagedRows(
            ids=[rows.ids[place] for place in chosen],
            vectors=rows.vectors[chosen],
            tails=[rows.tails[place] for place in chosen],
        )
        for shard, chosen in sorted(places.items())
    }


def _require_name(name: str, *, field: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:80]!r} is no name for it: it becomes part of an object's name",
            field=field,
            limit="1 to 64 of 0-9, a-z and -, not starting with -",
        )
