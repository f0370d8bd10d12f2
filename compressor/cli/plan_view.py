"""The plan as tables on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.calibration.spec import CalibrationSpec
from compressor.planner.calibrated import WalkPlan
from compressor.planner.plan import Plan
from compressor.planner.polished import PolishPlan
from compressor.planner.predict import Prediction


def print_plan(plan: Plan) -> None:
    """Prints the plan on stdout; no colour without a terminal."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(Text(plan.loaded.recipe.name, style="bold"))
    console.print(f"source  {plan.source.label}")
    if plan.source.note:
        console.print(f"        {plan.source.note}")
    console.print(f"family  {plan.family}{': ' + plan.inferred if plan.inferred else ''}")
    console.print()
    console.print(_rules(plan))
    console.print(_sizes(plan.prediction))
    console.print(_serving(plan.prediction))
    if plan.walk is not None:
        console.print(Text(_shown(plan.walk.calibration) + _walked(plan.walk, plan.polish)))
    if plan.oneshot is not None:
        console.print(
            Text(_shown(plan.oneshot.calibration) + "        by llm-compressor, the model in memory\n")
        )
    measured = " and measure it" if plan.evaluation else ""
    console.print(
        f"output  {plan.output} ({len(plan.shards)} shard{'s' if len(plan.shards) > 1 else ''})\n"
        f"needs   {_gb(plan.prediction.peak_rss_bytes)} of memory for the weights, "
        f"{_gb(plan.reload_rss_bytes)} to load the result back{measured}\n"
        f"        {_gb(plan.prediction.disk_bytes)} of disk, "
        f"about {_time(plan.prediction.time_s)} for the weights on two cores (estimates)",
        soft_wrap=True,
    )
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _shown(calibration: CalibrationSpec) -> str:
    """On what."""
    names = ", ".join(dataset.name for dataset in calibration.datasets)
    return (
        f"calibrated on {calibration.tokens:,} tokens ({calibration.num_samples:,} sequences of "
        f"{calibration.sequence_length:,}) of {names}\n"
    )


def _walked(walk: WalkPlan, polish: PolishPlan | None) -> str:
    """And how."""
    return (
        f"        forward passes of {walk.walk.batch_tokens:,} tokens in {walk.walk.dtype}; hidden states, "
        f"{_gb(walk.states_bytes)}, on the {walk.walk.states}\n{_polished(polish) if polish else ''}"
    )


def _polished(polish: PolishPlan) -> str:
    spec, device = polish.spec, "GPU" if polish.device == "cuda" else "CPU"
    return (
        f"        then {spec.steps:,} steps of {spec.tokens:,} tokens to polish scales, norms and biases: "
        f"about {_gb(polish.held_bytes)} and {_time(polish.time_s)} on the {device}\n"
    )


def _rules(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rule", "stored as"):
        table.add_column(name, overflow="fold")
    for name in ("tensors", "weights", "before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why 16 bit", overflow="fold")
    for row in plan.rows:
        table.add_row(
            row.rule,
            row.stored_as,
            f"{row.tensors:,}",
            _count(row.parameters),
            _gb(row.bytes_before),
            _gb(row.bytes_after),
            row.reason,
        )
    prediction = plan.prediction
    table.add_row(
        "total",
        "",
        f"{sum(row.tensors for row in plan.rows):,}",
        _count(prediction.parameters),
        _gb(prediction.source_bytes),
        _gb(prediction.result_bytes),
        "",
        style="bold",
    )
    return table


def _sizes(prediction: Prediction) -> Text:
    ratio = prediction.source_bytes / prediction.result_bytes
    return Text(
        f"\n{_gb(prediction.source_bytes)} -> {_gb(prediction.result_bytes)}, {ratio:.2f}x smaller\n"
        f"{prediction.bits_per_weight:.3f} bits per weight over all {_count(prediction.parameters)} weights, "
        f"{prediction.bits_per_target_weight:.3f} over the {_count(prediction.target_parameters)} quantized "
        "(scales included)\n"
    )


def _serving(prediction: Prediction) -> Table:
    if prediction.kv is None:
        caption = f"KV cache not counted: {prediction.kv_reason}"
    else:
        caption = (
            f"KV cache in 16 bit: {prediction.kv.per_token_bytes:,} bytes a token, "
            f"{_gib(prediction.kv.total_bytes)} at the full context of {prediction.context:,} tokens"
        )
    table = Table(box=None, pad_edge=False, header_style="bold", title=caption, title_justify="left")
    table.add_column("GPUs, at least")
    for memory in prediction.gpus_before:
        table.add_column(f"{memory} GB", justify="right")
    for label, counts in (
        ("weights before", prediction.gpus_weights_before),
        ("weights after", prediction.gpus_weights_after),
        ("with one full context, before", prediction.gpus_before),
        ("with one full context, after", prediction.gpus_after),
    ):
        table.add_row(label, *map(str, counts.values()))
    return table


def _gb(size: float) -> str:
    """Decimal units, as disks and checkpoints are sold: 1 GB = 1e9 bytes."""
    if size >= 1e9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return str(number)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
