"""The ModelOpt quant: ``quant_method: modelopt`` in config.json, ``hf_quant_config.json``, or both.

Read as vLLM 0.32 model_executor/layers/quantization/modelopt.py does (``from_config``,
``is_layer_excluded``).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from compressor.checkpoint.modelopt import CONFIG_NAME, MIXED
from compressor.errors import CheckpointError
from compressor.verify.structure.contents import dumped
from compressor.verify.structure.layouts import E4M3, E8M0, FLOATS, Layout
from compressor.verify.structure.quant_config import KvCache, Names

# vLLM computes with whatever its memory holds where an activation scale that it expects is not loaded; a
# weight-only format drops one that is there.
_NVFP4 = Layout("NVFP4", "weight", "U8", 4, 1, 16, E4M3, "weight_scale_2", inputs=("input_scale",))
_FP8 = Layout("FP8", "weight", "F8_E4M3", 8, None, None, FLOATS, inputs=("input_scale",))
LAYOUTS = {
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": replace(_NVFP4, label="W4A16_NVFP4", inputs_optional=True),
    "FP8": _FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": replace(_FP8, label="FP8_PER_CHANNEL_PER_TOKEN", rows=1, inputs=()),
    "FP8_PB_WO": replace(_FP8, label="FP8_PB_WO", rows=128, columns=128, inputs=()),
    "MXFP8": replace(_FP8, label="MXFP8", rows=1, columns=32, scale_dtypes=E8M0, inputs=()),
}
# Each plain entry is looked for in each module's name.
MAX_EXCLUDED = 5_000
# vLLM leaves these alone whatever the list of excluded modules says.
_TOWERS = ("vision_tower", "vision_model", "vit_large_projector")


@dataclass(frozen=True)
class Facts:
    """What either file says; None: nothing.

    Attributes:
        algo: ``quant_algo`` in capitals.
        kv: ``kv_cache_quant_algo`` in capitals.
        group_size: columns that share a block scale.
        excluded: modules that are not quantized.
        layers: module -> algorithm, for ``MIXED_PRECISION``.
    """

    algo: str
    kv: str | None
    group_size: int | None
    excluded: tuple[str, ...]
    layers: Mapping[str, str]


def from_config(found: Mapping[str, Any]) -> Facts:
    """Facts from ``quantization_config`` of config.json.

    Raises:
        CheckpointError: a field has another type than it must have.
    """
    nested = found.get("quantization")
    if isinstance(nested, dict):
        return _facts(nested, nested.get("kv_cache_quant_algo"), "config.json")
    scheme = found.get("kv_cache_scheme")
    kv = found.get("kv_cache_quant_algo")
    if isinstance(scheme, dict) and scheme.get("type") == "float":
        kv = {8: "FP8", 4: "NVFP4"}.get(scheme.get("num_bits", 0), kv)
    return _facts(found, kv, "config.json")


def from_file(found: Mapping[str, Any]) -> Facts:
    """Facts from the contents of hf_quant_config.json.

    Raises:
        CheckpointError: it has no ``quantization``, or a field of another type than it must have.
    """
    inner = found.get("quantization")
    if not isinstance(inner, dict):
        raise CheckpointError(f"{CONFIG_NAME} has no object 'quantization'")
    return _facts(inner, inner.get("kv_cache_quant_algo"), CONFIG_NAME)


def contradictions(config: Facts, file: Facts) -> list[str]:
    """Where config.json and hf_quant_config.json differ; engines read one or the other."""
    pairs: list[tuple[str, object, object]] = [
        ("quant_algo", config.algo, file.algo),
        ("kv_cache_quant_algo", config.kv, file.kv),
        ("the list of modules left alone", sorted(set(config.excluded)), sorted(set(file.excluded))),
        ("quantized_layers", dict(config.layers), dict(file.layers)),
    ]
    if None not in (config.group_size, file.group_size):
        pairs.append(("group_size", config.group_size, file.group_size))
    return [
        f"config.json and {CONFIG_NAME} contradict each other: {what} is {dumped(ours)} in one and "
        f"{dumped(theirs)} in the other; engines read either, so export both again"
        for what, ours, theirs in pairs
        if ours != theirs
    ]


class ModelOpt:
    """One ModelOpt config.

    Raises:
        CheckpointError: an algorithm that engines do not load, or excluded modules that cannot be matched.
    """

    extras = False

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._names = Names(
            facts.excluded, "the list of excluded modules", is_pattern=lambda name: "*" in name or "?" in name
        )
        if len(self._names.plain) > MAX_EXCLUDED:
            raise CheckpointError(f"more than {MAX_EXCLUDED:,} modules are excluded by name; use wildcards")
        for algo in dict.fromkeys(facts.layers.values() or [""] if facts.algo == MIXED else [facts.algo]):
            if algo not in LAYOUTS:
                known = ", ".join((*LAYOUTS, MIXED))
                raise CheckpointError(f"quant_algo {dumped(algo)} is not one that engines load ({known})")
        if facts.kv not in (None, "FP8", "NVFP4"):
            raise CheckpointError(f"kv_cache_quant_algo {dumped(facts.kv)} is not one that engines load")
        if facts.group_size not in (None, 16) and "NVFP4" in facts.algo:
            raise CheckpointError(f"group_size {facts.group_size} in an NVFP4 config: NVFP4 has blocks of 16")
        self.kv = KvCache(facts.kv, static=True, per_head=False) if facts.kv else None
        self.label = f"ModelOpt ({facts.algo})"

    def layout(self, module: str, classes: Set[str]) -> Layout | None:
        """See ``QuantConfig.layout``."""
        if self._facts.algo == MIXED:
            return LAYOUTS.get(self._facts.layers.get(module, ""))
        if "Linear" not in classes or self.ignored(module, classes) is not None:
            return None
        return LAYOUTS[self._facts.algo]

    def ignored(self, module: str, classes: Set[str]) -> str | None:
        """See ``QuantConfig.ignored``: names, wildcards, and plain entries that are part of the name."""
        parts = (entry for entry in (*self._names.plain, *_TOWERS) if entry in module)
        return self._names.by_name(module) or next(parts, None)


def _facts(found: Mapping[str, Any], kv: object, where: str) -> Facts:
    algo, group_size = found.get("quant_algo"), found.get("group_size")
    if not isinstance(algo, str) or not algo:
        raise CheckpointError(f"{where} names no quant_algo")
    if kv is not None and not isinstance(kv, str):
        raise CheckpointError(f"{where}: kv_cache_quant_algo is {dumped(kv)}, not a name")
    if group_size is None:
        group_size = _group_size(found.get("config_groups"))
    if group_size is not None and type(group_size) is not int:
        raise CheckpointError(f"{where}: group_size is {dumped(group_size)}, not a number")
    excluded = found.get("exclude_modules", found.get("ignore")) or []
    layers = found.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise CheckpointError(f"{where}: quantized_layers is not an object of objects")
    if not isinstance(excluded, list) or not all(isinstance(entry, str) for entry in excluded):
        raise CheckpointError(f"{where}: the list of excluded modules is not a list of names")
    return Facts(
        algo.upper(),
        kv.upper() if kv else None,
        group_size,
        tuple(excluded),
        {module: str(entry.get("quant_algo", "")).upper() for module, entry in layers.items()},
    )


def _group_size(groups: object) -> object:
    """The weights' group size in ``config_groups``, where config.json has it."""
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("group_size"):
            return weights["group_size"]
    return None
