"""Answers to requests that were already carried out, so that a retried write is applied once.

Part of the shard's state: fed only by WAL records in order, hence equal on every replica, and kept
across restarts by the WAL and by the manifest's snapshot.

Invariants:
D-1 what is remembered is a function of the records applied, in order.
D-2 of a client that is remembered, no request is carried out twice: what is no longer remembered
    is refused.

A client that wrote nothing while DEDUP_CLIENTS_MAX others did is forgotten whole; a retry of its is
then taken for a first request. SDKs retry for seconds, so this takes hundreds of clients a second
on one shard.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Indeterminate
from shoal_cluster.domain.ids import Epoch, Seq


class Answer(NamedTuple):
    """What the client was told: see shard/calls.py WriteReply."""

    epoch: Epoch
    last_seq: Seq
    first_seq: Seq
    affected: int
    more: bool


class _Window:
    """The requests of one client with the largest numbers. forgotten: the largest one dropped."""

    def __init__(self, forgotten: int = 0) -> None:
        self.answers: dict[int, Answer] = {}
        self.forgotten = forgotten
        self._numbers: list[int] = []  # a heap of the keys of `answers`

    def add(self, request_no: int, answer: Answer) -> None:
        if request_no not in self.answers:
            heapq.heappush(self._numbers, request_no)
        self.answers[request_no] = answer
        if len(self.answers) > limits.DEDUP_REQUESTS_PER_CLIENT_MAX:
            smallest = heapq.heappop(self._numbers)
            del self.answers[smallest]
            self.forgotten = max(self.forgotten, smallest)


class Dedup:
    """The last answers of each client; least recently writing clients are forgotten first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, _Window] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, client_id: str, request_no: int) -> Answer | None:
        """Returns the first answer to a request, or None when it was never carried out.

        Raises: Indeterminate for a number that may have been carried out and forgotten (D-2).
        """
        window = self._clients.get(client_id)
        if window is None:
            return None
        answer = window.answers.get(request_no)
        if answer is None and request_no <= window.forgotten:
            raise Indeterminate(
                f"request {request_no} of client {client_id} is older than the last "
                f"{limits.DEDUP_REQUESTS_PER_CLIENT_MAX} it made; whether it was applied is no "
                "longer known: read the points to find out",
                field="request_id.request_no",
                limit=f"{limits.DEDUP_REQUESTS_PER_CLIENT_MAX} requests in flight a client",
            )
        return answer

    def remember(self, client_id: str, request_no: int, answer: Answer) -> None:
        """Remembers an answer, and forgets what has no room any more."""
        window = self._clients.get(client_id)
        if window is None:
            window = self._clients[client_id] = _Window()
        self._clients.move_to_end(client_id)
        self._count -= len(window.answers)
        window.add(request_no, answer)
        self._count += len(window.answers)
        while (
            len(self._clients) > limits.DEDUP_CLIENTS_MAX or self._count > limits.DEDUP_REQUESTS_MAX
        ):
            _, dropped = self._clients.popitem(last=False)
            self._count -= len(dropped.answers)

    def snapshot(self) -> list[Any]:
        """Returns everything remembered, least recent client first, msgpack-able."""
        return [
            [
                client_id,
                window.forgotten,
                [[request_no, *answer] for request_no, answer in window.answers.items()],
            ]
            for client_id, window in self._clients.items()
        ]

    @staticmethod
    def restore(snapshot: Sequence[Any]) -> "Dedup":
        """Reverses `snapshot`."""
        dedup = Dedup()
        for client_id, forgotten, answers in snapshot:
            window = dedup._clients[client_id] = _Window(forgotten)
            for request_no, *answer in answers:
                window.add(request_no, Answer(*answer))
            dedup._count += len(window.answers)
        return dedup
