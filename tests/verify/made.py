"""Quantized checkpoints of other tools' making: llm-compressor run on a tiny Llama, ModelOpt folders by hand.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.model.compressed import nvfp4, replace_projections
from tests.tiny import BYTE_TOKENS

Tensors = dict[str, torch.Tensor]


def llm_compressor(source: Path, folder: Path, scheme: str | None, kv_strategy: str | None) -> Path:
    """Quantizes ``source`` with llm-compressor, calibrated on random tokens, into ``folder``.

    Args:
        source: a model with a tokenizer.
        folder: where the result goes.
        scheme: a preset for all linear layers but the head, or None to leave the weights alone.
        kv_strategy: ``tensor`` or ``attn_head`` for an FP8 KV cache, or None.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.quantization import QuantizationArgs
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from transformers import AutoModelForCausalLM, AutoTokenizer

        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(BYTE_TOKENS, (4, 32), generator=generator).tolist()
        rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
        weights = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": scheme} if scheme else {}
        cache = QuantizationArgs(num_bits=8, type="float", strategy=kv_strategy, observer="static_minmax")
        model = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        oneshot(
            model=model,
            processor=tokenizer,
            recipe=QuantizationModifier(**weights, **({"kv_cache_scheme": cache} if kv_strategy else {})),
            dataset=Dataset.from_list(rows),
            num_calibration_samples=len(rows),
            max_seq_length=len(tokens[0]),
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(folder, save_compressed=True)
        tokenizer.save_pretrained(folder)
    return folder


def modelopt(source: Path, folder: Path, algo: str, *, kv: bool = False) -> Path:
    """Copies ``source`` to ``folder`` with random codes and scales as ModelOpt's export lays them out."""
    layers = {}

    def made(module: str, out: int, wide: int) -> Tensors:
        layers[module] = algo if algo != "MIXED_PRECISION" else "FP8" if "mlp" in module else "NVFP4"
        scales = kv and module.endswith(("k_proj", "v_proj"))
        kv_scale = {f"{module[-6]}_scale": torch.tensor(0.05)} if scales else {}
        return ALGORITHMS[layers[module]](out, wide) | kv_scale

    replace_projections(source, folder, made, seed=2)
    _describe(folder, algo, layers, kv)
    return folder


def _nvfp4(out: int, wide: int) -> Tensors:
    """All matrices have one tensor-level scale, so that fused ones agree."""
    made, _ = nvfp4(out, wide)
    return {
        "weight": made["weight_packed"],
        "weight_scale": made["weight_scale"],
        "weight_scale_2": made["weight_global_scale"].reciprocal().squeeze(),
        "input_scale": torch.tensor(0.002),
    }


def _fp8(out: int, wide: int, shape: tuple[int, ...]) -> Tensors:
    codes_OI = (torch.randn(out, wide) * 60).to(torch.float8_e4m3fn)
    return {"weight": codes_OI, "weight_scale": torch.rand(shape) * 0.002 + 0.001}


ALGORITHMS: dict[str, Callable[[int, int], Tensors]] = {
    "NVFP4": _nvfp4,
    "FP8": lambda out, wide: _fp8(out, wide, ()) | {"input_scale": torch.tensor(0.01)},
    "FP8_PER_CHANNEL_PER_TOKEN": lambda out, wide: _fp8(out, wide, (out,)),
    "FP8_PB_WO": lambda out, wide: _fp8(out, wide, (-(-out // 128), 1, -(-wide // 128), 1)),
    "W4A16_NVFP4": lambda out, wide: {
        local: tensor for local, tensor in _nvfp4(out, wide).items() if local != "input_scale"
    },
}


def _describe(folder: Path, algo: str, layers: dict[str, str], kv: bool) -> None:
    """hf_quant_config.json, and the same in config.json as ModelOpt 0.35 and later write it."""
    left = ["lm_head", "model.embed_tokens"]
    facts: dict[str, Any] = {"quant_algo": algo, "kv_cache_quant_algo": "FP8" if kv else None}
    inline: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algo, "ignore": left}
    if "NVFP4" in algo:
        facts["group_size"] = 16
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        inline["config_groups"] = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    if algo == "MIXED_PRECISION":
        facts["quantized_layers"] = {module: {"quant_algo": name} for module, name in layers.items()}
        inline["quantized_layers"] = facts["quantized_layers"]
    if kv:
        inline["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": inline}
    path.write_text(json.dumps(config))
    content = {"producer": {"name": "modelopt"}, "quantization": facts | {"exclude_modules": left}}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
