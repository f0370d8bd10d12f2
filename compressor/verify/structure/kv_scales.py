"""The KV cache: scales, a pair for each attention layer by any name that engines map to it; and its plan."""

from __future__ import annotations

import re
from typing import Any

from compressor.errors import CheckpointError
from compressor.kv.plan import JSON_NAME, KvPlan
from compressor.model.families import text_config
from compressor.model.families.naming import block_index
from compressor.planner.kv_bytes import kv_layers
from compressor.verify.base import Check
from compressor.verify.structure.contents import Contents
from compressor.verify.structure.expected import is_aside
from compressor.verify.structure.findings import Findings
from compressor.verify.structure.quant_config import KvCache, QuantConfig
from compressor.verify.structure.ranges import scalar_fault

# vLLM 0.32 model_loader/weight_utils.py maybe_remap_kv_scale_name; {} is k or v.
_NAMES = ("{}_scale", "{}_proj.{}_scale", "qkv_proj.{}_scale", "qkqkv_proj.{}_scale", "attn.{}_scale")
_OTHER_NAMES = ("{}_cache.scale", "kv_scale")
_SCALE = re.compile(r"\.(?:[qkv]_(?:scale|zero_point)|[kv]_cache\.scale|q\.scale|kv_scale)$")
_KEYS = re.compile(
    r"(?P<attention>.*\.(?:self_attn|self_attention|attention|attn|mixer))\."
    r"(?:k_proj|qkv_proj|kv_b_proj|query_key_value|Wqkv|c_attn)\.weight(?:_packed)?$"
)
_FP8_MAX = 448.0


def is_kv_scale(name: str) -> bool:
    """Whether a tensor is a scale or zero point of queries, keys or values."""
    return _SCALE.search(name) is not None


def check_kv_cache(stored: Contents, quant: QuantConfig) -> Check:
    """The check ``kv_cache``: every attention layer has a scale for keys and one for values, both sane, and
    ``kv_plan.json`` can be read and speaks of the layers and heads that config.json has.

    Raises:
        CheckpointError: a file became unreadable.
    """
    found = Findings("kv_cache")
    planned = _check_plan(stored, found)
    present = [name for name in stored.headers if is_kv_scale(name)]
    if quant.kv is None:
        if present:
            found.add(
                "scales of a KV cache that config.json does not mention: put its kv_cache_scheme "
                "(ModelOpt: kv_cache_quant_algo) back, or engines keep the cache in 16 bit",
                *present,
            )
        return found.result(f"no KV cache quantization in config.json, and no scales of one{planned}")
    if not quant.kv.static:
        return found.result(f"{quant.kv.label} cache whose scales are made while it is filled{planned}")
    layers = _attention_layers(stored)
    if not layers and not present:
        found.add(f"config.json asks for an {quant.kv.label} cache, but there are no scales of one")
    for layer in layers:
        for side in ("k", "v"):
            if not any(name in stored.headers for name in _names(layer, side)):
                found.add(
                    f"missing, though config.json asks for an {quant.kv.label} cache: calibrate it again; "
                    "engines put 1 in its place",
                    f"{layer}.{side}_scale",
                )
    for name in present:
        _check_scale(stored, name, quant.kv, found)
    return found.result(
        f"{quant.kv.label} scales of keys and values in {len(layers)} attention layers{planned}"
    )


def _check_plan(stored: Contents, found: Findings) -> str:
    """Words about ``kv_plan.json``, "" where there is none; adds what is wrong with it to ``found``."""
    if not (stored.folder / JSON_NAME).is_file():
        return ""
    try:
        plan = KvPlan.read(stored.folder)
    except CheckpointError as error:
        found.add(f"cannot be used: {error.what}", JSON_NAME)
        return ""
    layers, reason = kv_layers(stored.config or {})
    if reason:
        return f"; {JSON_NAME} can be read, and config.json does not tell the layers: {reason}"
    heads = {
        layer.index: (layer.heads, layer.head_dim) for layer in layers if layer.kind in ("full", "latent")
    }
    for index, planned in plan.layers.items():
        if index not in heads:
            found.add(f"layer {index} of it has no full attention in config.json", JSON_NAME)
        elif heads[index] != (planned.kv_heads, planned.head_dim):
            said, has = f"{planned.kv_heads} x {planned.head_dim}", "{} x {}".format(*heads[index])
            found.add(f"layer {index} of it has {said} KV heads, that of config.json {has}", JSON_NAME)
    return f"; a plan of the cache for {len(plan.layers)} layers"


def _names(layer: str, side: str) -> list[str]:
    return [f"{layer}.{name.format(side, side)}" for name in (*_NAMES, *_OTHER_NAMES)]


def _attention_layers(stored: Contents) -> list[str]:
    """The modules that have a KV cache of their own."""
    config = stored.config or {}
    modules = {}
    for name in stored.headers:
        match = _KEYS.match(name)
        if match and _has_cache(name, config):
            modules[match["attention"]] = True
    return list(modules)


def _has_cache(name: str, config: dict[str, Any]) -> bool:
    """Whether keys of this projection are cached: not in towers, draft layers, or layers that share."""
    index, text = block_index(name), text_config(config)
    if index is None or is_aside(name, config):
        return False
    kinds, blocks, sharing = (
        text.get(key) for key in ("layer_types", "num_hidden_layers", "num_kv_shared_layers")
    )
    if isinstance(kinds, list) and index < len(kinds) and isinstance(kinds[index], str):
        kind = kinds[index]
        if not kind.endswith("attention") or kind == "linear_attention":
            return False
    shared = type(blocks) is int and type(sharing) is int and index >= blocks - sharing
    return not shared


def _check_scale(stored: Contents, name: str, kv: KvCache, found: Findings) -> None:
    header = stored.headers[name]
    heads = text_config(stored.config or {}).get("num_key_value_heads")
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1, 1)]
    if kv.per_head and type(heads) is int and not name.endswith("q_scale"):
        shapes = [(heads,), (heads, 1, 1)]
    if header.dtype not in ("F32", "BF16", "F16"):
        found.add(f"stored as {header.dtype}, not as floating point: calibrate it again", name)
        return
    if header.shape not in shapes and not name.endswith("q_scale"):
        found.add(
            f"{list(header.shape)} instead of {list(shapes[-1 if kv.per_head else 1])}: calibrate it again",
            name,
        )
        return
    if not name.endswith("zero_point"):
        fault = scalar_fault(stored.read(name), _FP8_MAX)
        if fault:
            found.add(f"{fault}: calibrate it again", name)
