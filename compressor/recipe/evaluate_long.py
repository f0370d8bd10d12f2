"""The recipe's ``evaluate.long`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from compressor.evals.long_spec import RULER_TASKS, check_ruler
from compressor.recipe.fields import Count, Text, Window, no_bool
from compressor.recipe.section import Section, is_none

_Depth = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]
_Kind = Literal["passkey", "needle"]
_Lengths = Annotated[tuple[Window, ...], Field(max_length=32)]


def _ruler(name: str) -> str:
    reason = check_ruler(name)
    if reason is not None:
        raise ValueError(reason)
    return name


_RulerTask = Annotated[
    str, AfterValidator(_ruler), WithJsonSchema({"type": "string", "enum": list(RULER_TASKS)})
]


class NeedlesSection(Section):
    """Numbers hidden in long texts and asked for at their end."""

    kinds: Annotated[tuple[_Kind, ...], Field(min_length=1, max_length=2)] = Field(
        default=("passkey", "needle"),
        description="`passkey`: in five short sentences over and over; `needle`: in a real text.",
    )
    lengths: _Lengths = Field(default=(), description="Tokens of the texts; by default `tokens`.")
    depths: Annotated[tuple[_Depth, ...], Field(min_length=1, max_length=64)] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0),
        description="Where they are hidden: 0 at the beginning, 1 right before the question.",
    )
    trials: Annotated[Count, Field(le=1000)] = Field(
        default=5, description="Texts of each kind, length and depth, with different numbers."
    )


class RulerSection(Section):
    """RULER tasks of lm-eval that make their own data."""

    tasks: Annotated[tuple[_RulerTask, ...], Field(min_length=1, max_length=len(RULER_TASKS))] = Field(
        description=f"Of {', '.join(RULER_TASKS)}; the others need the network."
    )
    lengths: _Lengths = Field(
        default=(), description="Tokens of a prompt and its answer; by default `tokens`."
    )
    limit: Annotated[Count, Field(le=500)] = Field(
        default=20, description="Samples of each task and length; lm-eval takes 500."
    )


class LongSection(Section):
    """What is measured at long context: likelihood by position on long documents, and retrieval."""

    documents: Text = Field(
        default="calibration/long/heldout.jsonl.xz",
        description="Long documents that nothing was calibrated, searched or trained on: JSON lines with the "
        "field `text`, packed by xz or not.",
    )
    count: Annotated[Count, Field(le=10_000)] = Field(
        default=10, description="How many: the first that are long enough."
    )
    tokens: Window | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tokens of each; by default `context.target_length`, else what the model reads.",
    )
    stride: Count | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tokens by which the window of the reference slides: the unscaled source, which sees "
        "its own length less this to its own length. By default an eighth of that length.",
    )
    needles: NeedlesSection | None = Field(
        default=None, exclude_if=is_none, description="Numbers to hide; by default none."
    )
    ruler: RulerSection | None = Field(
        default=None, exclude_if=is_none, description="RULER tasks; by default none."
    )
