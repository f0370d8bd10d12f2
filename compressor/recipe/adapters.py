"""The recipe's ``adapters`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from compressor.recipe.fields import Count, Seed, Slug, Text, Window, no_bool
from compressor.recipe.section import Section, blamed, is_none

DEFAULT_DOCUMENTS = "calibration/long/train.jsonl.xz"
# vLLM 0.32 config/lora.py, MaxLoRARanks.
_MOST_RANK = 512
_Rate = Annotated[float, BeforeValidator(no_bool), Field(gt=0, le=1)]
_Share = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]
_Trained = Literal["norms", "embeddings"]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


class AdaptersSection(Section):
    """Low-rank adapters that are trained on long documents, before anything is calibrated.

    Source, adapters and one sequence are in memory at once; a GPU for all but the smallest models.
    """

    rank: Annotated[Count, Field(le=_MOST_RANK)] = Field(
        default=32, description="Of the matrices beside each projection of attention."
    )
    alpha: Annotated[Count, Field(le=10_000)] | None = Field(
        default=None,
        exclude_if=is_none,
        description="Their product is multiplied by alpha / rank; by default twice the rank.",
    )
    targets: tuple[Slug, ...] = Field(
        default=(),
        description="Last names of the layers that get one (`q_proj`); by default all projections of "
        "attention.",
    )
    train: tuple[_Trained, ...] = Field(
        default=("norms", "embeddings"),
        description="What is trained besides, as it is: without norms and embeddings a model learns little "
        "of longer contexts. A head that is tied to the embedding is trained with it.",
    )
    documents: Annotated[
        tuple[Text, ...],
        BeforeValidator(_one_or_many, json_schema_input_type=Text | list[Text]),
        Field(min_length=1),
    ] = Field(
        default=(DEFAULT_DOCUMENTS,),
        description="Long documents: UTF-8, plain, or JSON lines with the field `text`; both may be packed "
        "(.xz). Looked for from the current folder, beside the recipe, then among the shipped files.",
    )
    sequence_length: Window | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tokens of a sequence; by default context.target_length, else what the model reads.",
    )
    tokens: Count = Field(default=20_000_000, description="Tokens to train on, in whole steps.")
    tokens_per_step: Count | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tokens of one step, in whole sequences; by default one sequence, or 131,072.",
    )
    retrieval: _Share = Field(
        default=0.6,
        description="Share of the sequences in which made-up facts are hidden and asked for at the end: long "
        "documents alone teach little of finding them.",
    )
    learning_rate: _Rate = Field(default=2e-4, description="The highest, of adapters.")
    direct_learning_rate: _Rate = Field(default=5e-5, description="The highest, of norms and embeddings.")
    warmup_steps: Annotated[Count, Field(ge=1, le=100_000)] = Field(
        default=20, description="Until the highest rate is reached; then it falls to a tenth in a cosine."
    )
    seed: Seed | None = Field(
        default=None,
        exclude_if=is_none,
        description="Of the adapters' first values and the order of the documents; by default the recipe's.",
    )
    save_every: Count = Field(default=50, description="Steps after which the state is saved.")
    merge: bool = Field(
        default=True,
        description="Whether adapters go into the weights before these are quantized. If not, they are "
        "written to the folder `adapter` for vLLM's --lora-modules; for projections of attention only.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> AdaptersSection:
        if len(set(self.train)) < len(self.train):
            raise blamed(("train",), "something is listed twice")
        if not self.merge and self.train:
            raise blamed(
                ("merge",),
                f"vLLM 0.32 refuses adapters with trained {' and '.join(self.train)}: merge them, or set "
                "train to []",
            )
        return self
