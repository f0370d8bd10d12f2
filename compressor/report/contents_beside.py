"""What lies beside a checkpoint's weights, or is said of their use: KV cache, draft head, adapter.

Every file may come from strangers: what is not as expected is told as far as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.checkpoint.opened import ADAPTER_CONFIG, Opened
from compressor.planner.kv_bytes import KvLayer, kv_layers

KV_PLAN = "kv_plan.json"
DRAFT_CONFIG = "draft/config.json"
_ADAPTER_PLACES = (ADAPTER_CONFIG, f"adapter/{ADAPTER_CONFIG}")
_SHOWN = 80


@dataclass(frozen=True)
class KvCache:
    """How the KV cache is to be stored.

    Attributes:
        format: what the checkpoint says; ``16 bit`` where it says nothing.
        stated_in: where; "" where it says nothing.
        scales: tensors of scales that are stored for it.
        bytes_per_token_16bit: of a further token of a long sequence, all layers; None where not known.
        state_bytes: of recurrent states, of one sequence.
        layers: kind -> layers that have a cache.
        reason: why the last three are not known.
    """

    format: str
    stated_in: str
    scales: int
    bytes_per_token_16bit: int | None
    state_bytes: int
    layers: Mapping[str, int]
    reason: str


@dataclass(frozen=True)
class Draft:
    """A draft head in the folder ``draft``: what it is and how many tokens it may propose from."""

    architecture: str
    vocabulary: int | None
    layers: int | None


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter: where it lies, its rank and scale, what it changes, whom it is for."""

    place: str
    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    base: str


def kv_cache_of(opened: Opened, description: Mapping[str, Any], scales: int) -> KvCache:
    """What config, plan and scales say of the cache."""
    form, where = _format(opened, description)
    layers, reason = kv_layers(opened.config) if opened.config else ((), "no config")
    growing = [layer for layer in layers if layer.kind in ("full", "latent")]
    return KvCache(
        format=form,
        stated_in=where,
        scales=scales,
        bytes_per_token_16bit=_total(growing) if layers else None,
        state_bytes=_total([layer for layer in layers if layer.kind == "state"]),
        layers=dict(Counter(layer.kind for layer in layers)),
        reason=reason,
    )


def _total(layers: list[KvLayer]) -> int:
    return sum(layer.bytes_16bit for layer in layers)


def _format(opened: Opened, description: Mapping[str, Any]) -> tuple[str, str]:
    """The cache's format and the file that says so."""
    plan = opened.json_object(KV_PLAN)
    if plan is not None:
        listed = plan.get("layers")
        formats = Counter(
            str(layer.get("format"))[:_SHOWN]
            for layer in (listed if isinstance(listed, list) else ())
            if isinstance(layer, Mapping)
        )
        told = ", ".join(f"{form} ({count} layers)" for form, count in formats.most_common(8))
        return told or "16 bit", KV_PLAN
    scheme = description.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        kind, bits = scheme.get("type"), scheme.get("num_bits")
        dynamic = "dynamic" if scheme.get("dynamic") else "static"
        return f"{'fp' if kind == 'float' else 'int'}{str(bits)[:4]}, {dynamic} scales", "quantization_config"
    algorithm = description.get("kv_cache_quant_algo")
    if isinstance(algorithm, str):
        return algorithm[:_SHOWN], "quantization_config"
    return "16 bit", ""


def draft_of(opened: Opened) -> Draft | None:
    """The head in the folder ``draft``, or None.

    Raises:
        CheckpointError: its config is not a JSON object.
    """
    config = opened.json_object(DRAFT_CONFIG)
    if config is None:
        return None
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else config.get("model_type")
    vocabulary = config.get("draft_vocab_size") or config.get("vocab_size")
    return Draft(str(name)[:_SHOWN], _count(vocabulary), _count(config.get("num_hidden_layers")))


def adapter_of(opened: Opened) -> Adapter | None:
    """The adapter in the folder or in its folder ``adapter``, or None.

    Raises:
        CheckpointError: its config is not a JSON object.
    """
    for place in _ADAPTER_PLACES:
        found = opened.json_object(place)
        if found is None:
            continue
        targets = found.get("target_modules")
        named = targets if isinstance(targets, list) else [targets] if isinstance(targets, str) else []
        alpha = found.get("lora_alpha")
        return Adapter(
            place=place,
            rank=_count(found.get("r")),
            alpha=float(alpha) if isinstance(alpha, int | float) else None,
            targets=tuple(str(one)[:_SHOWN] for one in named[:32]),
            base=str(found.get("base_model_name_or_path") or "")[:200],
        )
    return None


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
