"""Jamba: Mamba mixers, attention in one layer of eight, experts in every other.

Names: the published checkpoints and transformers 5.17 ``modeling_jamba.py``. vLLM 0.32 ``jamba.py`` gives its
mixers no quantization config, and drops ``self_attn`` from the names of attention's projections.
"""

from __future__ import annotations

import re

from compressor.model.families.mixtures import ROUTER
from compressor.model.families.named import NamedFamily
from compressor.model.families.naming import input_norm
from compressor.spec import InputNorm


def _norm(name: str) -> InputNorm | None:
    return input_norm(name, "input_layernorm", "pre_ff_layernorm", 0.0)


JAMBA = NamedFamily(
    name="jamba",
    model_types=("jamba",),
    projections=re.compile(
        r"(?:^|\.)layers\.\d+\.(?:self_attn\.[qkvo]_proj"
        r"|feed_forward\.(?:experts\.\d+\.)?(?:gate|up|down)_proj)\.weight$"
    ),
    kept=(
        (re.compile(r"\.feed_forward\.router\.weight$"), ROUTER),
        (re.compile(r"\.mamba\."), "Mamba mixer, which vLLM loads in 16 bit only"),
    ),
    norm=_norm,
    renamed=True,
)
