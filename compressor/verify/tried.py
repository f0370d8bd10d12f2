"""What was tried: formats that vLLM loaded, by version and device, as bench/results/serving-*.json have it.

docs/serving.md says how; the wheel ships neither. tests/verify/test_doctor.py holds this against the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tried:
    """One format in one engine.

    Attributes:
        version: of vLLM.
        device: ``cpu``, or the GPU's name.
        format: label of the scheme, with the dialect behind it where that is ModelOpt's.
        families: verdict of ``compress verify`` -> the families that it was reached on. ``emulated``:
            through a plug-in that decodes weights on loading, so that kernels were not tried.
    """

    version: str
    device: str
    format: str
    families: Mapping[str, tuple[str, ...]]

    def told(self) -> str:
        """``agrees (llama, mixtral); disagrees (llama4)``; many families are counted."""
        parts = []
        for verdict, names in self.families.items():
            shown = ", ".join(names) if len(names) <= _SHOWN else f"{len(names)} families"
            parts.append(f"{verdict} ({shown})")
        return "; ".join(parts)


_SHOWN = 4


def _tried(version: str, device: str, form: str, **families: str) -> Tried:
    """Families apart by spaces; in the names of verdicts a double underscore is ", "."""
    verdicts = {name.replace("__", ", "): tuple(names.split()) for name, names in families.items()}
    return Tried(version, device, form, verdicts)


_CPU = ("0.32.0", "cpu")
_H200 = ("0.26.0", "NVIDIA H200")
TRIED = (
    _tried(*_CPU, "FP8_BLOCK", agrees="llama"),
    _tried(*_CPU, "FP8_BLOCK (ModelOpt)", agrees="llama"),
    _tried(*_CPU, "FP8_DYNAMIC", agrees__emulated="llama llama4 mixtral qwen3_moe smollm2"),
    _tried(*_CPU, "FP8_DYNAMIC (ModelOpt)", agrees__emulated="llama"),
    _tried(*_CPU, "MXFP4", agrees__emulated="llama qwen3 smollm2", unsupported="mixtral"),
    _tried(
        *_CPU,
        "NVFP4A16",
        agrees__emulated="deepseek_v3 gemma3 glm4_moe gpt_oss llama llama4 "
        "mixtral qwen3 qwen3_moe qwen3_next qwen3_next_fused smollm2",
    ),
    _tried(*_CPU, "NVFP4A16 (ModelOpt)", agrees__emulated="llama smollm2", unsupported="mixtral"),
    _tried(
        *_CPU,
        "W4A16 g64",
        agrees="gemma3 gpt_oss llama mixtral qwen3 qwen3_moe qwen3_next smollm2",
        unsupported="deepseek_v3 glm4_moe llama4 qwen3_next_fused",
    ),
    _tried(*_CPU, "W8A16", undecided__emulated="llama smollm2"),
    _tried(*_H200, "FP8_BLOCK", undecided="llama"),
    _tried(*_H200, "FP8_BLOCK (ModelOpt)", undecided="llama"),
    _tried(*_H200, "FP8_DYNAMIC", undecided="llama llama4 mixtral qwen3_moe"),
    _tried(*_H200, "FP8_DYNAMIC (ModelOpt)", undecided="llama"),
    _tried(*_H200, "MXFP4", agrees="llama mixtral"),
    _tried(*_H200, "NVFP4A16", agrees="llama mixtral qwen3_moe smollm2", disagrees="llama4"),
    _tried(*_H200, "NVFP4A16 (ModelOpt)", agrees="llama mixtral"),
    _tried(*_H200, "W4A16 g64", agrees="llama llama4 mixtral qwen3_moe"),
    _tried(*_H200, "W8A16", undecided="llama"),
)


def nearest(form: str, version: str, *, on_gpu: bool) -> Tried | None:
    """What is known of a format: on such a device, with this version if it was tried, else with another."""
    found = [one for one in TRIED if one.format == form and (one.device != "cpu") is on_gpu]
    return next((one for one in found if one.version == version), found[0] if found else None)
