"""The best recall that a budget of processor time pays for: docs/design/search-budget.md. Pure."""

from collections.abc import Callable
from typing import Final, TypeVar

Plan = TypeVar("Plan")

TARGETS: Final = (1.0, 0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Best first. The last is aimed at whatever it costs."""


def best_within(
    budget_ns: float, planned: Callable[[float], tuple[Plan, float]]
) -> tuple[float, Plan]:
    """Returns the highest target whose plan costs no more than the budget, and that plan.

    planned: the plan for a recall target, and the nanoseconds that it is expected to cost.
    """
    for target in TARGETS:
        plan, cost_ns = planned(target)
        if cost_ns <= budget_ns:
            break
    return target, plan
