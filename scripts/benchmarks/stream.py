"""The rate of read -> solve -> write, against a plain copy of the same files."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from scripts.benchmarks.process import measured
from scripts.benchmarks.streamed import our_maker


def stream(options: argparse.Namespace) -> dict[str, Any]:
    """A synthetic checkpoint streamed with each search, against a plain copy of its files."""
    source = options.work / "synthetic"
    if not source.exists():
        # In a process of its own: a child's peak memory starts at what its parent had when it forked.
        maker = multiprocessing.get_context("spawn").Process(
            target=_synthetic, args=(source, options.gigabytes)
        )
        maker.start()
        maker.join()
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    rows: dict[str, Any] = {"copy": []}
    for search in options.search:
        rows[search] = []
    for _ in range(options.rounds):
        rows["copy"].append(_plain_copy(source, options.work / "copy"))
        for search in options.search:
            target = options.work / f"streamed-{search}"
            shutil.rmtree(target, ignore_errors=True)
            rows[search].append(our_maker(source, search)(target))
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(target.with_suffix(".workspace"), ignore_errors=True)
    print(f"| {size / 1e9:.1f} GB source | GB/s | share of copy | peak RSS GB |\n|---|---|---|---|")
    summary = {}
    for name, runs in rows.items():
        seconds = statistics.median(run.get("quantize_s", run["wall_s"]) for run in runs)
        peak = max(run.get("stream_rss_bytes", run["peak_rss_bytes"]) for run in runs)
        summary[name] = {"bytes_per_s": size / seconds, "seconds": seconds, "peak_rss_bytes": peak}
        share = summary[name]["bytes_per_s"] / summary["copy"]["bytes_per_s"]
        print(f"| {name} | {size / seconds / 1e9:.3f} | {share:.0%} | {peak / 1e9:.2f} |")
    return {"source_bytes": size, "rows": summary}


def _plain_copy(source: Path, target: Path) -> dict[str, Any]:
    shutil.rmtree(target, ignore_errors=True)
    script = (
        "import os, shutil, sys, pathlib\n"
        "source, target = map(pathlib.Path, sys.argv[1:])\n"
        "shutil.copytree(source, target)\n"
        "[os.fsync(os.open(p, os.O_RDONLY)) for p in target.iterdir()]\n"
    )
    found = measured([sys.executable, "-c", script, str(source), str(target)])
    shutil.rmtree(target)
    return found


def _synthetic(folder: Path, gigabytes: float) -> None:
    """A Llama-shaped checkpoint of random weights, shard by shard: hidden 4096, intermediate 14336."""
    import torch
    from safetensors.torch import save_file

    hidden, wide, kv = 4096, 14336, 1024
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    layer_bytes = 2 * sum(rows * columns for rows, columns in shapes.values())
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    building = folder.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(wide * hidden, generator=generator, dtype=torch.bfloat16) * 0.02
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        name = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        # Rolled copies of one random buffer: distinct bytes at the cost of a copy.
        tensors = {
            f"model.layers.{layer}.{module}.weight": base.roll(layer * 7 + index)[: rows * columns]
            .view(rows, columns)
            .clone()
            for index, (module, (rows, columns)) in enumerate(shapes.items())
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        if layer == 0:
            tensors["model.embed_tokens.weight"] = base[: 32000 * hidden // 4].view(-1, hidden).clone()
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save_file(tensors, building / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (building / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "vocab_size": 8000,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    }
    (building / "config.json").write_text(json.dumps(config))
    building.rename(folder)
