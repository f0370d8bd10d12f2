"""A model whose weights have left the 4-bit grid that its source was dequantized from.

A short fine-tune of all weights in 16 bit with 32-bit masters, on texts that are neither those of
calibration nor the one that is measured on. What it changed is measured against the grid: Q4_1 stores blocks
of 32 weights as 16 evenly spaced values from the block's smallest to its largest (ggml-quants.c,
quantize_row_q4_1_ref), and both ends occur in every block, so a dequantized block tells its grid.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scripts.benchmarks.process import (
    ROOT,
    SOURCE,
    bf16_folder,
    evaluate,
    machine,
    measured,
    own_command,
    shown,
)

# What nothing may be trained on: texts that calibrate or measure.
SHIPPED = ("prose.jsonl", "code.jsonl", "chat.jsonl", "heldout.jsonl")


def off_grid(options: argparse.Namespace) -> dict[str, Any]:
    """Trains in a process of its own, then measures the tuned model on the text; prints what changed."""
    source = bf16_folder(options.work, options.model)
    folder: Path = (options.folder or options.work / "off-grid").absolute()
    job = options.work / "off-grid.job.json"
    report = options.work / "off-grid.report.json"
    job.write_text(
        json.dumps(
            {
                "source": str(source),
                "folder": str(folder),
                "train": [str(Path(path).absolute()) for path in options.train],
                "forbidden": [str(ROOT / "calibration" / name) for name in SHIPPED] + [options.text],
                "steps": options.steps,
                "step_tokens": options.step_tokens,
                "rate": options.rate,
                "report": str(report),
            }
        )
    )
    cost = measured([sys.executable, "-m", "scripts.benchmarks.tune", job])
    found = json.loads(report.read_text())
    before_after = evaluate(folder, source, options.text, options.tokens)["perplexity"]
    result = {
        "model": shown(options.model or SOURCE),
        "folder": folder.name,
        "text": shown(options.text),
        "tokens": options.tokens,
        "command": own_command(),
        "machine": machine(),
        "wall_s": cost["wall_s"],
        "steps": options.steps,
        "step_tokens": options.step_tokens,
        "rate": options.rate,
        "perplexity": {"source": before_after["source"], "tuned": before_after["result"]},
        **found,
        "train": [Path(path).name for path in found["train"]],
    }
    print(render_off_grid(result))
    return result


def render_off_grid(result: dict[str, Any]) -> str:
    """What a reader must know of the tuned model, as Markdown."""
    grid, perplexity = result["grid"], result["perplexity"]
    rows = [
        ("weights changed", f"{grid['changed']:.1%}"),
        ("relative change", f"{grid['moved']:.2%}"),
        ("distance to the old grid, steps of it (RMS)", _arrow(grid["steps_source"], grid["steps_tuned"])),
        (
            "relative error of storing it as Q4_1 again",
            _arrow(grid["again_source"], grid["again_tuned"], percent=True),
        ),
        ("perplexity", f"{perplexity['source']:.3f} → {perplexity['tuned']:.3f}"),
        (
            "loss, first and last tenth of the steps",
            f"{result['loss_first']:.3f} → {result['loss_last']:.3f}",
        ),
    ]
    lines = [
        "| off the grid | before → after |",
        "|---|---|",
        *(f"| {name} | {told} |" for name, told in rows),
    ]
    note = (
        f"{result['steps']} steps of {result['step_tokens']:,} tokens, AdamW at {result['rate']:g}. Weights "
        "that know nothing of a grid lie 0.289 steps from it (RMS)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _arrow(before: float, after: float, *, percent: bool = False) -> str:
    return f"{before:.2%} → {after:.2%}" if percent else f"{before:.3f} → {after:.3f}"
