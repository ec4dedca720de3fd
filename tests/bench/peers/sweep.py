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
    """All that was tried. finished: False when time ran out before every chain was searched."""

    tried: Sequence[Tried]
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """reached: False when no setting did; `tried` is then the one with the highest recall."""

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
    tried: list[Tried] = []
    for chain in chains:
        found: dict[int, Tried] = {}
        for target in sorted(targets, reverse=True):
            low, high = 0, len(chain) - 1
            while low < high or low not in found:
                middle = (low + high) // 2
                if middle not in found:
                    if tried and not time_left():
                        return Sweep(tried=tried, finished=False)
                    found[middle] = measure(chain[middle])
                    tried.append(found[middle])
                if low == high:
                    break
                if found[middle].recall >= target:
                    high = middle
                else:
                    low = middle + 1
    return Sweep(tried=tried, finished=True)


def choose(tried: Sequence[Tried], target: float) -> Chosen:
    """Returns the cheapest setting that reaches the target, or the nearest to it."""
    enough = [each for each in tried if each.recall >= target]
    if enough:
        cheapest = min(enough, key=lambda each: each.mean_ms)
        return Chosen(target=target, tried=cheapest, reached=True)
    nearest = max(tried, key=lambda each: (each.recall, -each.mean_ms))
    return Chosen(target=target, tried=nearest, reached=False)


def text_of(setting: Mapping[str, Any]) -> str:
    """Returns a setting as one short phrase: `ef_search 64, refine 2`."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "-"
