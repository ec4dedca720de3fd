"""An HTTP proxy on loopback that does to an S3 server what networks and S3 itself do.

Requests reach the server one PUT at a time, so that its conditional puts are atomic whatever its
threads do. What befalls a request is drawn from a seed; which request draws first is up to the
threads, so a run is not reproducible to the byte. How many requests a run makes is up to time, too:
a misfortune that chance left out of as many PUTs as should have met it once befalls the next.
"""

import enum
import http.client
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FORWARD_TIMEOUT_S = 20.0
_HOP_HEADERS = frozenset({"connection", "transfer-encoding", "keep-alive", "content-length"})


class Misfortune(enum.Enum):
    """What befell a request."""

    NONE = "none"
    CONFLICT_NOT_STORED = "conflict_not_stored"
    """PUT: S3's 409 for a race that somebody else may not have won either."""
    LANDS_LATE = "lands_late"
    """PUT: answered 500 at once, and carried out a little later."""
    REPLY_LOST = "reply_lost"
    """PUT, DELETE: carried out, then the connection is dropped."""
    REQUEST_LOST = "request_lost"
    """all: the connection is dropped."""
    UNAVAILABLE = "unavailable"
    """all: 503 SlowDown, and so are the next few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfortunes:
    """Probability of each for a request it can befall."""

    conflict_not_stored: float = 0.0
    lands_late: float = 0.0
    reply_lost: float = 0.0
    request_lost: float = 0.0
    unavailable: float = 0.0
    burst: int = 2
    late_s_max: float = 0.3


FORTUNE = Misfortunes()
_OF_PUT = (
    Misfortune.CONFLICT_NOT_STORED,
    Misfortune.LANDS_LATE,
    Misfortune.REPLY_LOST,
    Misfortune.REQUEST_LOST,
    Misfortune.UNAVAILABLE,
)
_OF_DELETE = (Misfortune.REPLY_LOST, Misfortune.REQUEST_LOST, Misfortune.UNAVAILABLE)
_OF_READ = (Misfortune.REQUEST_LOST, Misfortune.UNAVAILABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class FaultyProxy:
    """The proxy's state. `plan` may be changed while it runs."""

    def __init__(self, host: str, port: int, seed: int) -> None:
        self.plan = FORTUNE
        self.counts: Counter[str] = Counter()
        self.port = 0
        self._server = (host, port)
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._putting = threading.Lock()
        self._burst_left = 0
        self._puts = 0
        self._late: list[threading.Timer] = []

    def url(self, prefix: str) -> str:
        """Returns the bucket URL that leads through the proxy."""
        return (
            f"s3://shoal-test/{prefix}?endpoint=http://127.0.0.1:{self.port}"
            "&allow_http=true&region=us-east-1"
        )

    def draw(self, method: str) -> Misfortune:
        with self._lock:
            found = self._draw(method)
            self.counts[found.value] += 1
            return found

    def _draw(self, method: str) -> Misfortune:
        if self._burst_left > 0:
            self._burst_left -= 1
            return Misfortune.UNAVAILABLE
        if method == "PUT" and (overdue := self._overdue()) is not None:
            return overdue
        point = self._rng.random()
        for misfortune in {"PUT": _OF_PUT, "DELETE": _OF_DELETE}.get(method, _OF_READ):
            point -= getattr(self.plan, misfortune.value)
            if point < 0:
                if misfortune is Misfortune.UNAVAILABLE:
                    self._burst_left = self.plan.burst - 1
                return misfortune
        return Misfortune.NONE

    def _overdue(self) -> Misfortune | None:
        """Counts a PUT, and returns what should have befallen one by now and did not."""
        if self.plan == FORTUNE:
            return None
        self._puts += 1
        for misfortune in _OF_PUT:
            expected = self._puts * getattr(self.plan, misfortune.value)
            if expected > 1 and not self.counts[misfortune.value]:
                return misfortune
        return None

    def carry_out(self, method: str, path: str, headers: dict[str, str], body: bytes) -> _Answer:
        """Sends a request on to the server."""
        if method != "PUT":
            return self._send(method, path, headers, body)
        with self._putting:
            return self._send(method, path, headers, body)

    def carry_out_late(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        delay_s = self._rng.random() * self.plan.late_s_max
        timer = threading.Timer(delay_s, self.carry_out, (method, path, headers, body))
        with self._lock:
            self._late.append(timer)
        timer.start()

    def settle(self) -> None:
        """Waits until every late put has landed."""
        with self._lock:
            late, self._late = self._late, []
        for timer in late:
            timer.join(FORWARD_TIMEOUT_S)

    def _send(self, method: str, path: str, headers: dict[str, str], body: bytes) -> _Answer:
        connection = http.client.HTTPConnection(*self._server, timeout=FORWARD_TIMEOUT_S)
        try:
            connection.request(method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            kept = tuple(
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in _HOP_HEADERS
                or (method == "HEAD" and name.lower() == "content-length")
            )
            return _Answer(status=answer.status, headers=kept, body=answer.read())
        finally:
            connection.close()


@contextmanager
def faulty_proxy(host: str, port: int, seed: int) -> Iterator[FaultyProxy]:
    """Runs a proxy in front of the server at host:port."""
    proxy = FaultyProxy(host, port, seed)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in _HOP_HEADERS
            }
            request = (self.command, self.path, headers, body)
            match proxy.draw(self.command):
                case Misfortune.NONE:
                    self._answer(proxy.carry_out(*request))
                case Misfortune.CONFLICT_NOT_STORED:
                    self._refuse(409, b"ConditionalRequestConflict")
                case Misfortune.UNAVAILABLE:
                    self._refuse(503, b"SlowDown")
                case Misfortune.LANDS_LATE:
                    proxy.carry_out_late(*request)
                    self._refuse(500, b"InternalError")
                case Misfortune.REPLY_LOST:
                    proxy.carry_out(*request)
                    self.close_connection = True
                case Misfortune.REQUEST_LOST:
                    self.close_connection = True

        def _refuse(self, status: int, code: bytes) -> None:
            self._answer(_Answer(status=status, body=b"<Error><Code>" + code + b"</Code></Error>"))

        def _answer(self, answer: _Answer) -> None:
            self.send_response_only(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            if self.command != "HEAD":  # its length is the server's, not that of what came
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            return None

    for method in ("GET", "PUT", "DELETE", "HEAD", "POST"):
        setattr(Handler, f"do_{method}", Handler._handle)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """The client gave up waiting: nothing to say."""

    server = Server(("127.0.0.1", 0), Handler)
    proxy.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.settle()
        server.shutdown()
        server.server_close()
        thread.join(FORWARD_TIMEOUT_S)
