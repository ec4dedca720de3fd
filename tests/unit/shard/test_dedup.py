"""What a shard remembers of answered requests, and what it knows to have forgotten."""

import random

import pytest

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Indeterminate
from shoal_cluster.domain.ids import NO_SLOT, Epoch, Seq, Slot
from shoal_cluster.shard.dedup import Answer, Dedup

WINDOW = limits.DEDUP_REQUESTS_PER_CLIENT_MAX
SHARE = limits.DEDUP_REQUESTS_MAX // limits.DEDUP_CLIENTS_MAX


def answer(number: int, slot: int = 1) -> Answer:
    return Answer(
        epoch=Epoch(1),
        last_seq=Seq(number),
        first_seq=Seq(number),
        affected=1,
        more=False,
        slot=Slot(slot),
    )


def remember(dedup: Dedup, client: str, number: int, given: Answer) -> None:
    """As a record with one request does."""
    dedup.remember(client, number, given)
    dedup.make_room()


def find(dedup: Dedup, client: str, number: int, since: int = 0) -> Answer | None:
    return dedup.find(client, number, Slot(since))


def test_the_first_answer_is_found_again():
    dedup = Dedup()
    assert find(dedup, "a", 1) is None
    remember(dedup, "a", 1, answer(7))
    assert find(dedup, "a", 1) == answer(7)
    assert find(dedup, "a", 2) is None
    assert find(dedup, "b", 1) is None


def test_a_number_that_was_forgotten_is_refused_and_never_taken_for_a_first_request():
    """D-2, whatever the order in which the numbers came."""
    rng = random.Random(3)
    numbers = list(range(1, 2 * WINDOW + 1))
    for start in range(0, len(numbers), 40):  # concurrent requests overtake each other
        part = numbers[start : start + 40]
        rng.shuffle(part)
        numbers[start : start + 40] = part
    dedup = Dedup()
    for number in numbers:
        remember(dedup, "a", number, answer(number))
    for number in numbers:
        try:
            assert find(dedup, "a", number) == answer(number)
        except Indeterminate as error:
            assert number <= WINDOW, "only the older half may be forgotten"
            assert error.field == "request_id.request_no"
            assert error.limit == f"{SHARE} to {WINDOW} requests a client"
    assert find(dedup, "a", 2 * WINDOW + 1) is None


def test_a_client_that_waits_keeps_its_share_however_busy_the_others_are():
    """64 writers fill the memory of all; the one that waits for a lost reply is not pushed out."""
    dedup = Dedup()
    for number in range(1, SHARE + 4):
        remember(dedup, "waiting", number, answer(number))
    for number in range(1, 2 * WINDOW):
        for client in range(64):
            remember(dedup, f"busy-{client}", number, answer(number))
    for number in range(4, SHARE + 4):
        assert find(dedup, "waiting", number) == answer(number)
    with pytest.raises(Indeterminate, match="older than the last"):
        find(dedup, "waiting", 3)
    assert find(dedup, "waiting", SHARE + 4) is None
    assert len(dedup) == limits.DEDUP_REQUESTS_MAX


def test_an_unknown_client_is_refused_unless_nothing_was_forgotten_since():
    """D-3: the client least recently writing is forgotten whole, and that it was is remembered."""
    dedup = Dedup()
    for client in range(limits.DEDUP_CLIENTS_MAX):
        remember(dedup, f"c{client}", 1, answer(client, slot=10 + client))
    remember(dedup, "c0", 2, answer(0, slot=5000))
    assert find(dedup, "newcomer", 1, since=0) is None, "nobody was forgotten yet"
    remember(dedup, "one-more", 1, answer(0, slot=5001))
    assert find(dedup, "c0", 1) is not None
    for unknown in ("c1", "newcomer"):  # which of the two it is cannot be told
        with pytest.raises(Indeterminate) as refused:
            find(dedup, unknown, 1, since=10)
        assert refused.value.field == "request_id.client_id"
        assert find(dedup, unknown, 1, since=11) is None, "c1 wrote nothing after slot 11"
    assert find(dedup, "c2", 2, since=0) is None, "it is known, and so is that it sent no second"


def test_a_request_that_changed_nothing_is_forgotten_as_carefully_as_others():
    """It takes no sequence number, but a slot: no later one may pass for a time before it."""
    dedup = Dedup()
    for client in range(limits.DEDUP_CLIENTS_MAX + 1):
        remember(dedup, f"c{client}", 1, answer(7, slot=100 + client))
    with pytest.raises(Indeterminate):
        find(dedup, "c0", 1, since=99)
    assert find(dedup, "anybody", 1, since=100) is None


