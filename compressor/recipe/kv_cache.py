"""The recipe's ``kv_cache`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from compressor.kv.base import Tier
from compressor.kv.formats import FORMATS
from compressor.kv.spec import AUTO
from compressor.recipe.fields import Count, Window, no_bool
from compressor.recipe.section import Section, blamed, is_none

_Tokens = Annotated[int, BeforeValidator(no_bool), Field(ge=0, le=2**20)]
_Amount = Annotated[float, BeforeValidator(no_bool), Field(gt=0, le=1e9)]


def _format(name: str) -> str:
    return name if name == AUTO else FORMATS.find(name).name


FormatName = Annotated[
    str,
    AfterValidator(_format),
    WithJsonSchema({"type": "string", "examples": [AUTO, *FORMATS]}),
]


class KvBudgetSection(Section):
    """The most that the cache may take: in one of three ways."""

    bytes_per_token: Count | None = Field(
        default=None,
        exclude_if=is_none,
        description="Bytes of one token in all full-attention layers and heads, scales and norms and layers "
        "kept in 16 bit included.",
    )
    bits: Annotated[_Amount, Field(le=16)] | None = Field(
        default=None, exclude_if=is_none, description="The same in bits of one key or value element."
    )
    gib: _Amount | None = Field(
        default=None,
        exclude_if=is_none,
        description="GiB of the whole cache at `context` tokens and `users` sequences; windows and states "
        "included.",
    )
    context: Window | None = Field(
        default=None, exclude_if=is_none, description="Tokens of a sequence that `gib` is for."
    )
    users: Count | None = Field(
        default=None, exclude_if=is_none, description="Sequences at once that `gib` is for; by default one."
    )

    @model_validator(mode="after")
    def _one_way(self) -> KvBudgetSection:
        given = [name for name in ("bytes_per_token", "bits", "gib") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"not {' and '.join(given)}" if given else "none is given"
            raise ValueError(f"must be one of bytes_per_token, bits and gib; {said}")
        if self.gib is not None and self.context is None:
            raise blamed(("gib",), "gib needs a context, in tokens, beside it")
        for name in ("context", "users"):
            if self.gib is None and getattr(self, name) is not None:
                raise blamed((name,), f"{name} goes with gib only")
        return self


class KvCacheSection(Section):
    """How the KV cache is to be stored while the result is served."""

    format: FormatName = Field(
        default=AUTO,
        description="A format for every full-attention layer, by vLLM's --kv-cache-dtype name where it has "
        "one (`bf16` is its auto), or `auto`: chosen layer by layer under `budget`. Windows and chunks stay "
        "in 16 bit.",
    )
    tier: Tier | None = Field(
        default=None,
        exclude_if=is_none,
        description="Who must be able to serve it: `vllm` (0.32, by flags of its own), `own` (this package's "
        "cache), or `research` (the same, with fitted transforms). By default that of the format, and vllm "
        "for auto.",
    )
    budget: KvBudgetSection | None = Field(
        default=None, exclude_if=is_none, description="For auto: what the cache may take."
    )
    fold: Literal["auto", False] = Field(
        default="auto",
        description="Whether transforms that make keys and values easier to store are folded into the "
        "weights, where the model allows it; false for never.",
    )
    calibrate: bool = Field(
        default=True,
        description="Whether scales and transforms are fitted to the calibration texts. Without, FP8 scales "
        "are 1 and only transforms that need no data are folded.",
    )
    sink_tokens: _Tokens = Field(
        default=0, description="The first tokens of a sequence stay in 16 bit (own cache only)."
    )
    recent_tokens: _Tokens = Field(default=0, description="So do the last ones (own cache only).")
    contexts: tuple[Window, ...] = Field(
        default=(), description="Tokens of a sequence that plan and report count the cache for."
    )
    users: tuple[Count, ...] = Field(
        default=(), description="Sequences at once that they count the longest of these for."
    )

    @model_validator(mode="after")
    def _consistent(self) -> KvCacheSection:
        if self.format == AUTO and self.budget is None:
            raise blamed(("format",), "auto needs a budget beside it: bytes_per_token, bits or gib")
        if self.format != AUTO and self.budget is not None:
            raise blamed(("budget",), f"a budget has no effect with format {self.format}; it goes with auto")
        tier = self.tier or (FORMATS[self.format].tier if self.format != AUTO else "vllm")
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(self, name) and tier == "vllm":
                raise blamed((name,), "vLLM 0.32 keeps no tokens in 16 bit; set tier to own")
        return self
