"""The context of a finished run: what its stage wrote, compared with the source, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.report.context import (
    ContextFacts,
    FactorSearch,
    ScalingCost,
    SearchGeneration,
    WrittenField,
)
from compressor.rope.positions import read_positions
from compressor.stages.context import read_scaled

if TYPE_CHECKING:
    from compressor.planner.plan import Plan


def context_facts(
    plan: Plan, folder: Path, told: Mapping[str, Any], evaluated: Mapping[str, Any]
) -> ContextFacts:
    """The report's part.

    Args:
        plan: of the run, with a section ``context``.
        folder: of the finished stage ``context``.
        told: facts of that stage.
        evaluated: facts of the stage ``evaluate``.

    Raises:
        CheckpointError: what the stage wrote cannot be read.
    """
    assert plan.context is not None
    scaled, spec = read_scaled(folder), plan.context.job.spec
    search = told.get("search")
    return ContextFacts(
        # A search may end with YaRN.
        method=spec.method if search is None else read_positions(scaled.config).rope_type,
        factor=scaled.factor,
        original_length=plan.context.original_length,
        target_length=spec.target_length,
        length=scaled.length,
        fields=tuple(written_fields(plan.source.config, scaled.config)),
        # Recipes that come to the same config share the stage, but not what they asked for.
        notes=plan.context.job.scaled.notes if search is None else scaled.notes,
        cost=_cost(evaluated),
        search=None if search is None else _search(search),
    )


def _search(found: Mapping[str, Any]) -> FactorSearch:
    """The record of a search (``Found.facts``)."""
    held_out = found["held_out"]
    return FactorSearch(
        objective=found["objective"],
        tried=found["tried"],
        documents=tuple(found["documents"]),
        yarn=_generation(found["yarn"]),
        generations=tuple(map(_generation, found["generations"])),
        held_out=() if held_out is None else tuple(held_out["tokens"]),
        difference=held_out and held_out["difference"],
        short_difference=held_out and held_out["short_difference"],
        accepted=found["accepted"],
    )


def _generation(best: Mapping[str, Any]) -> SearchGeneration:
    return SearchGeneration(long=best["long"], short=best["short"], origin=best["origin"])


def _cost(evaluated: Mapping[str, Any]) -> ScalingCost | None:
    """Of scaling alone: measured apart, or the whole evaluation where nothing else was changed."""
    evaluation = evaluated["evaluation"]
    if evaluation is None:
        return None
    apart = evaluated.get("scaling")
    measured = evaluation if apart is None else apart
    perplexity = measured["perplexity"]
    interval = perplexity["increase_ci95"]
    return ScalingCost(
        source=perplexity["source"],
        scaled=perplexity["result"],
        increase=perplexity["increase"],
        increase_ci95=tuple(interval) if interval else None,
        tokens=measured["tokens"],
        context=measured["context"],
        text=evaluation["text"],
        is_all=apart is None,
    )


def written_fields(
    before: Mapping[str, Any], after: Mapping[str, Any], above: str = ""
) -> Iterator[WrittenField]:
    """Fields of config.json that differ, objects field by field, in the order of their names."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        name = f"{above}{key}"
        if isinstance(new, Mapping) and (isinstance(old, Mapping) or old is None):
            yield from written_fields(old or {}, new, f"{name}.")
        elif key not in after or key not in before or old != new:
            yield WrittenField(name=name, before=_told(before, key), after=_told(after, key))


def _told(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else "-"
