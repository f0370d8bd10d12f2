"""NVFP4A16 by this package and by each data-free setting of llm-compressor."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmarks.process import SOURCE, bf16_folder, evaluate, measured, spread, tensor_bytes
from scripts.benchmarks.streamed import our_maker

PEER_SETTINGS = {
    "llm-compressor, min-max": None,
    "llm-compressor, memoryless_mse": "memoryless_mse",
    "llm-compressor, nvfp4_expanded_mse": "nvfp4_expanded_mse",
}
PEER_SCRIPT = """
import json, sys, time
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
source, target, observer = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
kind = {"weight_observer": observer} if observer != "-" else {}
started = time.monotonic()
how = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="NVFP4A16", **kind)
oneshot(model=model, recipe=how)
quantized = time.monotonic()
model.save_pretrained(target, save_compressed=True)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
print(json.dumps({"quantize_s": quantized - started, "save_s": time.monotonic() - quantized}))
"""


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """NVFP4A16 of one model by each tool and setting: perplexity, KL, bytes, seconds."""
    work = options.work
    source = bf16_folder(work, options.model)
    makers: dict[str, Callable[[Path], dict[str, Any]]] = {
        f"compressor, {search}": our_maker(source, search) for search in ("full", "minmax")
    }
    makers |= {
        name: _peer_maker(source, observer)
        for name, observer in PEER_SETTINGS.items()
        if options.only is None or any(word in name for word in options.only)
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in makers}
    for _ in range(options.rounds):
        for name, make in makers.items():
            target = work / name.replace(", ", "-").replace(" ", "-")
            shutil.rmtree(target, ignore_errors=True)
            runs[name].append(make(target))
    rows = {}
    for name, made in runs.items():
        target = work / name.replace(", ", "-").replace(" ", "-")
        rows[name] = {
            "quantize_s": spread([run["quantize_s"] for run in made]),
            "process_s": spread([run["wall_s"] for run in made]),
            "process_cpu_s": spread([run["cpu_s"] for run in made]),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in made),
            "bytes": tensor_bytes(target),
            **evaluate(target, source, options.text, options.tokens),
        }
    _quality_table(rows)
    return {"model": str(options.model or SOURCE), "text": options.text, "rows": rows}


def _peer_maker(source: Path, observer: str | None) -> Callable[[Path], dict[str, Any]]:
    def make(target: Path) -> dict[str, Any]:
        found = measured([sys.executable, "-c", PEER_SCRIPT, str(source), str(target), observer or "-"])
        times = json.loads(found["stdout"].splitlines()[-1])
        return found | {"quantize_s": times["quantize_s"] + times["save_s"]}

    return make


def _quality_table(rows: dict[str, dict[str, Any]]) -> None:
    print("| NVFP4A16 | quantize + save, s | process, CPU s | tensor MB | perplexity | increase | mean KL |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        perplexity = row["perplexity"]
        increase = perplexity["result"] / perplexity["source"] - 1
        print(
            f"| {name} | {row['quantize_s']['median']:.1f} | {row['process_cpu_s']['median']:.0f} "
            f"| {row['bytes'] / 1e6:.1f} "
            f"| {perplexity['result']:.3f} | {increase:+.1%} | {row['kl']['mean']:.4f} |"
        )
