"""Which setting a comparison measures, and what it does when none is good enough."""

import pytest

from tests.bench.peers.peer import Setting
from tests.bench.peers.sweep import Tried, choose, sweep, text_of

TARGETS = (0.95, 0.99)


class Curve:
    """An engine whose recall and cost are known for every `ef`; remembers what was asked."""

    def __init__(self, points: dict[int, tuple[float, float]]) -> None:
        self._points = points
        self.asked: list[int] = []

    def measure(self, setting: Setting) -> Tried:
        self.asked.append(setting["ef"])
        recall, mean_ms = self._points[setting["ef"]]
        return Tried(setting=setting, recall=recall, mean_ms=mean_ms, p50_ms=mean_ms, queries=500)


def _chain(*efs: int) -> list[Setting]:
    return [{"ef": ef} for ef in efs]


def _tried(recall: float, mean_ms: float) -> Tried:
    return Tried(setting={}, recall=recall, mean_ms=mean_ms, p50_ms=mean_ms, queries=500)


def _always() -> bool:
    return True


@pytest.mark.parametrize("first", range(12))
def test_sweep_finds_the_first_setting_of_a_chain_that_reaches_each_target(first: int) -> None:
    recalls = {ef: 0.999 if ef > first else 0.96 if ef == first else 0.5 for ef in range(12)}
    curve = Curve({ef: (recall, 1.0 + ef) for ef, recall in recalls.items()})
    found = sweep([_chain(*range(12))], TARGETS, curve.measure, _always)
    assert found.finished
    assert choose(found.tried, 0.95).tried.setting == {"ef": first}
    higher = choose(found.tried, 0.99)
    assert higher.tried.setting == {"ef": min(first + 1, 11)}
    assert higher.reached == (first < 11)
    assert len(curve.asked) == len(set(curve.asked)) <= 7, "half of the chain and no setting twice"


def test_sweep_tries_every_chain() -> None:
    curve = Curve({10: (0.99, 9), 1: (0.2, 2), 2: (0.995, 4)})
    found = sweep([_chain(10), _chain(1, 2)], TARGETS, curve.measure, _always)
    assert choose(found.tried, 0.99).tried.setting == {"ef": 2}


def test_sweep_that_runs_out_of_time_has_tried_one_setting_and_says_so() -> None:
    curve = Curve({10: (0.5, 1), 20: (0.6, 1)})
    found = sweep([_chain(10, 20)], TARGETS, curve.measure, lambda: False)
    assert [each.setting for chain in found.tried for each in chain] == [{"ef": 10}]
    assert not found.finished


def test_cheapest_chain_that_reaches_the_recall_is_chosen_not_the_first() -> None:
    slow, quick = _tried(0.96, 5.0), _tried(0.97, 3.0)
    chosen = choose([[_tried(0.9, 1.0), slow], [quick]], 0.95)
    assert chosen.reached
    assert chosen.tried is quick


def test_noise_does_not_make_a_later_setting_of_a_chain_the_cheaper_one() -> None:
    disturbed, later = _tried(0.96, 5.0), _tried(0.99, 3.0)
    assert choose([[disturbed, later]], 0.95).tried is disturbed


def test_engine_that_never_reaches_the_recall_is_measured_at_its_best_and_marked() -> None:
    best = _tried(0.93, 9.0)
    chosen = choose([[_tried(0.9, 1.0), best], [_tried(0.93, 12.0)]], 0.95)
    assert not chosen.reached
    assert chosen.tried is best


def test_setting_is_told_in_one_phrase() -> None:
    assert text_of({"ef": 64, "refine_factor": 2}) == "ef 64, refine_factor 2"
    assert text_of({}) == "-"
