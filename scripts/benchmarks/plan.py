"""``compress plan`` on headers of 204 GB."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from scripts.benchmarks.process import compress, spread


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """``compress plan`` on a 200 GB mixture-of-experts folder of empty (sparse) shards: time and memory."""
    folder = options.work / "headers"
    shutil.rmtree(folder, ignore_errors=True)
    _sparse_moe(folder, layers=41)
    recipe = options.work / "plan.yaml"
    recipe.write_text(
        f"model: {{source: {json.dumps(str(folder))}}}\nweights: {{scheme: nvfp4a16}}\nevaluate: null\n"
    )
    runs = [compress("plan", str(recipe), "--json") for _ in range(options.rounds)]
    made = json.loads(runs[0]["stdout"])
    row = {
        "source_bytes": made["source_bytes"],
        "tensors": sum(rule["tensors"] for rule in made["rules"]),
        "wall_s": spread([run["wall_s"] for run in runs]),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }
    shutil.rmtree(folder)
    print(
        f"plan of {row['source_bytes'] / 1e9:.0f} GB, {row['tensors']:,} tensors: "
        f"{row['wall_s']['median']:.2f} s, {row['peak_rss_bytes'] / 1e6:.0f} MB"
    )
    return row


def _sparse_moe(folder: Path, layers: int) -> None:
    """Qwen3-MoE shaped headers (hidden 4096, 128 experts of 1536), one sparse shard a layer."""
    folder.mkdir(parents=True)
    hidden, wide, experts = 4096, 1536, 128
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes = {
            f"{prefix}.self_attn.q_proj.weight": (8192, hidden),
            f"{prefix}.self_attn.k_proj.weight": (512, hidden),
            f"{prefix}.self_attn.v_proj.weight": (512, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, 8192),
            f"{prefix}.mlp.gate.weight": (experts, hidden),
        }
        for expert in range(experts):
            shapes[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = (wide, hidden)
            shapes[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = (wide, hidden)
            shapes[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (hidden, wide)
        header, offset = {}, 0
        for name, shape in shapes.items():
            size = 2 * shape[0] * shape[1]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        raw = json.dumps(header).encode()
        shard = folder / f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        with shard.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + offset)
        weight_map |= dict.fromkeys(shapes, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    }
    (folder / "config.json").write_text(json.dumps(config))
