"""Seconds and memory of one layer: GPTQ by this package and by a peer on models of real layer shapes.

Both tools finish layer after layer, and each tells when: ours by the receipts of the walk, llm-compressor by
the event that ends a layer's calibration. The time between the ends of two layers that follow each other is
what one more layer costs: forward passes, statistics, solving, and on to the next; start-up, embedding and
head are left out. Where only one layer is run, or finished before the limit, the time to its end is told
instead, start-up of quantizing included; a run that was stopped before that gives a bound.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from scripts.benchmarks.calibrated import Bench
from scripts.benchmarks.ours import walked_layers
from scripts.benchmarks.process import Failed, Late, machine, measured, own_command
from scripts.benchmarks.settings import Setting, chosen
from scripts.benchmarks.table import told_machine

PEAKS: tuple[str, ...] = ("peak_rss_bytes", "peak_device_bytes")


def layers(options: argparse.Namespace) -> dict[str, Any]:
    """Every setting in turn, ``--rounds`` times; prints the table."""
    folder: Path = options.work / f"{options.shape}-{options.layers}"
    if not (folder / "config.json").exists():
        measured([sys.executable, "-m", "scripts.benchmarks.shapes", options.shape, options.layers, folder])
    options.model = str(folder)
    bench = Bench(options, chosen(options.scheme, options.ours, options.peers, options.only))
    bench.prepare()
    runs: dict[str, list[dict[str, Any]]] = {setting.name: [] for setting in bench.settings}
    for number in range(options.rounds):
        for setting in bench.settings if number % 2 == 0 else reversed(bench.settings):
            runs[setting.name].append(_once(bench, setting))
            print(
                f"round {number + 1}: {setting.name}: {runs[setting.name][-1]}", file=sys.stderr, flush=True
            )
    result = {
        "shape": options.shape,
        "layers": options.layers,
        "scheme": options.scheme,
        "samples": options.samples,
        "length": options.length,
        "rounds": options.rounds,
        "limit_minutes": options.limit_minutes,
        "command": own_command(),
        "machine": machine(),
        "versions": bench.versions,
        "forward_s": _forward(bench, options.layers),
        "rows": {name: _row(found) for name, found in runs.items()},
    }
    print(render_layers(result))
    return result


def _forward(bench: Bench, count: int) -> float | None:
    """Seconds of a bare forward pass of the calibration tokens through one layer."""
    try:
        return float(bench.forward()["quantize_s"]) / count
    except Failed:
        return None


def _once(bench: Bench, setting: Setting) -> dict[str, Any]:
    try:
        made = bench.once(setting, saving=False)
    except Late as error:
        beat = bench.beat(setting)
        timing = layer_timing(beat.get("marks_s", []), beat.get("elapsed_s", bench.limit_s))
        peaks = {key: beat[key] for key in PEAKS if key in beat}
        return {"stopped": str(error), **timing, **peaks}
    except Failed as error:
        return {"error": str(error)}
    peaks = {key: made[key] for key in PEAKS}
    if setting.peer == "compressor":
        ends, weights = walked_layers(bench.target(setting))
        # The clock of the walk starts with its stage, that of the receipts with the epoch.
        started = ends[-1] - made["stages"]["walk"]
        timing = layer_timing([end - started for end in ends], made["stages"]["walk"])
    else:
        # The head is the last to end: it is no layer.
        weights, timing = made["quantized_weights"], layer_timing(made["marks_s"][:-1], made["quantize_s"])
    return {**timing, **peaks, "total_s": made["quantize_s"], "quantized_weights": weights}


def layer_timing(ends_s: list[float], elapsed_s: float) -> dict[str, Any]:
    """Seconds of a layer, from when each ended, counted from the start of quantizing.

    Returns:
        ``layer_s``, and ``measured_by``: ``period`` (median time between two ends), ``first`` (one layer from
        the start) or ``bound`` (none ended within ``elapsed_s``); also ``ends_s``.
    """
    if len(ends_s) > 1:
        periods = [after - before for before, after in pairwise(ends_s)]
        return {"layer_s": median(periods), "measured_by": "period", "ends_s": ends_s}
    if ends_s:
        return {"layer_s": ends_s[0], "measured_by": "first", "ends_s": ends_s}
    return {"layer_s": elapsed_s, "measured_by": "bound", "ends_s": []}


def _row(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: the median run of a setting, its peaks over all runs; or ``error``."""
    errors = [run["error"] for run in found if "error" in run]
    if errors:
        return {"error": errors[0]}
    ordered = sorted(found, key=lambda run: float(run["layer_s"]))
    peaks = {key: max((run[key] for run in found if key in run), default=None) for key in PEAKS}
    return {**ordered[len(ordered) // 2], **peaks, "rounds": found}


def render_layers(result: dict[str, Any]) -> str:
    """The Markdown table of a result file."""
    head = f"{result['shape']}, {result['layers']} layers, {result['scheme']}"
    lines = [
        f"| {head} | s a layer | × ours | peak device, GB | peak RSS, GB | M weights quantized |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[str, dict[str, Any]] = result["rows"]
    ours = next(
        (row["layer_s"] for row in rows.values() if row.get("measured_by") in ("period", "first")), None
    )
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | not run | | | | |")
            continue
        more = "> " if row["measured_by"] == "bound" else ""
        ratio = f"{more}{row['layer_s'] / ours:.1f}" if ours else ""
        sizes = [_giga(row["peak_device_bytes"]), _giga(row["peak_rss_bytes"])]
        weights = f"{row['quantized_weights'] / 1e6:.1f}" if "quantized_weights" in row else "stopped"
        lines.append(f"| {name} | {more}{row['layer_s']:.2f} | {ratio} | {' | '.join(sizes)} | {weights} |")
    failed = [f"- {name}: {row['error']}" for name, row in rows.items() if "error" in row]
    if failed:
        lines += ["", "Not run:", "", *failed]
    forward = result["forward_s"]
    bare = "" if forward is None else f"; a bare forward pass through one layer: {forward:.2f} s"
    first = [name for name, row in rows.items() if row.get("measured_by") == "first"]
    notes = [f"{result['samples']} × {result['length']} tokens, random weights{bare}."]
    if first:
        notes.append(f"One layer from the start of quantizing, not the time between two: {'; '.join(first)}.")
    return "\n".join([*lines, "", *notes, f"{told_machine(result['machine'])}."]) + "\n"


def _giga(size: int | None) -> str:
    return f"{size / 1e9:.2f}" if size else ""
