"""A bulk upload as a state machine: which chunk goes next, given acknowledgements and failures.

The shells own the stream and the clock; this module owns the window, the retries and the count.
Steps of a shell: send every `next_chunk`; wait for a reply at most `wait_s`; tell it to `replied`;
when the stream broke or `is_stalled`, tell `stream_lost` and open another one.

Invariants
  U-1  No more chunks are sent and unacknowledged than the server's last window, and none is taken
       from the source while `in_flight` are unresolved (sent, or waiting to be sent again), so
       memory is bounded whatever the source yields.
  U-2  A chunk sent again carries the request id it had the first time, and says that it is sent
       again once it may have been applied.
  U-3  A chunk counts as done exactly once, when its acknowledgement arrives.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.arguments import checked_count
from shoal.errors import ShoalError
from shoal.retry import Attempts, GiveUp, Retries
from shoal.rpc import error_of_detail
from shoal_protos.v1 import points_pb2

BATCH_SIZE = 500
"""Rows a chunk: 0.8 MB at 384 dimensions, far from the largest request and from a single row."""

BATCH_SIZE_MAX = 1000
"""The server's bound on rows in one request."""

IN_FLIGHT = 4
"""Chunks unacknowledged: one being decoded, one being made durable, one on the way, one ready."""

IN_FLIGHT_MAX = 16
"""As many answers as a shard keeps of one client at the least, so that a retry is recognised."""

CHUNK_BYTES_MAX = 4 * 1024 * 1024
"""Half of what one shard writes as one record, which a chunk may need to fit as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What to upload.

    requests: one a chunk, made when it is needed. rows_total: None when not known beforehand.
    on_reply: sees every acknowledgement. progress: called after each with (rows done, rows in
    total or None).
    """

    requests: Iterator[points_pb2.UpsertRequest]
    rows_total: int | None
    on_reply: Callable[[points_pb2.UpsertResponse], None]
    progress: Callable[[int, int | None], None] | None


@dataclass(slots=True, kw_only=True)
class _Chunk:
    upsert: points_pb2.UpsertRequest
    attempts: Attempts
    due_s: float
    """When it may be sent (again)."""
    expires_s: float
    """When its current attempt has taken too long; meaningful while it is sent."""


class BulkUpload:
    """Times are seconds of any one monotonic clock. Owned by one thread or task.

    timeout_s bounds each chunk from its first sending to its acknowledgement.
    """

    def __init__(
        self,
        upload: Upload,
        *,
        in_flight: int,
        timeout_s: float,
        retries: Retries,
    ) -> None:
        in_flight = checked_count(in_flight, field="in_flight", most=IN_FLIGHT_MAX)
        self._upload = upload
        self._in_flight = in_flight
        self._timeout_s = timeout_s
        self._retries = retries
        self._window = 1
        self._chunk_no = 0
        self._sent: dict[int, _Chunk] = {}
        self._waiting: dict[int, _Chunk] = {}
        self._exhausted = False
        self.rows_done = 0

    @property
    def is_done(self) -> bool:
        return self._exhausted and not self._sent and not self._waiting

    def next_chunk(self, now_s: float) -> points_pb2.UpsertStreamRequest | None:
        """Returns what to send now, None when the window is full or nothing is due."""
        if len(self._sent) >= min(self._window, self._in_flight):
            return None
        due = min(
            (number for number, chunk in self._waiting.items() if chunk.due_s <= now_s),
            default=None,
        )
        if due is not None:
            number, chunk = due, self._waiting.pop(due)
        else:
            unresolved = len(self._sent) + len(self._waiting)
            if self._exhausted or unresolved >= self._in_flight:
                return None
            upsert = next(self._upload.requests, None)
            if upsert is None:
                self._exhausted = True
                return None
            self._chunk_no += 1
            number, chunk = self._chunk_no, self._fresh(upsert, now_s)
        chunk.expires_s = now_s + chunk.attempts.timeout_s(now_s)
        self._sent[number] = chunk
        return points_pb2.UpsertStreamRequest(chunk_no=number, upsert=chunk.upsert)

    def replied(self, reply: points_pb2.UpsertStreamResponse, now_s: float) -> None:
        """Takes one response of the stream.

        Raises: the ShoalError of a chunk that cannot be retried.
        """
        self._window = max(1, reply.window)
        fate = reply.WhichOneof("fate")
        if fate is None:
            return
        chunk = self._sent.pop(reply.chunk_no, None)
        if chunk is None:
            # An answer to an attempt that was given up; the later attempt has its own.
            return
        if fate == "error":
            self._retry(reply.chunk_no, chunk, error_of_detail(reply.error), now_s)
            return
        self.rows_done += len(chunk.upsert.rows.ids)
        self._upload.on_reply(reply.upserted)
        if self._upload.progress is not None:
            self._upload.progress(self.rows_done, self._upload.rows_total)

    def stream_lost(self, error: ShoalError, now_s: float) -> None:
        """Takes the end of the stream: what was unacknowledged goes again on the next one.

        Raises: `error`, or what became of it, when a chunk cannot be retried.
        """
        # The next server tells its own window.
        self._window = 1
        lost, self._sent = self._sent, {}
        for number, chunk in lost.items():
            self._retry(number, chunk, error, now_s)

    def is_stalled(self, now_s: float) -> bool:
        """Says whether an acknowledgement is overdue, so that the stream must be given up."""
        return any(chunk.expires_s <= now_s for chunk in self._sent.values())

    def wait_s(self, now_s: float) -> float:
        """Returns how long to wait for a response before looking again; 0 when something is due."""
        times_s = [chunk.expires_s for chunk in self._sent.values()]
        # A chunk that waits for a full window is woken by a response, not by the clock.
        if len(self._sent) < min(self._window, self._in_flight):
            times_s += [chunk.due_s for chunk in self._waiting.values()]
        return max(0.0, min(times_s, default=now_s) - now_s)

    def _fresh(self, upsert: points_pb2.UpsertRequest, now_s: float) -> _Chunk:
        attempts = self._retries.attempts(is_write=True, deadline_s=now_s + self._timeout_s)
        return _Chunk(upsert=upsert, attempts=attempts, due_s=now_s, expires_s=now_s)

    def _retry(self, number: int, chunk: _Chunk, error: ShoalError, now_s: float) -> None:
        verdict = chunk.attempts.failed(error, now_s)
        if isinstance(verdict, GiveUp):
            raise self._told(verdict.error)
        if chunk.attempts.maybe_applied:
            chunk.upsert.request_id.again = True
        chunk.due_s = now_s + verdict.wait_s
        self._waiting[number] = chunk

    def _told(self, error: ShoalError) -> ShoalError:
        """Adds how far the upload came; the rest can be sent by calling again."""
        rows_total = self._upload.rows_total
        total = "" if rows_total is None else f" of {rows_total}"
        error.message = f"after {self.rows_done}{total} rows were acknowledged: {error.message}"
        return error


STREAM_CLOSE_S = 1.0
"""How long a finished upload waits for the server to close the stream before cancelling it."""

STALLED = "the stream gave no acknowledgement in time"
ENDED_EARLY = "the server ended the stream before every chunk was acknowledged"
