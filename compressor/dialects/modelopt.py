"""NVIDIA's dialect: what ModelOpt's unified Hugging Face export writes, from the same codes and scales.

NVIDIA/Model-Optimizer@0.47.0 modelopt/torch/export/quant_utils.py (``get_quant_config``,
``process_layer_quant_config``) and convert_hf_config.py. ModelOpt knows one algorithm for a checkpoint, or
``MIXED_PRECISION`` and a table of its modules.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.kept import KeptScheme
from compressor.checkpoint.modelopt import (
    ALGORITHMS,
    CONFIG_NAME,
    MIXED,
    Algorithm,
    algorithm_for,
    modelopt_headers,
    to_modelopt,
)
from compressor.dialects.base import Description, Dialect, Modules
from compressor.schemes.base import Scheme
from compressor.spec import LinearPart, TensorHeader

if TYPE_CHECKING:
    import torch

_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
# How convert_hf_config.py describes an algorithm; where one is all there is, only those of ``_TOLD``.
_GROUPS = {
    "W4A16_NVFP4": {"weights": _FP4},
    "NVFP4": {"input_activations": _FP4, "weights": _FP4},
    "FP8": {"input_activations": _FP8, "weights": _FP8},
    "FP8_PER_CHANNEL_PER_TOKEN": {"input_activations": _FP8, "weights": _FP8 | {"strategy": "channel"}},
}
_TOLD = ("W4A16_NVFP4", "NVFP4", "FP8")
# One scale a row or block of an expert: not what vLLM reads there.
_NOT_FOR_EXPERTS = ("FP8_DYNAMIC", "FP8_BLOCK")
_EXPERTS = ".experts."
_KV_SCHEMA = 1  # kv_cache_schema_version


class ModelOpt(Dialect):
    """TensorRT-LLM, SGLang and vLLM read it, each some of its algorithms; transformers does not."""

    name = "modelopt"

    def problem(self, scheme: Scheme) -> str | None:
        """A clause where ModelOpt has no algorithm that stores the same."""
        if algorithm_for(scheme.label) is not None:
            return None
        known = ", ".join(algorithm.preset for algorithm in ALGORITHMS)
        return f"{scheme.label} has no form in ModelOpt's dialect, which holds {known}"

    def outputs(self, scheme: Scheme, part: LinearPart, *, dtype: str) -> tuple[TensorHeader, ...]:
        """``weight``, ``weight_scale``, for NVFP4 ``weight_scale_2``, and ``input_scale`` where it is static.

        See ``checkpoint.modelopt.modelopt_headers``.
        """
        prefix = f"{part.module}."
        theirs = scheme.outputs(part.module, part.out_features, part.in_features, dtype=dtype)
        local = {header.name.removeprefix(prefix): header for header in theirs}
        return tuple(
            TensorHeader(prefix + name, header.dtype, header.shape)
            for name, header in modelopt_headers(_algorithm(scheme), local).items()
        )

    def spell(self, scheme: Scheme, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See ``checkpoint.modelopt.to_modelopt``."""
        return to_modelopt(_algorithm(scheme), tensors)

    def describe(self, modules: Modules) -> Description:
        """hf_quant_config.json, and the same as ``quantization_config``.

        ``producer`` is this program: engines ask for the name "modelopt" only where config.json says nothing
        (vllm@0.32.0 model_loader/weight_utils.py).
        """
        stored = {
            module: _algorithm(scheme) for scheme, names in modules.by_scheme.items() for module in names
        }
        quantization = _quantization(stored, exclude_modules(_unquantized(modules), stored))
        producer = {"name": "compressor", "version": version("compressor")}
        return Description(
            _inline(quantization) | {"producer": producer, "quant_method": "modelopt"},
            {CONFIG_NAME: {"producer": producer, "quantization": quantization}},
        )

    def kv_scales(self, attention: str) -> tuple[str, str]:
        """``k_proj.k_scale`` and ``v_proj.v_scale``."""
        return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"

    def with_fp8_cache(self, described: Description, attentions: Sequence[str]) -> Description:
        """``kv_cache_quant_algo`` FP8, and the map by layers that newer versions of ModelOpt write too."""
        layers = {module: {"quant_algo": "FP8"} for module in attentions}
        told = {
            "kv_cache_quant_algo": "FP8",
            "kv_cache_quantized_layers": layers,
            "kv_cache_schema_version": _KV_SCHEMA,
        }
        files = {name: dict(content) for name, content in described.files.items()}
        files[CONFIG_NAME]["quantization"] = {**files[CONFIG_NAME]["quantization"], **told}
        scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
        config = {**described.quantization_config, "kv_cache_scheme": scheme, **told}
        return Description(config, files)

    def warnings(self, modules: Modules) -> list[str]:
        """FP8 experts: vLLM reads one scale a matrix there (modelopt.py ``ModelOptFp8MoEMethod``)."""
        labels = sorted(
            scheme.label
            for scheme, names in modules.by_scheme.items()
            if scheme.label in _NOT_FOR_EXPERTS and any(_EXPERTS in name for name in names)
        )
        if not labels:
            return []
        return [
            f"vLLM 0.32 cannot serve experts of {' and '.join(labels)} in ModelOpt's dialect: for it, use "
            "export.format compressed-tensors, or nvfp4a16"
        ]