def test_nobody_is_forgotten_within_a_record():
    """Its requests were judged before it was applied; a later one of a client may stand first."""
    dedup = Dedup()
    dedup.remember("x", 2, answer(1, slot=1))
    for client in range(limits.DEDUP_CLIENTS_MAX):
        dedup.remember(f"c{client}", 1, answer(1, slot=1))
    dedup.remember("x", 1, answer(1, slot=1))
    dedup.make_room()
    assert find(dedup, "x", 1) is not None
    assert find(dedup, "x", 2) is not None
    with pytest.raises(Indeterminate):
        find(dedup, "c0", 1)


def test_what_is_remembered_is_bounded():
    dedup = Dedup()
    for client in range(limits.DEDUP_CLIENTS_MAX + 100):
        for number in range(1, 40):
            remember(dedup, f"c{client}", number, answer(number))
    assert len(dedup) <= limits.DEDUP_REQUESTS_MAX
    assert dedup.clients == limits.DEDUP_CLIENTS_MAX
    assert len(dedup._large) <= dedup.clients


@pytest.mark.parametrize("seed", range(5))
def test_a_restored_memory_goes_on_as_the_original(seed, monkeypatch):
    """D-1: also about what is forgotten next, and what was forgotten before."""
    monkeypatch.setattr(limits, "DEDUP_CLIENTS_MAX", 50)
    monkeypatch.setattr(limits, "DEDUP_REQUESTS_MAX", 200)
    monkeypatch.setattr(limits, "DEDUP_REQUESTS_PER_CLIENT_MAX", 20)
    rng = random.Random(seed)
    original = Dedup()
    slot = 0

    def remember_some(dedups: list[Dedup], steps: int, clients: int) -> None:
        nonlocal slot
        for _ in range(steps):
            slot += rng.randrange(2)
            client, number = f"c{rng.randrange(clients)}", rng.randrange(1, 2000)
            for dedup in dedups:
                remember(dedup, client, number, answer(number, slot))

    remember_some([original], 2000, clients=60)
    for number in range(1, 70):
        remember(original, "busy", number, answer(number, slot))
    copy = Dedup.restore(original.snapshot())
    assert copy.snapshot() == original.snapshot()
    assert copy.horizon == original.horizon > NO_SLOT
    with pytest.raises(Indeterminate):
        find(copy, "busy", 1)
    for clients in (40, 60):  # within the room there is, and beyond it
        remember_some([original, copy], 1000, clients)
        assert copy.snapshot() == original.snapshot()
        assert list(copy._large) == list(original._large)
        assert len(copy) <= 200
        assert copy.clients <= 50


@pytest.mark.parametrize("seed", range(20))
def test_no_request_is_ever_taken_for_a_first_one_twice(seed, monkeypatch):
    """D-2 and D-3 against a memory without bounds, over late, repeated and unknown requests."""
    monkeypatch.setattr(limits, "DEDUP_CLIENTS_MAX", 4)
    monkeypatch.setattr(limits, "DEDUP_REQUESTS_MAX", 12)
    monkeypatch.setattr(limits, "DEDUP_REQUESTS_PER_CLIENT_MAX", 6)
    rng = random.Random(seed)
    dedup = Dedup()
    carried_out: dict[tuple[str, int], Answer] = {}
    sent: list[tuple[str, int, int]] = []
    last: dict[str, int] = {}
    refused = 0
    for slot in range(1, 400):
        if not sent or rng.random() < 0.6:
            client = f"c{rng.randrange(8)}"
            last[client] = last.get(client, 0) + 1
            request = client, last[client], slot - 1  # the slot reached when it is first sent
            sent.append(request)
            if rng.random() < 0.2:
                continue  # and held up
        else:
            request = rng.choice(sent)
            if rng.random() < 0.5:
                request = *request[:2], 0  # sent again by somebody who does not know since when
        client, number, since = request
        try:
            known = find(dedup, client, number, since)
        except Indeterminate:
            refused += 1
            continue
        assert known == carried_out.get((client, number))
        if known is None:
            carried_out[client, number] = answer(number, slot)
            remember(dedup, client, number, carried_out[client, number])
    assert refused > 10
    assert len(carried_out) > 100
