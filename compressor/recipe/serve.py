"""The recipe's ``serve`` section: on what, for whom and at what price the result is to be served."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from compressor.recipe.fields import Bytes, Count, Slug, Window, no_bool
from compressor.recipe.gpus import DEFAULT_GPU, GPUS, Gpu
from compressor.recipe.section import Section, blamed, is_none
from compressor.schemes.base import Arithmetic

# The least of each is far below anything real, and far above what rounds to nothing when it is multiplied.
_Tera = Annotated[float, BeforeValidator(no_bool), Field(ge=1e-3, le=1e6)]
_Price = Annotated[float, BeforeValidator(no_bool), Field(ge=1e-6, le=1e6)]
_Share = Annotated[float, BeforeValidator(no_bool), Field(ge=1e-3, le=1)]
_Micro = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1e6)]
_Passes = Annotated[float, BeforeValidator(no_bool), Field(ge=1, le=32)]
_Amount = Annotated[float, BeforeValidator(no_bool), Field(ge=1e-12, le=1e12)]
# Measures that a claim can be about; ``report.compounding.RowKey`` has more.
ClaimKey = Literal["gpus", "users", "reach", "speed", "throughput", "weights", "cache", "first_token"]


def _known(name: str) -> str:
    if name in GPUS:
        return name
    longer = [known for known in GPUS if known.startswith(name.lower())] if name else []
    near = longer or get_close_matches(name.lower(), list(GPUS), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown GPU {name!r}{hint} (known: {', '.join(GPUS)}; another: memory, bandwidth, tflops)"
    )


def _pair(value: object) -> object:
    """A single number is a range of one."""
    return value if isinstance(value, list | tuple) else (value, value)


def _upwards(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"must be the lowest and the highest, not {ends[0]:g} and {ends[1]:g}")
    return ends


_Range = Annotated[
    tuple[_Amount, _Amount],
    BeforeValidator(_pair, json_schema_input_type=float | tuple[float, float]),
    AfterValidator(_upwards),
]


class GpuSection(Section):
    """A GPU that the table does not have, or one as it was measured."""

    name: Slug = Field(default="custom", description="What tables call it.")
    memory: Bytes = Field(description="Of one, such as 96GB.")
    bandwidth: Bytes = Field(description="Of its memory, a second, such as 1790GB.")
    tflops: dict[Arithmetic, _Tera] = Field(
        description="1e12 dense operations a second by format: `bf16`, and where it has them `fp8`, `int8`, "
        "`fp4`; without sparsity."
    )

    @model_validator(mode="after")
    def _has_bf16(self) -> GpuSection:
        if "bf16" not in self.tflops:
            raise blamed(("tflops",), "needs bf16: every other format is decoded to it where it is missing")
        return self

    def gpu(self) -> Gpu:
        """As the table's rows are."""
        flops = {arithmetic: rate * 1e12 for arithmetic, rate in self.tflops.items()}
        return Gpu(self.name, self.memory, float(self.bandwidth), flops, "the recipe")


class ClaimSection(Section):
    """What somebody claims of such a model: a number or the lowest and highest, before and after."""

    baseline: _Range = Field(description="Before: a number, or the lowest and highest.")
    optimized: _Range = Field(description="After: the same.")


_Name = Annotated[str, WithJsonSchema({"type": "string", "examples": list(GPUS)})]


def _gpu(value: object) -> object:
    """A known name, or a section: told apart first, so that faults are of the one that was meant."""
    if isinstance(value, str):
        return _known(value)
    if isinstance(value, dict):
        return GpuSection.model_validate(value)
    if isinstance(value, GpuSection):
        return value
    raise ValueError("must be the name of a GPU, or a map of memory, bandwidth and tflops")


class ServeSection(Section):
    """What plan and report compute memory, users, speed and cost for; it changes nothing in the result."""

    gpu: Annotated[_Name | GpuSection, BeforeValidator(_gpu)] = Field(
        default=DEFAULT_GPU, description="A GPU by name, or {name, memory, bandwidth, tflops}."
    )
    gpus: Annotated[Count, Field(le=100_000)] | None = Field(
        default=None,
        exclude_if=is_none,
        description="How many; by default as few as hold the weights and the users' caches, for source and "
        "result each.",
    )
    context: Window | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tokens of each user; by default 8,192, or all that the model reads if that is less.",
    )
    concurrency: Annotated[Count, Field(le=1_000_000)] = Field(default=1, description="Users at once.")
    price_per_hour: _Price | None = Field(
        default=None,
        exclude_if=is_none,
        description="Of one GPU, in any currency; costs of a million tokens are in the same.",
    )
    tokens_per_pass: _Passes | None = Field(
        default=None,
        exclude_if=is_none,
        description="With a section `drafts`: tokens that one pass of the result is taken to give until it "
        "is measured; marked as claimed.",
    )
    efficiency: Annotated[
        tuple[_Share, _Share], BeforeValidator(_pair, json_schema_input_type=float | tuple[float, float])
    ] = Field(
        default=(1.0, 1.0),
        description="Share of the memory's bandwidth that kernels reach: a number, or that of the source's "
        "and of the result's; `scripts/bench.py roofline` measures it. By default all: speeds are bounds.",
    )
    step_overhead_us: _Micro = Field(
        default=0.0, description="Microseconds of every step beside; the same benchmark measures them."
    )
    claims: dict[ClaimKey, ClaimSection] = Field(
        default_factory=dict,
        description="Numbers claimed elsewhere, shown beside what is computed and measured.",
    )

    def card(self) -> Gpu:
        """The GPU."""
        return GPUS[self.gpu] if isinstance(self.gpu, str) else self.gpu.gpu()
