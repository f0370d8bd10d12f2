"""Values chosen by llm-compressor's ``oneshot``, from a list of its modifiers. Does not import the library.

What a recipe may say is settled here: the library chooses values, the recipe's rules say which matrices are
stored how. ``compressor.stages.oneshot`` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, field_validator

from compressor.solvers.base import Solver

LIBRARY = "llmcompressor"
# Choose stored values, given a quantization config; of these the last two overwrite the weights.
QUANTIZERS = ("QuantizationModifier", "GPTQModifier", "AutoRoundModifier")
OVERWRITING = ("GPTQModifier", "AutoRoundModifier")
# Change weights in 16 bit so that the model computes the same, before they are quantized.
TRANSFORMS = (
    "AWQModifier",
    "SmoothQuantModifier",
    "LogarithmicEqualizationModifier",
    "SpinQuantModifier",
)
_SMOOTHING = ("SmoothQuantModifier", "LogarithmicEqualizationModifier")
_PRUNES = "prunes weights, and no scheme here stores a sparse matrix"
_REFUSED = {
    "QuIPModifier": "rotates activations as the model computes, which the stored checkpoint cannot say",
    "REAPPruningModifier": "removes experts, so that the result has other tensors than the source",
    "SparseGPTModifier": _PRUNES,
    "WandaPruningModifier": _PRUNES,
    "MagnitudePruningModifier": _PRUNES,
    "ConstantPruningModifier": _PRUNES,
}
_RULES_SAY = "the recipe's own scheme, rules and ignore say that"
_FORBIDDEN = ("targets", "scheme", "config_groups", "ignore", "kv_cache_scheme", "bypass_divisibility_checks")
_ONLINE = ("R3", "R4")
# Source bytes a second on two CPU cores (GPTQ, SmolLM2-135M-Instruct: 4.5 s a block of 7.1 MB, 8192 tokens).
_BYTES_PER_S = 1.5e6


class LlmCompressor(Solver):
    """What llm-compressor's modifiers make of the weights, taken into the same export, evaluation and gates.

    The whole model is in memory, and an interrupted run starts the stage again. Every quantized matrix of a
    recipe has this solver, with the same modifiers.
    """

    kind: Literal["llmcompressor"] = "llmcompressor"
    modifiers: tuple[dict[str, dict[str, Any]], ...] = Field(
        min_length=1,
        description="In the order in which they are applied: names (GPTQModifier), or {name: {option: "
        "value}}. At most one quantizes, and it is the last; after transforms alone (AWQModifier, "
        "SmoothQuantModifier, SpinQuantModifier) QuantizationModifier follows.",
    )

    @field_validator("modifiers", mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        """Names become maps with no options."""
        if not isinstance(value, list | tuple):
            return value
        return [{item: {}} if isinstance(item, str) else _without_null(item) for item in value]

    @field_validator("modifiers")
    @classmethod
    def _checked(cls, modifiers: tuple[dict[str, dict[str, Any]], ...]) -> Any:
        for position, item in enumerate(modifiers):
            if len(item) != 1:
                raise ValueError("each modifier is a name, or a map with one name and its options")
            [(name, options)] = item.items()
            _check_name(name)
            _check_options(name, options)
            if name in QUANTIZERS and position + 1 < len(modifiers):
                raise ValueError(f"{name} quantizes, so it must be the only one that does, and the last")
        return modifiers

    @property
    def named(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """(name, options) of each modifier as applied: the last one quantizes."""
        found = [(name, options) for item in self.modifiers for name, options in item.items()]
        if found[-1][0] not in QUANTIZERS:
            found.append(("QuantizationModifier", {}))
        return tuple(found)

    @property
    def transforms(self) -> bool:
        """Whether weights are changed in 16 bit before they are quantized."""
        return len(self.named) > 1

    @property
    def overwrites(self) -> bool:
        """Whether the library rounds the weights in place, rather than leave what was to be rounded."""
        return self.named[-1][0] in OVERWRITING

    def uses(self, name: str) -> bool:
        """Whether the modifier is applied."""
        return any(name == used for used, _ in self.named)

    @property
    def needs_calibration(self) -> bool:
        """See ``Solver.needs_calibration``."""
        return True

    @property
    def bytes_per_s(self) -> float:
        """See ``Solver.bytes_per_s``."""
        return _BYTES_PER_S


def _without_null(item: Any) -> Any:
    """``- GPTQModifier:`` in YAML is a map to null."""
    if not isinstance(item, Mapping):
        return item
    return {name: {} if options is None else options for name, options in item.items()}


def _check_name(name: str) -> None:
    known = (*QUANTIZERS, *TRANSFORMS)
    if name in _REFUSED:
        raise ValueError(f"{name} {_REFUSED[name]} (known: {', '.join(known)})")
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown modifier {name!r}{hint} (known: {', '.join(known)})")


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    for option in _FORBIDDEN:
        # There it names norms that are not smoothed.
        if option in options and not (option == "ignore" and name in _SMOOTHING):
            raise ValueError(f"{name} may not have the option {option!r}: {_RULES_SAY}")
    if name == "SpinQuantModifier":
        online = [str(rotation).upper() for rotation in options.get("rotations", ())]
        if "transform_config" in options or any(rotation in _ONLINE for rotation in online):
            raise ValueError(
                "SpinQuantModifier: rotations R3, R4 and transform_config rotate activations as the model "
                "computes, which the stored checkpoint cannot say; use rotations: [R1, R2]"
            )
    if str(options.get("actorder", "")).lower() in ("group", "dynamic"):
        raise ValueError(
            f"{name}: actorder {options['actorder']!r} reorders the stored columns, which no scheme here "
            "stores; use static"
        )
