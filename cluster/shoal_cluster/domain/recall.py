"""Estimates of the recall that users get, and how sure they are. Pure values.

docs/design/live-recall.md: invariant LR-3.
"""

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

_Z: Final = 2.326
"""98 % two-sided: what is promised is 95 %, of skewed distributions too."""


class FilterClass(enum.Enum):
    """How many of the live rows a search could return."""

    NONE = "none"
    """All: it had no filter."""
    WIDE = "wide"
    NARROW = "narrow"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallEstimate:
    """Mean recall of the sampled searches of one class; `low` to `high` holds the truth.

    trials: independent finds or misses that would spread the mean as much as the samples do.
    """

    filter_class: FilterClass
    samples: int
    recall: float
    trials: float

    @property
    def low(self) -> float:
        return score_interval(self.recall, self.trials)[0]

    @property
    def high(self) -> float:
        return score_interval(self.recall, self.trials)[1]

    def to_wire(self) -> list[Any]:
        return [self.filter_class.value, self.samples, self.recall, self.trials]

    @staticmethod
    def from_wire(fields: list[Any]) -> "RecallEstimate":
        kind, samples, recall, trials = fields
        return RecallEstimate(
            filter_class=FilterClass(kind), samples=samples, recall=recall, trials=trials
        )


def merged(estimates: Iterable[RecallEstimate]) -> tuple[RecallEstimate, ...]:
    """Returns one estimate a class from those of several replicas, weighted by samples.

    The variance of a weighted mean is the sum of the parts' variances by the squares of their
    weights; each part's is in inverse proportion to its trials.
    """
    by_class: dict[FilterClass, list[RecallEstimate]] = {}
    for estimate in estimates:
        by_class.setdefault(estimate.filter_class, []).append(estimate)
    return tuple(_merged(by_class[each]) for each in FilterClass if each in by_class)


def _merged(parts: list[RecallEstimate]) -> RecallEstimate:
    samples = sum(part.samples for part in parts)
    return RecallEstimate(
        filter_class=parts[0].filter_class,
        samples=samples,
        recall=sum(part.samples * part.recall for part in parts) / samples,
        trials=samples**2 / sum(part.samples**2 / part.trials for part in parts),
    )


def score_interval(share: float, trials: float) -> tuple[float, float]:
    """Returns the score interval, corrected for continuity, of a share seen in so many trials.

    Without the correction it is too short at shares near 1: of 100 trials with one miss it ends
    below 0.999. Source: Newcombe, Statistics in Medicine 17 (1998), method 4.
    """
    square = _Z * _Z
    scale = 2 * (trials + square)
    centre = 2 * trials * share + square
    low, high = 0.0, 1.0
    if share > 0:
        under = square - 2 - 1 / trials + 4 * share * (trials * (1 - share) + 1)
        low = (centre - 1 - _Z * math.sqrt(max(under, 0.0))) / scale
    if share < 1:
        over = square + 2 - 1 / trials + 4 * share * (trials * (1 - share) - 1)
        high = (centre + 1 + _Z * math.sqrt(max(over, 0.0))) / scale
    return max(0.0, low), min(1.0, high)
