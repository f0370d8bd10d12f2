"""The recipe's ``drafts`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from compressor.drafts.spec import Kind
from compressor.evals.decode_spec import TEMPERATURES, usable_temperature
from compressor.recipe.fields import Bytes, Count, Revision, Seed, Text, Window, no_bool
from compressor.recipe.section import Section, blamed, is_none


def _usable(value: float) -> float:
    if not usable_temperature(value):
        raise ValueError("must be 0, or from {:g} to {:g}".format(*TEMPERATURES))
    return value


_Rate = Annotated[float, BeforeValidator(no_bool), Field(gt=0, le=1)]
_Temperature = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=2), AfterValidator(_usable)]
_Share = Annotated[float, BeforeValidator(no_bool), Field(ge=0, lt=1)]
_Ahead = Annotated[int, BeforeValidator(no_bool), Field(ge=1, le=16)]
_Patience = Annotated[int, BeforeValidator(no_bool), Field(ge=1, le=1000)]
# Keys that say how the target's own texts are made.
_OF_GENERATED = ("max_generated_tokens", "new_tokens", "temperature")


class DraftTrainSection(Section):
    """How a head is trained against the compressed model, which stays as it is."""

    data: Literal["generated", "text"] = Field(
        default="generated",
        description="What it is trained on: `generated`, what the compressed model itself writes after "
        "stretches of the calibration texts, looping outputs left out; or `text`, these texts alone.",
    )
    tokens: Count = Field(
        default=4_000_000, description="Tokens to train on, in whole steps; rows are shown again as needed."
    )
    sequence_length: Window = Field(
        default=512, description="Tokens of a row; of `generated`, prompt and answer together."
    )
    batch: Annotated[Count, Field(le=4096)] = Field(default=8, description="Rows of a step.")
    new_tokens: Count | None = Field(
        default=None,
        exclude_if=is_none,
        description="Of a row, how many the compressed model writes; by default half of sequence_length.",
    )
    max_generated_tokens: Count | None = Field(
        default=None,
        exclude_if=is_none,
        description="Most tokens that the compressed model writes to train on; by default 1,000,000.",
    )
    temperature: _Temperature | None = Field(
        default=None,
        exclude_if=is_none,
        description="That it writes at; 0 takes the likeliest token. By default 0.8: small models loop at 0.",
    )
    learning_rate: _Rate | None = Field(
        default=None,
        exclude_if=is_none,
        description="The highest; by default 1e-3 for a new head and 5e-5 for one that the source has.",
    )
    warmup: _Share = Field(
        default=0.05, description="Share of the steps until it is reached; then it falls in a cosine."
    )
    unroll: _Ahead | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tokens that the head proposes one upon the other in training; by default `tokens`.",
    )
    vocabulary_size: Annotated[Count, Field(ge=16, le=2**20)] | None = Field(
        default=None,
        exclude_if=is_none,
        description="eagle3: how many of the most frequent tokens it may propose, through a head of its own; "
        "by default all, through the model's head. A small model's draft step is mostly its head.",
    )
    cache: Bytes | None = Field(
        default=None,
        exclude_if=is_none,
        description="Disk for the compressed model's hidden states, such as 20GB: rows that fit are "
        "computed once, the others whenever they are shown. By default none is kept.",
    )
    held_out_rows: Annotated[Count, Field(le=100_000)] = Field(
        default=16, description="Further rows that loss and acceptance are measured on while it is trained."
    )
    patience: _Patience | None = Field(
        default=3,
        description="Training ends after so many measurements without a better one; null: never early. The "
        "best is kept.",
    )
    save_every: Count = Field(
        default=100, description="Steps after which the state is saved and held-out rows are measured."
    )
    seed: Seed | None = Field(
        default=None,
        exclude_if=is_none,
        description="Of first values, of what is written, and of the rows' order; by default the recipe's.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DraftTrainSection:
        for key in _OF_GENERATED:
            if self.data == "text" and getattr(self, key) is not None:
                raise blamed((key,), "has no effect with `data: text`: nothing is generated")
        if self.new_tokens is not None and self.new_tokens >= self.sequence_length:
            raise blamed(
                ("new_tokens",),
                f"a row of {self.sequence_length} tokens has no room for {self.new_tokens} and a prompt",
            )
        return self


class DraftMeasureSection(Section):
    """Decoding with and without the draft on prose, chat and code, in a plain loop of transformers."""

    prompts: Annotated[Count, Field(le=1000)] = Field(default=8, description="Of each domain.")
    prompt_tokens: Window = Field(default=64, description="Of each prompt.")
    new_tokens: Count = Field(default=128, description="That are written after each, at most.")
    batches: tuple[Annotated[Count, Field(le=1024)], ...] = Field(
        default=(1,), min_length=1, description="Sequences at once, measured one after another."
    )
    runs: Annotated[Count, Field(le=100)] = Field(
        default=3, description="That are timed, with and without the draft by turns."
    )


class DraftsSection(Section):
    """What proposes tokens that the compressed model verifies: faster decoding of the very same text."""

    kind: Kind = Field(
        description="`native`: the prediction layers that the source has, trained on where `train` is there; "
        "`eagle3`: a head that is trained, for Llama and Llama 4; `draft_model`: a smaller model of the same "
        "vocabulary."
    )
    tokens: _Ahead = Field(default=3, description="Tokens that are proposed at a time.")
    train: DraftTrainSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="How heads are trained. `eagle3` always is; `native` only where this is there, else its "
        "layers stay the source's.",
    )
    model: Text | None = Field(
        default=None,
        exclude_if=is_none,
        description="draft_model: the smaller model: a folder, a Hub id, a .gguf file or "
        "pkg:PACKAGE/FILE.gguf.",
    )
    revision: Revision | None = Field(
        default=None, exclude_if=is_none, description="draft_model: its Hub commit, tag or branch."
    )
    quantize: bool | None = Field(
        default=None,
        exclude_if=is_none,
        description="draft_model: whether it is quantized by the section `weights` too; by default not.",
    )

    measure: DraftMeasureSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="How decoding with the draft is measured after it is made: what is accepted by domain, "
        "whether the text is the same, and the time; by default it is not.",
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> DraftsSection:
        apart = self.kind == "draft_model"
        for key in ("model", "revision", "quantize"):
            if not apart and getattr(self, key) is not None:
                raise blamed((key,), f"has no effect with `kind: {self.kind}`, only with draft_model")
        if apart and self.model is None:
            raise blamed((), "`kind: draft_model` needs `model`: the smaller model")
        if apart and self.train is not None:
            raise blamed(("train",), "a draft model is taken as it is: nothing is trained")
        if self.train is not None and self.train.vocabulary_size is not None and self.kind == "native":
            what = "native layers propose through the model's own head: their vocabulary is the model's"
            raise blamed(("train", "vocabulary_size"), what)
        return self

    @property
    def training(self) -> DraftTrainSection | None:
        """How it is trained, if it is."""
        return DraftTrainSection() if self.train is None and self.kind == "eagle3" else self.train
