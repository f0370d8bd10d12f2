"""What a run says of the choice of schemes, in its report's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report.budget import (
    BudgetFacts,
    BudgetGroup,
    BudgetOption,
    BudgetPoint,
    CacheTrade,
    FrontierPoint,
)


def budget_facts(shown: Mapping[str, Mapping[str, Any]]) -> BudgetFacts | None:
    """The report's part; ``shown``: facts of each stage. None where no stage chose schemes."""
    if "budget" not in shown:
        return None
    facts = shown["budget"]["budget"]
    groups = [
        BudgetGroup(**{**group, "options": tuple(BudgetOption(**option) for option in group["options"])})
        for group in facts["groups"]
    ]
    points = [
        BudgetPoint(**{**point, "increase_ci95": _pair(point["increase_ci95"])}) for point in facts["points"]
    ]
    frontier = [FrontierPoint(**point) for point in facts["frontier"]]
    caches = [CacheTrade(**trade) for trade in facts["caches"]]
    told = {"groups": tuple(groups), "points": tuple(points), "frontier": tuple(frontier)}
    told["caches"] = tuple(caches)
    return BudgetFacts(**{**facts, **told})


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])
