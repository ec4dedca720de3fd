"""Answers to requests that were already carried out, so that a retried write is applied once.

Part of the shard's state: fed only by WAL records in order, hence equal on every replica, and kept
across restarts by the WAL and by the manifest's snapshot. Bounded, so answers are forgotten, but
never that they are: a request that may be among the forgotten is refused (protocol.md, 7).

Invariants:
D-1 what is remembered is a function of the records applied, in order.
D-2 of a client that is remembered, no request is carried out twice: its numbers up to
    `_Window.forgotten` are refused.
D-3 of a client that is not remembered, no request is carried out that may be in a record at or
    below `horizon`, the last slot of any client that was forgotten. A client that comes (back) then
    is remembered with that horizon and its number: what is older than both stays refused.

Who is forgotten. Over DEDUP_CLIENTS_MAX clients: the one that wrote least recently. Over
DEDUP_REQUESTS_MAX answers: the oldest answer of the least recently writing client that has more
than its share, DEDUP_REQUESTS_MAX / DEDUP_CLIENTS_MAX. So as many clients as fit keep their share
however busy the others are.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Indeterminate
from shoal_cluster.domain.ids import NO_SLOT, Epoch, Seq, Slot
from shoal_cluster.shard.calls import UNKNOWN_CLIENT


class Answer(NamedTuple):
    """What the client was told: see shard/calls.py WriteReply."""

    epoch: Epoch
    last_seq: Seq
    first_seq: Seq
    affected: int
    more: bool
    slot: Slot


class _Window:
    """The requests of one client with the largest numbers.

    first_no, horizon: the number with which the client came (back), and the horizon then. It was
    sent after that horizon, and so was every request with a larger number. forgotten: the largest
    number dropped. slot: of the client's last record, dropped or not.
    """

    __slots__ = ("_numbers", "answers", "first_no", "forgotten", "horizon", "slot")

    def __init__(self, first_no: int, horizon: Slot) -> None:
        self.answers: dict[int, Answer] = {}
        self.first_no = first_no
        self.horizon = horizon
        self.forgotten = 0
        self.slot = NO_SLOT
        self._numbers: list[int] = []  # a heap of the keys of `answers`

    def add(self, request_no: int, answer: Answer) -> None:
        if request_no not in self.answers:
            heapq.heappush(self._numbers, request_no)
        self.answers[request_no] = answer
        self.slot = max(self.slot, answer.slot)

    def forget_smallest(self) -> None:
        smallest = heapq.heappop(self._numbers)
        del self.answers[smallest]
        self.forgotten = max(self.forgotten, smallest)


class Dedup:
    """The last answers of each client. horizon: see D-3."""

    def __init__(self) -> None:
        self.horizon = NO_SLOT
        self._clients: OrderedDict[str, _Window] = OrderedDict()  # least recently writing first
        self._large: OrderedDict[str, _Window] = OrderedDict()  # those above their share, likewise
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def clients(self) -> int:
        return len(self._clients)

    def find(self, client_id: str, request_no: int, since: Slot) -> Answer | None:
        """Returns the first answer to a request, or None when it was never carried out.

        since: a slot that was full before the request can have been carried out (WriteCall).

        Raises: Indeterminate for a request that may have been carried out and forgotten (D-2, D-3).
        """
        window = self._clients.get(client_id)
        if window is None:
            _require_later(client_id, since, self.horizon)
            return None
        answer = window.answers.get(request_no)
        if answer is not None:
            return answer
        if request_no < window.first_no or since != NO_SLOT:
            # Without a `since` the number must do; with one it need not: the passes of two deletes
            # by filter are not sent in the order of their numbers.
            _require_later(client_id, since, window.horizon)
        if request_no <= window.forgotten:
            raise Indeterminate(
                f"the request is older than the last {len(window.answers)} of client {client_id} "
                "that are remembered; whether it was applied cannot be told: read the points to "
                "find out",
                field="request_id.request_no",
                limit=f"{_share()} to {limits.DEDUP_REQUESTS_PER_CLIENT_MAX} requests a client",
            )
        return None

    def remember(self, client_id: str, request_no: int, answer: Answer) -> None:
        """Remembers an answer. Call `make_room` after those of a whole record."""
        window = self._clients.get(client_id)
        if window is None:
            window = self._clients[client_id] = _Window(request_no, self.horizon)
        self._clients.move_to_end(client_id)
        self._count -= len(window.answers)
        window.add(request_no, answer)
        if len(window.answers) > limits.DEDUP_REQUESTS_PER_CLIENT_MAX:
            window.forget_smallest()
        self._count += len(window.answers)
        if len(window.answers) > _share():
            self._large[client_id] = window
            self._large.move_to_end(client_id)

    def make_room(self) -> None:
        """Forgets what has no room any more.

        Not within a record: each of its requests was judged by what was remembered before it.
        """
        while len(self._clients) > limits.DEDUP_CLIENTS_MAX:
            client_id, dropped = self._clients.popitem(last=False)
            self._large.pop(client_id, None)
            self._count -= len(dropped.answers)
            self.horizon = max(self.horizon, dropped.slot)
        while self._count > limits.DEDUP_REQUESTS_MAX:
            # Some client is above its share, or the shares would not add up to more.
            client_id, window = next(iter(self._large.items()))
            window.forget_smallest()
            self._count -= 1
            if len(window.answers) <= _share():
                del self._large[client_id]

    def snapshot(self) -> list[Any]:
        """Returns everything remembered, least recent client first, msgpack-able."""
        return [
            self.horizon,
            [
                [
                    client_id,
                    window.first_no,
                    window.horizon,
                    window.forgotten,
                    window.slot,
                    [[request_no, *answer] for request_no, answer in window.answers.items()],
                ]
                for client_id, window in self._clients.items()
            ],
        ]

    @staticmethod
    def restore(snapshot: Sequence[Any]) -> "Dedup":
        """Reverses `snapshot`."""
        dedup = Dedup()
        dedup.horizon, clients = snapshot
        for client_id, first_no, horizon, forgotten, slot, answers in clients:
            window = dedup._clients[client_id] = _Window(first_no, horizon)
            window.forgotten, window.slot = forgotten, slot
            for request_no, *answer in answers:
                window.add(request_no, Answer(*answer))
            dedup._count += len(window.answers)
            if len(window.answers) > _share():
                dedup._large[client_id] = window
        return dedup


def _share() -> int:
    """Returns how many answers a client keeps whatever the others do."""
    return limits.DEDUP_REQUESTS_MAX // limits.DEDUP_CLIENTS_MAX


def _require_later(client_id: str, since: Slot, horizon: Slot) -> None:
    """Raises: Indeterminate when a request of an unknown client may lie before the horizon."""
    if since < horizon:
        raise Indeterminate(
            f"client {client_id} may have written before slot {horizon}, and that is forgotten; "
            "whether the request was applied cannot be told: read the points to find out",
            field=UNKNOWN_CLIENT,
            limit=f"{limits.DEDUP_CLIENTS_MAX} clients",
        )
