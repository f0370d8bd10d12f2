"""The Markdown table of a calibrated measurement, from its result file alone."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

COLUMNS = (
    "quantize + save, s",
    "× bare forward",
    "process, CPU s",
    "peak RSS, GB",
    "tensor MB",
    "perplexity",
    "increase",
    "mean KL",
)
DEVICE_COLUMN = "peak device, GB"


def render(result: Mapping[str, Any]) -> str:
    """A heading line, the table, and below it who could not be run and what else a reader must know."""
    rows: Mapping[str, Mapping[str, Any]] = result["rows"]
    device = any(row.get("peak_device_bytes") for row in rows.values())
    columns = [*COLUMNS[:4], *([DEVICE_COLUMN] if device else []), *COLUMNS[4:]]
    lines = [
        f"| {result['scheme']} | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| {name} | {' | '.join(_cells(row, result, device))} |" for name, row in rows.items()),
    ]
    failed = [f"- {name}: {row['error']}" for name, row in rows.items() if "error" in row]
    if failed:
        lines += ["", "Not run:", "", *failed]
    return "\n".join([*lines, "", *_notes(result)]) + "\n"


def _cells(row: Mapping[str, Any], result: Mapping[str, Any], device: bool) -> list[str]:
    if "error" in row:
        return ["not run", *["" for _ in range(len(COLUMNS) - 1 + device)]]
    seconds, forward = row["quantize_s"], result["forward"]["seconds"]["median"]
    spread = f" ({seconds['min']:.1f}–{seconds['max']:.1f})" if seconds["runs"] > 1 else ""
    perplexity = row["perplexity"]
    return [
        f"{seconds['median']:.1f}{spread}",
        f"{seconds['median'] / forward:.1f}",
        f"{row['cpu_s']['median']:.0f}",
        f"{row['peak_rss_bytes'] / 1e9:.2f}",
        *([f"{row['peak_device_bytes'] / 1e9:.2f}"] if device else []),
        f"{row['bytes'] / 1e6:.1f}",
        f"{perplexity['result']:.3f}",
        f"{perplexity['increase']:+.1%}",
        f"{row['kl']['mean']:.4f}",
    ]


def _notes(result: Mapping[str, Any]) -> list[str]:
    done = {name: row for name, row in result["rows"].items() if "error" not in row}
    forward = result["forward"]
    texts = ", ".join(result.get("calibration") or ["the shipped mixture"])
    notes = [
        f"Calibration: {result['samples']} × {result['length']} tokens of {texts}, the same ids for all; a "
        f"bare forward pass of them: {forward['seconds']['median']:.1f} s in {forward['dtype']}. "
        f"Evaluation: {result['tokens']:,} tokens of {result['text']} in windows of 1,024, checkpoints "
        "reloaded.",
        *_walks(done, forward),
    ]
    sources = {row["perplexity"]["source"] for row in done.values()}
    if sources:
        notes.append(f"Perplexity of the source: {min(sources):.3f}.")
    sizes = {row["bytes"] for row in done.values()}
    if len(sizes) > 1:
        notes.append("The stored bytes are not equal: see the column.")
    notes += [f"{name}: {row['helped']}." for name, row in done.items() if row.get("helped")]
    unrounded = [name for name, row in done.items() if row.get("activations_simulated") is False]
    if unrounded:
        notes.append(f"Inputs not rounded, so that only the weights are measured: {'; '.join(unrounded)}.")
    elsewhere = [name for name, row in done.items() if row["evaluated_by"] != "compress eval"]
    if elsewhere:
        notes.append(f"Evaluated by {_ELSEWHERE}: {'; '.join(elsewhere)}.")
    if result["is_demo_model"]:
        notes.append(
            "SmolLM2's source is dequantized Q4_1: part of every figure re-quantizes a 4-bit grid. The table "
            "compares tools; it does not say what a 16-bit original would lose."
        )
    machine = result["machine"]
    notes.append(f"{told_machine(machine)}; medians of {result['rounds']} alternating runs.")
    return notes


def _walks(rows: Mapping[str, Mapping[str, Any]], forward: Mapping[str, Any]) -> list[str]:
    """The walk alone over what it cannot do without: a forward pass, and reading the weights."""
    if "read_s" not in forward:
        return []
    least = forward["seconds"]["median"] + forward["read_s"]["median"]
    told = []
    for name, row in rows.items():
        walks = [run["stages"]["walk"] for run in row.get("rounds", ()) if "walk" in run.get("stages", {})]
        if walks:
            told.append(f"{name} {median(walks) / least:.1f}")
    return [f"Walk stage alone over that pass plus reading the weights: {'; '.join(told)}."] if told else []


def told_machine(machine: Mapping[str, Any]) -> str:
    """The line that says where and when."""
    accelerator = f"{machine['accelerator']}; " if "accelerator" in machine else ""
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    return f"{accelerator}{where}, {machine['date']}"


_ELSEWHERE = "scripts/benchmarks/peers/evaluate.py, because only their own tool reads the format"
