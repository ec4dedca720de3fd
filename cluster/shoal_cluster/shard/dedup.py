"""Answers to requests that were already carried out, so that a retried write is applied once.

Part of the shard's state: fed only by WAL records in order, hence equal on every replica, and kept
across restarts by the WAL and by the manifest's snapshot.

Invariant D-1: what is remembered is a function of the records applied, in order.
"""

from collections import OrderedDict
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


class Dedup:
    """The last answers of each client; least recently writing clients are forgotten first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[int, Answer]] = OrderedDict()
        self._count = 0

    def find(self, client_id: str, request_no: int) -> Answer | None:
        """Returns the first answer to a request, or None when it was never carried out.

        Raises: Indeterminate for a number older than everything remembered of a client that has
        written a full window since: whether it was applied can no longer be told.
        """
        answers = self._clients.get(client_id)
        if answers is None:
            return None
        answer = answers.get(request_no)
        if (
            answer is None
            and len(answers) >= limits.DEDUP_REQUESTS_PER_CLIENT_MAX
            and request_no < min(answers)
        ):
            raise Indeterminate(
                f"request {request_no} of client {client_id} is older than the last "
                f"{limits.DEDUP_REQUESTS_PER_CLIENT_MAX} it made; whether it was applied is no "
                "longer known: read the points to find out",
                field="request_id.request_no",
                limit=f"{limits.DEDUP_REQUESTS_PER_CLIENT_MAX} requests in flight a client",
            )
        return answer

    def remember(self, client_id: str, request_no: int, answer: Answer) -> None:
        answers = self._clients.setdefault(client_id, OrderedDict())
        self._clients.move_to_end(client_id)
        if request_no not in answers:
            self._count += 1
        answers[request_no] = answer
        if len(answers) > limits.DEDUP_REQUESTS_PER_CLIENT_MAX:
            answers.popitem(last=False)
            self._count -= 1
        while (
            len(self._clients) > limits.DEDUP_CLIENTS_MAX
            or self._count > limits.DEDUP_REQUESTS_MAX
        ):
            _, forgotten = self._clients.popitem(last=False)
            self._count -= len(forgotten)

    def snapshot(self) -> list[Any]:
        """Returns everything remembered, oldest first, msgpack-able."""
        return [
            [client_id, [[request_no, *answer] for request_no, answer in answers.items()]]
            for client_id, answers in self._clients.items()
        ]

    @staticmethod
    def restore(snapshot: list[Any]) -> "Dedup":
        """Reverses `snapshot`."""
        dedup = Dedup()
        for client_id, answers in snapshot:
            for request_no, *answer in answers:
                dedup.remember(client_id, request_no, Answer(*answer))
        return dedup
