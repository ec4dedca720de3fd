"""Finds the cheapest setting that reaches a recall: searches chains of settings by halves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.peers.peer import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One setting, asked by one client. mean_ms: what it costs; p50_ms: for the curves."""

    setting: Setting
    recall: float
    mean_ms: float
    p50_ms: float
    queries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """tried: what was tried of each chain, in the chain's order.

    finished: False when time ran out before every chain was searched.
    """

    tried: Sequence[Sequence[Tried]]
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """reached: False when no setting did; `tried` is then one with the highest recall."""

    target: float
    tried: Tried
    reached: bool


def sweep(
    chains: Sequence[Sequence[Setting]],
    targets: Sequence[float],
    measure: Callable[[Setting], Tried],
    time_left: Callable[[], bool],
) -> Sweep:
    """Finds in each chain the first setting that reaches each target, halving what is left.

    Recall must not fall along a chain. time_left: asked before every measurement but the first.
    """
    found: list[dict[int, Tried]] = []
    finished = False
    for chain in chains:
        found.append({})
        finished = _search(chain, targets, measure, time_left, found)
        if not finished:
            break
    tried = [[each[place] for place in sorted(each)] for each in found if each]
    return Sweep(tried=tried, finished=finished)


def _search(
    chain: Sequence[Setting],
    targets: Sequence[float],
    measure: Callable[[Setting], Tried],
    time_left: Callable[[], bool],
    found: Sequence[dict[int, Tried]],
) -> bool:
    """Searches one chain; returns False when time runs out. found: of each chain, this one last."""
    here = found[-1]
    for target in sorted(targets, reverse=True):
        low, high = 0, len(chain) - 1
        while low < high or low not in here:
            middle = (low + high) // 2
            if middle not in here:
                if any(found) and not time_left():
                    return False
                here[middle] = measure(chain[middle])
            if low == high:
                break
            if here[middle].recall >= target:
                high = middle
            else:
                low = middle + 1
    return True


def choose(tried: Sequence[Sequence[Tried]], target: float) -> Chosen:
    """Returns the cheapest of the first settings of each chain that reach the target.

    Within a chain the order says which is cheaper, whatever a busy machine measured. When none
    reaches the target: the setting with the highest recall.
    """
    firsts = [next((each for each in chain if each.recall >= target), None) for chain in tried]
    enough = [each for each in firsts if each is not None]
    if enough:
        cheapest = min(enough, key=lambda each: each.mean_ms)
        return Chosen(target=target, tried=cheapest, reached=True)
    every = [each for chain in tried for each in chain]
    nearest = max(every, key=lambda each: (each.recall, -each.mean_ms))
    return Chosen(target=target, tried=nearest, reached=False)


def text_of(setting: Mapping[str, Any]) -> str:
    """Returns a setting as one short phrase: `ef_search 64, refine 2`."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "-"
