"""Makes ``tests/rope/golden_vllm.json``: the tables of rotary positions that vLLM's own classes make.

Run with the interpreter that has vLLM 0.32 (scripts/serve_env.sh), the root of the repository being the
working folder:

    .venv-serve/bin/python scripts/make_rope_golden.py

Of each table it keeps the number of rows, and those of position 1 and of the last, cosines before sines:
position 1 tells inverse frequencies and multiplier. What transformers computes, the tests ask of itself, so
that it needs no file.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope

GOLDEN = Path(__file__).resolve().parent.parent / "tests/rope/golden_vllm.json"
SHAPES = [(64, 1.0, 1e4), (64, 1.0, 1e5), (128, 1.0, 5e5), (128, 0.25, 1e4)]
FACTORS = [(4.0, 512), (2.44140625, 8192)]


def main() -> None:
    """Writes the file."""
    cases = []
    for (head, part, theta), (factor, original) in product(SHAPES, FACTORS):
        for parameters in _parameters(int(head * part), theta, factor, original):
            told = parameters | {"partial_rotary_factor": part}
            # vLLM multiplies linear's itself.
            length = original if parameters["rope_type"] == "linear" else int(original * factor)
            table = _table(head, length, told)
            # Nine digits tell a float32 from its neighbours.
            first, last = ([float(f"{value:.9g}") for value in table[place].tolist()] for place in (1, -1))
            cases.append(
                {"parameters": told, "head": head, "length": length, "rows": len(table)}
                | {"first": first, "last": last}
            )
    GOLDEN.write_text(json.dumps({"vllm": vllm.__version__, "cases": cases}) + "\n")
    print(f"{GOLDEN}: {len(cases)} tables of vLLM {vllm.__version__}, {GOLDEN.stat().st_size:,} bytes")


def _parameters(dims: int, theta: float, factor: float, original: int) -> list[dict[str, Any]]:
    """``rope_parameters`` of each method, as this package writes them, and YaRN's knobs."""
    plain = {"rope_theta": theta}
    scaled = plain | {"factor": factor, "original_max_position_embeddings": original}
    yarn = scaled | {"rope_type": "yarn"}
    third = dims // 6
    factors = [1 + (factor - 1) * i / (dims // 2) for i in range(dims // 2)]
    return [
        plain | {"rope_type": "default"},
        plain | {"rope_type": "linear", "factor": factor},
        yarn,
        yarn | {"beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.25},
        yarn | {"mscale": 0.707, "mscale_all_dim": 1.0, "truncate": False},
        # DeepSeek's, and that of models with positions of images whose table is no longer than the text.
        scaled | {"rope_type": "deepseek_yarn", "mscale": 1.0, "mscale_all_dim": 1.0},
        yarn | {"mrope_section": [dims // 2 - 2 * third, third, third]},
        scaled | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        # Its multiplier follows from the lengths where nothing names it.
        scaled | {"rope_type": "longrope", "short_factor": [1.0] * (dims // 2), "long_factor": factors},
    ]


def _table(head: int, length: int, parameters: dict[str, Any]) -> torch.Tensor:
    """Cosines and sines, [rows, rotary_dim]; the long ones of longrope."""
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))
    phi3_long_rope_scaled_rope.get_current_vllm_config = lambda: config
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            head, length, rope_parameters=parameters, dtype=torch.float32, mrope_positions_factor=1
        )
    longrope = parameters["rope_type"] == "longrope"
    table: torch.Tensor = rope.long_short_cos_sin_cache if longrope else rope.cos_sin_cache
    return table[rope.original_max_position_embeddings :] if longrope else table


if __name__ == "__main__":
    main()
