"""What vLLM 0.32's own kernels store: ``scripts/make_kv_golden.py`` makes the file and says how."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

FILE = Path(__file__).parent / "golden_vllm.safetensors"
HEAD_DIMS = (64, 128, 256)
PLAIN = 8  # tokens of random numbers; those after them are edge cases
TIED = slice(8, 12)  # keys that are rotated onto boundaries between codes
PRESETS = {
    "turboquant_k8v4": (8, 4),
    "turboquant_4bit_nc": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}


@cache
def golden() -> dict[str, torch.Tensor]:
    """All tensors by name; keys, values and slots are [T, H, D or S]."""
    return load_file(FILE)


def as_cache(rows_THD: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> [1, H, T, D], as codecs take it."""
    return rows_THD.transpose(0, 1)[None]


def as_tokens(slots_1HTS: torch.Tensor) -> torch.Tensor:
    """The inverse of ``as_cache``."""
    return slots_1HTS[0].transpose(0, 1)
