"""The recipe's ``calibration`` section; files of mixtures have the same keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from compressor.calibration.spec import DEFAULT_LENGTH, DEFAULT_SAMPLES, Template
from compressor.recipe.fields import Revision, Seed, Slug, Text, no_bool
from compressor.recipe.section import Section, blamed, is_none

# Far more than any solver needs, and still counted out in seconds.
_Samples = Annotated[int, BeforeValidator(no_bool), Field(ge=1, le=1_000_000)]
_Length = Annotated[int, BeforeValidator(no_bool), Field(ge=2, le=2**20)]


class DatasetSection(Section):
    """One dataset of a mixture: a file, or a dataset on the Hub."""

    path: Text | None = Field(
        default=None,
        exclude_if=is_none,
        description="A text file: UTF-8, plain, or JSON lines (.jsonl, .ndjson) with one document each. "
        "Looked for from the current folder, beside the recipe, then among the shipped files.",
    )
    hub: Text | None = Field(
        default=None,
        exclude_if=is_none,
        description="Instead of `path`: the id of a dataset on the Hugging Face Hub (org/name). It is "
        "streamed in a seeded order, its files shuffled and their rows among 256 at a time, until there is "
        "enough: those 256 rows are downloaded at least, and nothing is stored.",
    )
    subset: Text | None = Field(
        default=None,
        exclude_if=is_none,
        description="The subset (configuration) of a Hub dataset that has several.",
    )
    revision: Revision | None = Field(
        default=None,
        exclude_if=is_none,
        description="The Hub dataset's commit; a branch or tag makes a run that cannot be repeated exactly.",
    )
    split: Text | None = Field(
        default=None, exclude_if=is_none, description="The Hub dataset's split; by default train."
    )
    field: Text | None = Field(
        default=None,
        exclude_if=is_none,
        description="The field of a JSON line or Hub row that holds the text, or a conversation: a list of "
        "{role, content}. By default `text`, else `messages`. Conversations with messages that hold no "
        "text (tool calls, images) are left out.",
    )
    weight: Annotated[float, BeforeValidator(no_bool), Field(gt=0, le=1e6)] = Field(
        default=1.0, description="Its share of the tokens, relative to the weights of the other datasets."
    )
    template: Template | None = Field(
        default=None,
        exclude_if=is_none,
        description="`chat`: documents pass through the tokenizer's chat template, which it must have; texts "
        "are what the user says. `plain`: they do not. By default conversations are chat and texts plain.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> DatasetSection:
        if (self.path is None) == (self.hub is None):
            raise blamed((), "a dataset has either `path` or `hub`")
        for key in ("subset", "revision", "split"):
            if self.path is not None and getattr(self, key) is not None:
                raise blamed((key,), "has no effect on a file, only with `hub`")
        if self.hub is not None and self.revision is None:
            raise blamed(("hub",), "a Hub dataset needs its `revision`: pin a commit")
        return self


class ImagesSection(Section):
    """Conversations with images."""

    path: Text = Field(
        description="JSON lines: `messages` of {role, content}, a content being a text or a list of parts, "
        "{type: text, text} or {type: image, path}, with paths relative to this file."
    )
    num_samples: _Samples | None = Field(
        default=None, exclude_if=is_none, description="How many of the conversations; by default all."
    )


class CalibrationSection(Section):
    """The texts that calibrated solvers and schemes are shown, and how much of them."""

    mixture: Slug | None = Field(
        default=None,
        exclude_if=is_none,
        description="calibration/NAME.yaml: a file with the other keys of this section, each of which a "
        "recipe may override. By default `default`: shipped prose, code and chat.",
    )
    datasets: tuple[DatasetSection, ...] = Field(
        default=(),
        min_length=1,
        exclude_if=lambda datasets: not datasets,
        description="The datasets, instead of the mixture's.",
    )
    images: ImagesSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="Conversations with images that are shown besides the texts, each a row of its own made "
        "by the source's processor; those of more tokens than a row are left out.",
    )
    num_samples: _Samples | None = Field(
        default=None,
        exclude_if=is_none,
        description=f"Rows of tokens; {DEFAULT_SAMPLES} unless the mixture says otherwise.",
    )
    sequence_length: _Length | None = Field(
        default=None,
        exclude_if=is_none,
        description=f"Tokens of a row; {DEFAULT_LENGTH}, or as many as the model has positions, unless the "
        "mixture says otherwise.",
    )
    seed: Seed | None = Field(
        default=None,
        exclude_if=is_none,
        description="Decides which stretches of the texts are taken; by default the recipe's seed.",
    )
