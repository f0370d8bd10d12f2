"""What ``weights.scheme: auto`` may choose among, and what it must keep to."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from compressor.kv.formats import FORMATS
from compressor.kv.spec import AUTO as KV_AUTO
from compressor.recipe.fields import Bytes, Count, Window, no_bool
from compressor.recipe.kv_cache import FormatName
from compressor.recipe.section import Section, blamed, is_none

AUTO = "auto"
# Served side by side in one checkpoint by vLLM 0.32, each stored with 16-bit activations or scales of its own
# making (compressed_tensors.py, one scheme for each config group).
DEFAULT_CANDIDATES = ("nvfp4a16", "fp8_dynamic", "int8", "copy")


def _fraction(value: object) -> object:
    """0.03 of ``"3%"``; numbers pass through."""
    no_bool(value)
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})? ?%", value, re.ASCII):
        raise ValueError(f"{value!r} is neither a number nor a percentage such as '3%'")
    return float(Decimal(value.rstrip(" %")) / 100)


_Bits = Annotated[float, BeforeValidator(no_bool), Field(gt=0, le=16)]
_Increase = Annotated[
    float,
    BeforeValidator(_fraction),
    Field(gt=0, le=10, json_schema_extra={"type": ["number", "string"]}),
]


class WeightBudgetSection(Section):
    """What the weights may take, in one of several ways; each says which bits or bytes it counts."""

    bits_per_target_weight: _Bits | None = Field(
        default=None,
        exclude_if=is_none,
        description="Bits of a weight over the tensors that are quantized or chosen for, scales included: "
        "those that stay in 16 bit by choice count, embeddings and norms do not.",
    )
    bits_per_weight: _Bits | None = Field(
        default=None,
        exclude_if=is_none,
        description="Bits of a weight over the whole checkpoint, a tied embedding counted once.",
    )
    bytes: Bytes | None = Field(
        default=None, exclude_if=is_none, description="Bytes of all tensors of the result, such as 12GB."
    )
    max_perplexity_increase: _Increase | None = Field(
        default=None,
        exclude_if=is_none,
        description="0.03 or '3%': the smallest result whose perplexity on calibration text that nothing was "
        "chosen on rises by no more, at the upper end of a 95% interval.",
    )
    gpu_memory: Bytes | None = Field(
        default=None,
        exclude_if=is_none,
        description="Memory of one GPU, such as 24GB, of which weights and KV cache may take 90% together at "
        "`context` and `users`; with `kv_formats`, bits are traded between the two.",
    )
    context: Window | None = Field(
        default=None, exclude_if=is_none, description="Tokens of a sequence that `gpu_memory` is for."
    )
    users: Count | None = Field(
        default=None, exclude_if=is_none, description="Sequences at once that it is for; by default one."
    )

    kv_formats: tuple[FormatName, ...] = Field(
        default=(),
        exclude_if=lambda formats: not formats,
        description="For `gpu_memory`: formats of the KV cache to choose among, such as [bf16, fp8, "
        "turboquant_4bit_nc], all of which vLLM serves. By default it is as `kv_cache` says, or 16 bit.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> WeightBudgetSection:
        ways = ("bits_per_target_weight", "bits_per_weight", "bytes", "max_perplexity_increase", "gpu_memory")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"not {' and '.join(given)}" if given else "none is given"
            raise ValueError(f"must be one of {', '.join(ways)}; {said}")
        if self.gpu_memory is not None and self.context is None:
            raise blamed(("gpu_memory",), "gpu_memory needs a context, in tokens, beside it")
        for index, name in enumerate(self.kv_formats):
            if name == KV_AUTO or FORMATS[name].tier != "vllm" or FORMATS[name].make is None:
                raise blamed(("kv_formats", index), f"{name} is no single format that vLLM serves")
            if name in self.kv_formats[:index]:
                raise blamed(("kv_formats", index), f"{name} is listed twice")
        for name in ("context", "users", "kv_formats"):
            if self.gpu_memory is None and getattr(self, name):
                raise blamed((name,), f"{name} goes with gpu_memory only")
        return self
