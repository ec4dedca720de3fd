"""What a shard remembers of answered requests."""

import random

import pytest

from shoal_cluster.domain import limits
from shoal_cluster.domain.errors import Indeterminate
from shoal_cluster.domain.ids import Epoch, Seq
from shoal_cluster.shard.dedup import Answer, Dedup

WINDOW = limits.DEDUP_REQUESTS_PER_CLIENT_MAX


def answer(number: int) -> Answer:
    return Answer(
        epoch=Epoch(1), last_seq=Seq(number), first_seq=Seq(number), affected=1, more=False
    )


def test_the_first_answer_is_found_again():
    dedup = Dedup()
    assert dedup.find("a", 1) is None
    dedup.remember("a", 1, answer(7))
    assert dedup.find("a", 1) == answer(7)
    assert dedup.find("a", 2) is None
    assert dedup.find("b", 1) is None


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
        dedup.remember("a", number, answer(number))
    for number in numbers:
        try:
            assert dedup.find("a", number) == answer(number)
        except Indeterminate as error:
            assert number <= WINDOW, "only the older half may be forgotten"
            assert error.limit == f"{WINDOW} requests in flight a client"
    assert dedup.find("a", 2 * WINDOW + 1) is None


def test_the_least_recently_writing_client_is_forgotten_first():
    dedup = Dedup()
    for client in range(limits.DEDUP_CLIENTS_MAX):
        dedup.remember(f"c{client}", 1, answer(client))
    dedup.remember("c0", 2, answer(0))
    dedup.remember("one-more", 1, answer(0))
    assert dedup.find("c0", 1) is not None
    assert dedup.find("c1", 1) is None


def test_what_is_remembered_is_bounded():
    dedup = Dedup()
    for client in range(limits.DEDUP_CLIENTS_MAX):
        for number in range(1, 90):
            dedup.remember(f"c{client}", number, answer(number))
    assert len(dedup) <= limits.DEDUP_REQUESTS_MAX


@pytest.mark.parametrize("seed", range(5))
def test_a_restored_memory_goes_on_as_the_original(seed):
    """D-1: also about what is forgotten next."""
    rng = random.Random(seed)
    original = Dedup()

    def remember(dedups: list[Dedup], steps: int) -> None:
        for _ in range(steps):
            client, number = f"c{rng.randrange(300)}", rng.randrange(1, 2000)
            for dedup in dedups:
                dedup.remember(client, number, answer(number))

    remember([original], 5000)
    for number in range(1, WINDOW + 50):
        original.remember("busy", number, answer(number))
    copy = Dedup.restore(original.snapshot())
    assert copy.snapshot() == original.snapshot()
    with pytest.raises(Indeterminate):
        copy.find("busy", 1)
    remember([original, copy], 2000)
    assert copy.snapshot() == original.snapshot()