def exclude_modules(unquantized: Iterable[str], quantized: Collection[str]) -> list[str]:
    """The unquantized modules; whole branches of them are one entry, ``BRANCH*`` or ``BRANCH.*``.

    The same entries, sorted alike, as ModelOpt's ``_prefix_wildcard_summarize_exclude_modules``: the
    shortest branch that no quantized module begins with.
    """
    ordered, exact = sorted(quantized), set(quantized)

    def reached(prefix: str) -> bool:
        index = bisect_left(ordered, prefix)
        return index < len(ordered) and ordered[index].startswith(prefix)

    def shortest(name: str) -> str:
        for branch in _branches(name):
            if not reached(branch):
                return f"{branch}*"
            if branch not in exact and not reached(f"{branch}."):
                return f"{branch}.*"
        return name

    return sorted({shortest(name) for name in unquantized})


def _algorithm(scheme: Scheme | KeptScheme) -> Algorithm:
    found = algorithm_for(scheme.label)
    assert found is not None, f"the plan refuses {scheme.label}"
    return found


def _branches(name: str) -> Iterator[str]:
    """``a`` and ``a.b`` of ``a.b.c``."""
    for index, character in enumerate(name):
        if character == ".":
            yield name[:index]


def _unquantized(modules: Modules) -> list[str]:
    """What ModelOpt counts: linear layers, routers, embeddings, and the module that fused experts lie in."""
    experts = {name.rpartition(".")[0] for name in modules.fused_experts}
    return [*modules.left_16bit, *modules.embeddings, *sorted(experts)]


def _quantization(stored: Mapping[str, Algorithm], excluded: list[str]) -> dict[str, Any]:
    """The entry ``quantization`` of hf_quant_config.json.

    A mixed one lists the excluded modules too, as ModelOpt does not: vLLM would give experts that are left in
    16 bit the algorithm of their neighbours (modelopt.py ``_resolve_quant_algo``).
    """
    head: dict[str, Any] = {"quant_algo": MIXED, "kv_cache_quant_algo": None}
    algorithms = set(stored.values())
    if len(algorithms) == 1:
        return head | _layer(algorithms.pop()) | {"exclude_modules": excluded}
    layers = {module: _layer(algorithm) for module, algorithm in stored.items()}
    return head | {"quantized_layers": layers, "exclude_modules": excluded}


def _layer(algorithm: Algorithm) -> dict[str, Any]:
    size = algorithm.group_size
    return {"quant_algo": algorithm.name} | ({} if size is None else {"group_size": size})


def _inline(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """``convert_hf_quant_config_format``: the same as config.json has it."""
    inline: dict[str, Any] = {}
    layers: Mapping[str, Mapping[str, Any]] | None = quantization.get("quantized_layers")
    if layers is not None:
        targets: dict[str, list[str]] = {}
        for module, layer in layers.items():
            targets.setdefault(layer["quant_algo"], []).append(module)
        inline["config_groups"] = {
            f"group_{index}": _group(name) | {"targets": sorted(names)}
            for index, (name, names) in enumerate(targets.items())
        }
        inline["quantized_layers"] = layers
    elif quantization["quant_algo"] in _TOLD:
        inline["config_groups"] = {"group_0": _group(quantization["quant_algo"]) | {"targets": ["Linear"]}}
    return inline | {"ignore": quantization["exclude_modules"], "quant_algo": quantization["quant_algo"]}


def _group(name: str) -> dict[str, Any]:
    """``_quant_algo_to_group_config``; it has none for FP8 by blocks."""
    described = _GROUPS.get(name)
    if described is None:
        return {"quant_algo": name}
    return {part: dict(values) for part, values in described.items()}
