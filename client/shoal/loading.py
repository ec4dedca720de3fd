"""A bulk load as the client sees it: stage every chunk, then commit. No I/O of its own.

Every call of a load may be repeated, so they are retried like reads. What was staged before, by an
earlier run under the same load id, is compared by its digest and not sent again.
"""

import re
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from uuid import uuid4

from shoal.batches import Batch
from shoal.calls import Call, Sending
from shoal.errors import Conflict, InvalidRequest, ShoalError
from shoal.load_sources import Chunks
from shoal.rpc import Method
from shoal.schema import Model, model_to_proto
from shoal.session import Sessions
from shoal_protos.v1 import loads_pb2

IN_FLIGHT = 2
"""Chunks on their way: one is checked and stored while the next is read and sent."""

_LOAD_ID = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far a load is. rows_total: None while unknown. segments_total: 0 while rows are staged.

    rows_skipped: of rows_staged, those that an earlier run had staged.
    """

    load_id: str
    rows_staged: int
    rows_skipped: int = 0
    rows_total: int | None = None
    segments_done: int = 0
    segments_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """A committed load: its rows are durable, visible and indexed."""

    load_id: str
    rows: int


Progress = Callable[[LoadProgress], None]


class Load:
    """One run of one load: which calls to make, and what their replies mean.

    Chunks are named `{part}-{number}`; part: of this client, "0" unless several load together.
    """

    def __init__(
        self,
        collection: str,
        chunks: Chunks,
        *,
        load_id: str | None,
        model: Model | None,
        progress: Progress | None,
        sessions: Sessions,
        part: str = "0",
    ) -> None:
        self.load_id = checked_load_id(uuid4().hex if load_id is None else load_id)
        self._collection = collection
        self._chunks = chunks
        self._model = model
        self._tell = progress
        self._sessions = sessions
        self._part = part
        self._staged: Mapping[str, int] = {}
        self._rows = self._skipped = 0
        self._counting = threading.Lock()
        self.names: list[str] = []
        self.is_decided = False
        self._committed: loads_pb2.CommitLoadResponse | None = None

    def describe(self) -> Call[None]:
        """The first call: finds out what an earlier run has done."""
        with Sending("load_id"):
            request = loads_pb2.DescribeLoadRequest(
                collection=self._collection, load_id=self.load_id
            )
        return Call(
            method=Method.DESCRIBE_LOAD, request=request, is_write=False, decode=self._described
        )

    def _described(self, response: loads_pb2.DescribeLoadResponse) -> None:
        if response.aborted:
            raise Conflict(
                f"load {self.load_id} was aborted; choose another load_id", field="load_id"
            )
        self.is_decided = response.committing
        self._staged = {chunk.name: chunk.digest for chunk in response.chunks}

    def stages(self) -> Iterator["Call[None]"]:
        """Yields a call for each chunk that is not staged yet, reading the source as it is asked.

        Raises: Conflict when the source is not the one that an earlier run has staged.
        """
        for number, batch in enumerate(self._chunks.batches):
            name = f"{self._part}-{number:08d}"
            digest = digest_of(batch)
            self.names.append(name)
            earlier = self._staged.get(name)
            if earlier is None:
                yield self._stage(name, digest, batch)
            elif earlier == digest:
                self._skipped += len(batch.ids)
                self._note_rows(len(batch.ids))
            else:
                raise Conflict(
                    f"chunk {number} differs from what load {self.load_id} has staged: the source "
                    "has changed. Abort the load, or choose another load_id",
                    field="source",
                )

    def _stage(self, name: str, digest: int, batch: Batch) -> Call[None]:
        with Sending("source"):
            request = loads_pb2.StageChunkRequest(
                collection=self._collection,
                load_id=self.load_id,
                chunk=name,
                digest=digest,
                rows=batch.to_rows(),
                model=model_to_proto(self._model),
            )
        count = len(batch.ids)
        return Call(
            method=Method.STAGE_CHUNK,
            request=request,
            is_write=False,
            decode=lambda _response: self._note_rows(count),
        )

    def _note_rows(self, count: int) -> None:
        with self._counting:  # chunks are sent from several threads
            self._rows += count
            self._report()

    def commit(self) -> Call[bool]:
        """The last call, made again until it returns True."""
        with Sending("load_id"):
            request = loads_pb2.CommitLoadRequest(
                collection=self._collection,
                load_id=self.load_id,
                chunks=() if self.is_decided else self.names,
            )
        return Call(
            method=Method.COMMIT_LOAD, request=request, is_write=False, decode=self._progressed
        )

    def _progressed(self, response: loads_pb2.CommitLoadResponse) -> bool:
        if response.committed:
            self._sessions.observe(self._collection, response.session)
            self._committed = response
        self._report(response.segments_done, response.segments_total)
        return response.committed

    @property
    def result(self) -> LoadResult:
        assert self._committed is not None, "asked once it is committed"
        return LoadResult(load_id=self.load_id, rows=self._committed.rows)

    def told(self, error: ShoalError) -> ShoalError:
        """Adds how to go on; what is staged stays for a day at least."""
        error.message = (
            f"{error.message} (load {self.load_id}: {self._rows} rows are staged; the same load "
            "again under this load_id goes on from there)"
        )
        return error

    def _report(self, segments_done: int = 0, segments_total: int = 0) -> None:
        if self._tell is not None:
            self._tell(
                LoadProgress(
                    load_id=self.load_id,
                    rows_staged=self._rows,
                    rows_skipped=self._skipped,
                    rows_total=self._chunks.rows_total,
                    segments_done=segments_done,
                    segments_total=segments_total,
                )
            )


def abort_call(collection: str, load_id: str) -> Call[None]:
    with Sending("load_id"):
        request = loads_pb2.AbortLoadRequest(
            collection=collection, load_id=checked_load_id(load_id)
        )
    return Call(
        method=Method.ABORT_LOAD, request=request, is_write=False, decode=lambda _response: None
    )


def checked_load_id(load_id: str) -> str:
    """Raises: InvalidRequest unless it can be part of an object's name."""
    if not isinstance(load_id, str) or not _LOAD_ID.fullmatch(load_id):
        raise InvalidRequest(
            f"load_id {load_id!r} is no name",
            field="load_id",
            limit="1 to 64 of 0-9, a-z and -, not starting with -",
        )
    return load_id


def digest_of(batch: Batch) -> int:
    """Returns a checksum of a chunk's ids, vectors and payloads, to tell a changed source."""
    digest = zlib.crc32("\0".join(batch.ids).encode(errors="replace"))
    digest = zlib.crc32(batch.vectors.data, digest)
    for payload in batch.payloads or ():
        digest = zlib.crc32(payload, digest)
    return zlib.crc32(repr(batch.attributes).encode(errors="replace"), digest)
