"""Which engines read a checkpoint, from how it says it is quantized; what was tried: docs/serving.md.

Methods as transformers 5.17 (``quantizers/auto.py`` AUTO_QUANTIZATION_CONFIG_MAPPING) and vLLM 0.32
(``model_executor/layers/quantization/__init__.py`` QuantizationMethods) name them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from compressor.checkpoint.gguf_config import ARCHITECTURES
from compressor.report.serve import scheme_notes

TRANSFORMERS_METHODS = frozenset(
    {"aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8"}
    | {"fouroversix", "fp8", "fp_quant", "gemma", "gguf", "gptq", "higgs", "hqq", "metal", "mxfp4", "mxfp8"}
    | {"nvfp4", "quanto", "quark", "sinq", "spqr", "torchao", "vptq"}
)
VLLM_METHODS = frozenset(
    {"auto_awq", "auto_gptq", "awq", "awq_marlin", "compressed-tensors", "deepseek_v4_fp8", "experts_int8"}
    | {"fbgemm_fp8", "fp8", "fp_quant", "gptq", "gptq_marlin", "humming", "inc", "modelopt", "modelopt_fp4"}
    | {
        "modelopt_mixed",
        "modelopt_mxfp8",
        "moe_wna16",
        "mxfp4",
        "gpt_oss_mxfp4",
        "online",
        "quark",
        "torchao",
    }
)
# What vLLM takes for one of its own (config/model.py _verify_quantization, override_quantization_method).
_VLLM_OTHERWISE = {"auto-round": "inc"}
# Read here as sources (checkpoint/dequantized.py).
_DEQUANTIZED = ("fp8", "mxfp4", "compressed-tensors")
# Names of schemes that are this project's or NVIDIA's; others have no notes.
_NOTED = ("NVFP4", "MXFP4", "FP8", "W4A16", "W8A16", "W8A8")
_BY_METHOD = "by its quantization method, if it knows the architecture; not tried here"

Verdict = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Loader:
    """One engine's answer.

    Attributes:
        engine: its name and the version that is spoken of.
        loads: ``unknown`` where nothing says so.
        why: one sentence.
    """

    engine: str
    loads: Verdict
    why: str


def loaders(form: str, method: str, schemes: Collection[str], model_type: str) -> list[Loader]:
    """What each engine makes of a checkpoint.

    Args:
        form: as ``Opened.form``.
        method: its ``quant_method``; "" for a plain one.
        schemes: what its quantized weights are stored as.
        model_type: of its config.
    """
    if form == "gguf":
        return _gguf(model_type)
    if form == "adapter":
        why = "as an adapter beside the model that it was trained on"
        return [Loader("transformers 5.17 with peft", "yes", why), Loader("vLLM 0.32", "yes", why)]
    vendors = method.startswith("modelopt")
    found = [
        _by_method("transformers 5.17", method, TRANSFORMERS_METHODS),
        _by_method(
            "vLLM 0.32", _VLLM_OTHERWISE.get(method, method), VLLM_METHODS | ({method} if vendors else set())
        ),
    ]
    if vendors:
        found.append(
            Loader("TensorRT-LLM, SGLang", "yes", "the dialect is theirs too; none of the two was run here")
        )
    if not method:
        why = "as a source"
    elif method in _DEQUANTIZED or vendors:
        why = "as a source with `model.from: dequantize`"
    else:
        why = f"sources quantized with {method[:40]} are not decoded; take the 16-bit original"
    found.append(Loader("compress", "no" if why.startswith("sources") else "yes", why))
    return found


def notes_on(schemes: Collection[str]) -> list[str]:
    """What serving these schemes needs, as the report of a run says it."""
    notes = [note for scheme in schemes if scheme.startswith(_NOTED) for note in scheme_notes(scheme)]
    return list(dict.fromkeys(notes))


def _by_method(engine: str, method: str, known: Collection[str]) -> Loader:
    if not method:
        return Loader(engine, "yes", "not quantized; if it knows the architecture")
    if method in known:
        return Loader(engine, "yes", _BY_METHOD)
    return Loader(engine, "no", f"it has no quantization method {method[:40]!r}")


def _gguf(model_type: str) -> list[Loader]:
    known = model_type in ARCHITECTURES
    why = "as a source, dequantized" if known else f"GGUF architectures read: {', '.join(ARCHITECTURES)}"
    return [
        Loader("llama.cpp", "yes", "its own format; not tried here"),
        Loader(
            "transformers 5.17", "unknown", "dequantized whole (`gguf_file=`), architectures that it lists"
        ),
        Loader("vLLM 0.32", "no", "it has no quantization method 'gguf'"),
        Loader("compress", "yes" if known else "no", why),
    ]
