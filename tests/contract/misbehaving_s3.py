"""A tiny S3 on loopback that misbehaves on chosen puts, to show what a client makes of it."""

import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STALL_S_MAX = 10.0


class Misbehaviour(enum.Enum):
    CONFLICT_NOT_STORED = "conflict_not_stored"
    APPLY_THEN_500 = "apply_then_500"
    APPLY_THEN_DROP = "apply_then_drop"
    APPLY_THEN_STALL = "apply_then_stall"
    DROP = "drop"
    THROTTLE = "throttle"
    FORBID = "forbid"
    RIVAL_THEN_CONFLICT = "rival_then_conflict"


class MisbehavingS3:
    """State of the server: objects by path, misbehaviours to come, puts seen."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.objects: dict[str, bytes] = {}
        self.misbehaviours: list[Misbehaviour] = []
        self.rival = b""
        self.puts = 0
        self.client_left = threading.Event()
        self.lock = threading.Lock()

    def put(self, path: str, body: bytes) -> bool:
        with self.lock:
            if path in self.objects:
                return False
            self.objects[path] = body
            return True


@contextmanager
def misbehaving_s3() -> Iterator[MisbehavingS3]:
    """Runs the server in a thread; its bucket is `bucket`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("If-None-Match") != "*":
                self._answer(400, b"put without precondition")
                return
            with state.lock:
                state.puts += 1
                how = state.misbehaviours.pop(0) if state.misbehaviours else None
            if how is None:
                self._answer(200 if state.put(self.path, body) else 412)
                return
            if how is Misbehaviour.RIVAL_THEN_CONFLICT:
                state.put(self.path, state.rival)
            elif how.value.startswith("apply"):
                state.put(self.path, body)
            match how:
                case Misbehaviour.CONFLICT_NOT_STORED | Misbehaviour.RIVAL_THEN_CONFLICT:
                    self._answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>")
                case Misbehaviour.APPLY_THEN_500:
                    self._answer(500, b"<Error><Code>InternalError</Code></Error>")
                case Misbehaviour.THROTTLE:
                    self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
                case Misbehaviour.FORBID:
                    self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
                case Misbehaviour.APPLY_THEN_STALL:
                    state.client_left.wait(STALL_S_MAX)
                    self.close_connection = True
                case Misbehaviour.APPLY_THEN_DROP | Misbehaviour.DROP:
                    self.close_connection = True

        def do_GET(self) -> None:
            body = state.objects.get(self.path)
            if body is None:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            else:
                self._answer(200, body)

        def _answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("ETag", '"0"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = MisbehavingS3(
        f"s3://bucket?endpoint=http://127.0.0.1:{server.server_port}"
        "&allow_http=true&region=us-east-1"
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        state.client_left.set()
        server.shutdown()
        server.server_close()
        thread.join()
