"""Serves a model by vLLM with each KV-cache format: tokens that fit, and quality of what decoding reads.

    python scripts/kv_serving.py [--model FOLDER] --python PYTHON_WITH_VLLM [--formats auto fp8 ...]

Prompts are fed one token a step, so that every key and value is read from the cache as stored: the log
probabilities of vLLM's ordinary prompts would say nothing, since it leaves them raw. A format is one process.
The table compares the number of tokens that vLLM's log gives for ``--gib`` with what `compress plan` counts,
and perplexity with that of ``auto`` (16 bit). Result: ``bench/results/kv-serving.json``.

Legend: S sequences, T tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from math import exp
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressor.evals.text import tokens_from_text  # noqa: E402
from compressor.kv.formats import FORMATS  # noqa: E402
from compressor.model.load import load_tokenizer  # noqa: E402
from compressor.planner.kv_bytes import kv_layers  # noqa: E402
from compressor.planner.kv_choice import cache_bytes, format_map  # noqa: E402
from scripts.benchmarks.process import SOURCE, bf16_folder  # noqa: E402

WORKER = Path(__file__).with_name("kv_serving_worker.py")
RESULT = ROOT / "bench/results/kv-serving.json"
PRESETS = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
_CAPACITY = re.compile(r"GPU KV cache size: ([\d,]+) tokens")


def main() -> None:
    """Runs every format and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a GGUF file or a bf16 folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "kv-serving", help="scratch folder")
    parser.add_argument("--python", default=str(ROOT / ".venv-serve/bin/python"))
    parser.add_argument("--formats", nargs="+", default=["auto", "fp8", *PRESETS])
    parser.add_argument("--text", type=Path, default=ROOT / "calibration/heldout.jsonl")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--gib", type=float, default=1.0, help="of memory for the cache")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, default=10, help="a format's process is stopped after them")
    asked = parser.parse_args()
    folder = bf16_folder(asked.work, asked.model)
    tokenizer = load_tokenizer(folder)
    ids_T = tokens_from_text(tokenizer, asked.text, asked.sequences * asked.length)
    config = json.loads((folder / "config.json").read_text())
    rows: dict[str, dict[str, Any]] = {}
    for name in asked.formats:
        rows[name] = _served(asked, folder, name, ids_T.view(asked.sequences, asked.length).tolist())
        rows[name]["tokens_planned"] = planned_tokens(config, name, int(asked.gib * 2**30))
        print(json.dumps({name: rows[name]}), file=sys.stderr, flush=True)
    print(render(rows))
    facts = {"model": asked.model or SOURCE, "sequences": asked.sequences, "length": asked.length}
    RESULT.write_text(json.dumps(facts | {"gib": asked.gib, "formats": rows}, indent=1) + "\n")


def planned_tokens(config: dict[str, Any], name: str, pool_bytes: int) -> int:
    """Tokens of one sequence that the plan says fit into ``pool_bytes``."""
    layers, reason = kv_layers(config)
    assert layers, reason
    form = FORMATS["bf16" if name == "auto" else name]
    formats = format_map(layers, config, form)
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        size = cache_bytes(layers, formats, middle, engine=True)
        assert size is not None, "vLLM finds no common page"
        low, high = (middle, high) if size <= pool_bytes else (low, middle)
    return low


def _served(asked: argparse.Namespace, folder: Path, name: str, ids_ST: list[list[int]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        task, answer = Path(scratch, "task.json"), Path(scratch, "answer.json")
        wanted = {"model": str(folder), "format": name, "dtype": asked.dtype, "ids": ids_ST}
        task.write_text(json.dumps(wanted | {"kv_bytes": int(asked.gib * 2**30), "answer": str(answer)}))
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        done = subprocess.run(
            [asked.python, str(WORKER), str(task)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60 * asked.minutes,
        )
        log = done.stdout + done.stderr
        if done.returncode:
            return {
                "error": next((line for line in reversed(log.splitlines()) if "Error" in line), log[-200:])
            }
        capacity = _CAPACITY.search(log)
        found: dict[str, Any] = json.loads(answer.read_text())
        return found | {"tokens_logged": int(capacity[1].replace(",", "")) if capacity else None}


def render(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table; increases are over ``auto``."""
    lines = [
        "| --kv-cache-dtype | tokens in vLLM's log | planned | perplexity | increase |",
        "|---" * 5 + "|",
    ]
    plain = rows.get("auto", {}).get("nll")
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error'][:80]} | | | |")
            continue
        more = "" if plain is None else f"{exp(row['nll'] - plain) - 1:+.2%}"
        logged = "" if row["tokens_logged"] is None else f"{row['tokens_logged']:,}"
        cells = [name, logged, f"{row['tokens_planned']:,}", f"{exp(row['nll']):.3f}", more]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
