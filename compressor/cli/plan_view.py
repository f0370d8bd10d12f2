"""The plan as tables on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.calibration.spec import CalibrationSpec
from compressor.cli.compounding_view import print_compounding
from compressor.cli.kv_view import kv_lines, print_kv
from compressor.planner.calibrated import WalkPlan
from compressor.planner.compounding import compounding_facts
from compressor.planner.plan import Plan
from compressor.planner.polished import PolishPlan
from compressor.planner.predict import Prediction

_NARROW = 80
_TITLE_WIDTH = 7
# "weights.rules.0" in one piece.
_RULE_WIDTH = 15


def print_plan(plan: Plan) -> None:
    """Prints the plan on stdout; no colour without a terminal."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(Text(plan.loaded.recipe.name, style="bold"))
    console.print(_titled("source", plan.source.label, plan.source.note))
    console.print(_titled("family", f"{plan.family}{': ' + plan.inferred if plan.inferred else ''}"))
    if plan.context is not None:
        console.print(_titled("context", *plan.context.described()))
    if plan.adapters is not None:
        console.print(_titled("adapt", *plan.adapters.described()))
    console.print()
    console.print(_rules(plan, narrow=console.width < _NARROW))
    console.print(_sizes(plan.prediction))
    console.print(_serving(plan.prediction))
    print_kv(console, plan.kv_options)
    if plan.kv is not None:
        console.print()
        console.print(_titled("kv", *kv_lines(plan.kv, plan.kv_stage.notes if plan.kv_stage else ())))
    if plan.budget is not None:
        console.print(_titled("budget", *plan.budget.described()))
    if plan.walk is not None:
        console.print(_titled("data", _shown(plan.walk.calibration), *_walked(plan.walk, plan.polish)))
    if plan.oneshot is not None:
        how = "by llm-compressor, the model in memory"
        console.print(_titled("data", _shown(plan.oneshot.calibration), how))
    if plan.drafts is not None:
        console.print(_titled("drafts", *plan.drafts.described()))
    if plan.long is not None:
        console.print(_titled("long", *plan.long.described()))
    print_compounding(console, *compounding_facts(plan))
    # A path must survive copying.
    shards = f"{len(plan.shards)} shard{'s' if len(plan.shards) > 1 else ''}"
    console.print(f"\noutput  {plan.output} ({shards})", soft_wrap=True)
    console.print(_titled("needs", *_needs(plan)))
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _titled(title: str, *lines: str) -> Table:
    """Lines with a word before the first; where they are too long, they go on below themselves."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=_TITLE_WIDTH, no_wrap=True)
    grid.add_column(overflow="fold")
    for line in filter(None, lines):
        grid.add_row(title, Text(line))
        title = ""
    return grid


def _needs(plan: Plan) -> tuple[str, str]:
    prediction = plan.prediction
    measured = " and measure it" if plan.evaluation else ""
    where = "on the GPU" if plan.walk is not None and plan.walk.device == "cuda" else "on two cores"
    what = "the weights"
    if plan.drafts is not None:
        what = "weights and draft"
        where = "with the GPU" if plan.drafts.device == "cuda" else where
    return (
        f"{_gb(prediction.peak_rss_bytes)} of memory for {what}, {_gb(plan.reload_rss_bytes)} to load "
        f"the result back{measured}",
        f"{_gb(prediction.disk_bytes)} of disk, about {_time(prediction.time_s)} for {what} {where} "
        "(estimates)",
    )


def _shown(calibration: CalibrationSpec) -> str:
    """On what."""
    names = ", ".join(dataset.name for dataset in calibration.datasets)
    if calibration.images is not None:
        names += f", {calibration.images.num_samples:,} of them with images of {calibration.images.name}"
    return (
        f"calibrated on {calibration.tokens:,} tokens ({calibration.samples:,} sequences of "
        f"{calibration.sequence_length:,}) of {names}"
    )


def _walked(walk: WalkPlan, polish: PolishPlan | None) -> tuple[str, ...]:
    """And how."""
    passes = (
        f"forward passes of {walk.walk.batch_tokens:,} tokens in {walk.walk.dtype}; hidden states, "
        f"{_gb(walk.states_bytes)}, on the {walk.walk.states}"
    )
    return (passes,) if polish is None else (passes, _polished(polish))


def _polished(polish: PolishPlan) -> str:
    spec, device = polish.spec, "GPU" if polish.device == "cuda" else "CPU"
    return (
        f"then {spec.steps:,} steps of {spec.tokens:,} tokens to polish scales, norms and biases: about "
        f"{_gb(polish.held_bytes)} and {_time(polish.time_s)} on the {device}"
    )


def _rules(plan: Plan, *, narrow: bool) -> Table:
    """The claims by rule; in a narrow terminal the reason stands behind what becomes of the tensors."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rule", overflow="fold", min_width=_RULE_WIDTH if narrow else None)
    table.add_column("stored as", overflow="fold")
    for name in ("weights", "before", "after") if narrow else ("tensors", "weights", "before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    if not narrow:
        table.add_column("why 16 bit", overflow="fold")

    def add(
        rule: str, stored: str, tensors: int, reason: str, sizes: tuple[str, str, str], style: str = ""
    ) -> None:
        if narrow:
            table.add_row(rule, f"{stored}: {reason}" if reason else stored, *sizes, style=style)
        else:
            table.add_row(rule, stored, f"{tensors:,}", *sizes, reason, style=style)

    for row in plan.rows:
        sizes = (_count(row.parameters), _gb(row.bytes_before), _gb(row.bytes_after))
        add(row.rule, row.stored_as, row.tensors, row.reason, sizes)
    prediction = plan.prediction
    total = (_count(prediction.parameters), _gb(prediction.source_bytes), _gb(prediction.result_bytes))
    add("total", "", sum(row.tensors for row in plan.rows), "", total, "bold")
    return table


def _sizes(prediction: Prediction) -> Text:
    ratio = prediction.source_bytes / prediction.result_bytes
    if not prediction.target_parameters:
        return Text(f"\n{_gb(prediction.result_bytes)}: nothing is quantized\n")
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
    """Binary units, as memory is sold."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return str(number)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
