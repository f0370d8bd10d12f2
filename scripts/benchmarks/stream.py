"""The rate of read -> solve -> write, and of a walk, on synthetic sources that may be larger than memory."""

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
from scripts.benchmarks.scout import layers_for, write_scout
from scripts.benchmarks.streamed import for_scout, maker, stream_recipe, walk_recipe


def stream(options: argparse.Namespace) -> dict[str, Any]:
    """A synthetic checkpoint streamed with each search, and a plain copy of its files."""
    source = _source(options)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    recipes = {search: stream_recipe(search) for search in options.search}
    runs: dict[str, list[dict[str, Any]]] = {} if options.no_copy else {"copy": []}
    for _ in range(options.rounds):
        if not options.no_copy:
            runs["copy"].append(_plain_copy(source, options.work / "copy"))
        for name, recipe in recipes.items():
            runs.setdefault(name, []).append(_made(options.work / f"streamed-{name}", source, recipe))
    return {"source_bytes": size, "rows": _table(size, runs)} | _whole(options, size, runs, recipes)


def walk(options: argparse.Namespace) -> dict[str, Any]:
    """A synthetic Scout whose activation ranges are heard (NVFP4 W4A4, plain rounding), in little memory."""
    source = _source(options)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    name = options.search[0]
    recipes = {name: walk_recipe(name, options.samples, options.length, options.memory)}
    runs = {name: [_made(options.work / "walked", source, recipes[name]) for _ in range(options.rounds)]}
    told = {"samples": options.samples, "length": options.length, "memory_bytes": int(options.memory * 1e9)}
    return {"source_bytes": size, **told, "rows": _table(size, runs)} | _whole(options, size, runs, recipes)


def _source(options: argparse.Namespace) -> Path:
    """The synthetic checkpoint, made once."""
    source: Path = options.work / f"synthetic-{options.source}-{options.gigabytes:g}gb"
    if not source.exists():
        # In a process of its own: a child's peak memory starts at what its parent had when it forked.
        make = {"llama": _synthetic, "scout": _scout}[options.source]
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(source, options.gigabytes))
        maker.start()
        maker.join()
    return source


def _made(target: Path, source: Path, recipe: str) -> dict[str, Any]:
    """What a run cost; its result is removed."""
    shutil.rmtree(target, ignore_errors=True)
    found = maker(source, recipe)(target)
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(target.with_suffix(".workspace"), ignore_errors=True)
    return found


def _whole(
    options: argparse.Namespace, size: int, runs: dict[str, list[dict[str, Any]]], recipes: dict[str, str]
) -> dict[str, Any]:
    """For a synthetic Scout: what all of it would take."""
    if options.source != "scout":
        return {}
    print("\n| all of Scout | hours at this rate | memory, GB | disk beside the source, GB |")
    print("|---|---|---|---|")
    found = {}
    for name, recipe in recipes.items():
        seconds = statistics.median(run["quantize_s"] for run in runs[name])
        whole = found[name] = for_scout(options.work, recipe, size / seconds)
        figures = f"{whole['peak_rss_bytes'] / 1e9:.2f} | {whole['disk_bytes'] / 1e9:.1f}"
        print(f"| {name} | {whole['hours']:.2f} | {figures} |")
    return {"whole_scout": found}


def _table(size: int, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints the table; its rows for the result file."""
    print(f"| {size / 1e9:.1f} GB source | GB/s | share of copy | RSS, GB | planned | disk, GB | planned |")
    print("|---|---|---|---|---|---|---|")
    rows: dict[str, Any] = {}
    for name, done in runs.items():
        seconds = statistics.median(run.get("quantize_s", run["wall_s"]) for run in done)
        row = rows[name] = {
            "bytes_per_s": size / seconds,
            "seconds": seconds,
            "process_s": statistics.median(run["wall_s"] for run in done),
            "peak_rss_bytes": max(run.get("stream_rss_bytes", run["peak_rss_bytes"]) for run in done),
            "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in done),
            "peak_disk_bytes": max(run["peak_disk_bytes"] for run in done),
        }
        if "stages" in done[0]:
            row["stages"] = done[0]["stages"]
        share = f"{row['bytes_per_s'] / rows['copy']['bytes_per_s']:.0%}" if "copy" in rows else ""
        planned = row["predicted"] = done[0].get("predicted")
        figures = ["", ""]
        if planned is not None:
            figures = [f"{planned[figure] / 1e9:.2f}" for figure in ("peak_rss_bytes", "disk_bytes")]
        print(
            f"| {name} | {row['bytes_per_s'] / 1e9:.3f} | {share} | {row['peak_rss_bytes'] / 1e9:.2f} | "
            f"{figures[0]} | {row['peak_disk_bytes'] / 1e9:.2f} | {figures[1]} |"
        )
    return rows


def _scout(folder: Path, gigabytes: float) -> None:
    write_scout(folder, layers_for(gigabytes))


def _plain_copy(source: Path, target: Path) -> dict[str, Any]:
    shutil.rmtree(target, ignore_errors=True)
    script = (
        "import os, shutil, sys, pathlib\n"
        "source, target = map(pathlib.Path, sys.argv[1:])\n"
        "shutil.copytree(source, target)\n"
        "[os.fsync(os.open(p, os.O_RDONLY)) for p in target.iterdir()]\n"
    )
    found = measured([sys.executable, "-c", script, str(source), str(target)], folders=(target,))
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
