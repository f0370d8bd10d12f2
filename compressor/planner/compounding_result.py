"""The compounding table of a finished run: what its report measured, and its cache as it was fitted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.planner.compounding import Found, compounding_facts
from compressor.planner.kv_bytes import kv_layers
from compressor.planner.kv_result import stored_formats
from compressor.planner.served import Cache, own_cache, stored_cache
from compressor.report.compounding import Cell, CompoundingRow, RowKey, Unit
from compressor.report.drafts import measured_passes
from compressor.report.measured import SpeedFacts
from compressor.report.model import Report

if TYPE_CHECKING:
    from compressor.planner.plan import Plan

_DECODED = (
    "Measured here, transformers decoded the result's weights first: its speed and memory are those of "
    "weights in 16 or 32 bit, not what an engine makes of them."
)


def with_compounding(report: Report, plan: Plan, kv: Path | None) -> Report:
    """The report of a run with its compounding table; as it is where that cannot be computed.

    Args:
        report: of the run.
        plan: of it.
        kv: folder of the finished stage ``kv``, or None.
    """
    speed = None if report.quality is None else report.quality.speed
    found = Found(
        cache=None if kv is None else _fitted(plan, kv),
        tokens_per_pass=None if report.drafts is None else measured_passes(report.drafts),
        weights_measured=(report.source.kind == "safetensors", True),
        changes=tuple(_changes(report)),
        rows=() if speed is None else tuple(_speed_rows(speed)),
        notes=() if speed is None or speed.runs_compressed else (_DECODED,),
    )
    facts, _ = compounding_facts(plan, found)
    return report.model_copy(update={"compounding": facts})


def _speed_rows(speed: SpeedFacts) -> list[CompoundingRow]:
    """Source and result as they ran here, whatever the recipe serves them on."""
    where = f"here ({speed.device}, transformers, {speed.dtype})"
    rows: list[tuple[RowKey, str, Unit, float, float]] = [
        (
            "measured_speed",
            f"tokens/s {where}, {speed.batch:,} at once behind {speed.prompt_tokens:,}",
            "tokens/s",
            speed.source.tokens_per_s.median,
            speed.result.tokens_per_s.median,
        ),
        (
            "measured_first_token",
            "time to the first token, there",
            "s",
            speed.source.first_token_s.median,
            speed.result.first_token_s.median,
        ),
        (
            "measured_memory",
            "weights and cache in memory, there",
            "bytes",
            float(speed.source.weight_bytes + speed.source.cache_bytes),
            float(speed.result.weight_bytes + speed.result.cache_bytes),
        ),
    ]
    return [
        CompoundingRow(
            key=key,
            title=title,
            unit=unit,
            baseline=Cell(value=before, mark="measured"),
            optimized=Cell(value=after, mark="measured"),
        )
        for key, title, unit, before, after in rows
    ]


def _changes(report: Report) -> list[tuple[str, RowKey, float]]:
    if report.quality is None:
        return []
    changes: list[tuple[str, RowKey, float]] = [
        ("perplexity", "perplexity", report.quality.perplexity.increase)
    ]
    for task, metrics in report.quality.tasks.items():
        changes += [
            (f"{task} {metric}", "accuracy", figures.difference) for metric, figures in metrics.items()
        ]
    return changes


def _fitted(plan: Plan, folder: Path) -> Cache:
    """The cache that the stage left."""
    from compressor.kv.plan import KvPlan

    assert plan.kv is not None
    chosen = KvPlan.read(folder)
    layers, _ = kv_layers(plan.configured.config)
    if not plan.kv.servable:
        return own_cache(layers, chosen)
    return stored_cache(layers, stored_formats(plan, chosen, layers), engine=True)
