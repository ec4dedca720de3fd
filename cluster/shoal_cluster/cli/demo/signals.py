"""Makes every polite way of ending a process unwind its stack, so that nothing is left running."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None] | int

_TERMINATIONS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def unwound_by_termination() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into SystemExit with the status a shell gives them.

    To be entered again after each use of Ray in this process: Ray's driver puts its own handler in
    place, and leaves the system's, which ends the process at once, when it disconnects.
    """
    with _handled(dict.fromkeys(_TERMINATIONS, _leave)):
        yield


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Lets a second Ctrl-C not cut a clean-up short; what it guards has to be bounded."""
    with _handled(dict.fromkeys((signal.SIGINT, *_TERMINATIONS), signal.SIG_IGN)):
        yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    # Only the main thread may set handlers, and only it receives signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
