"""The recipe's ``context.search`` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from compressor.recipe.fields import Seed, Text, Window, no_bool
from compressor.recipe.section import Section, is_none
from compressor.rope.search_spec import (
    ACCEPT_DOCUMENTS,
    GENERATIONS,
    MOST_NEEDLES,
    NEEDLES,
    POPULATION,
    SEARCH_DOCUMENTS,
    SHORT_SLACK,
    Objective,
)

_Documents = Annotated[int, BeforeValidator(no_bool), Field(ge=1, le=1000)]
_WHERE = "Looked for from the current folder, beside the recipe, then among the shipped files."


class SearchSection(Section):
    """How the factors of longrope are searched: an evolution from the known methods, on long documents.

    The best is taken only where it beats YaRN on documents that the search has not seen; else YaRN is.
    """

    documents: Text = Field(
        default="calibration/long/train.jsonl.xz",
        description="Long documents: JSON lines with a field `text`, or one plain text; `.xz` is unpacked. "
        f"{_WHERE}",
    )
    held_out: Text | None = Field(
        default=None,
        exclude_if=is_none,
        description="Another such file, for the documents that decide between the factors found and YaRN; by "
        "default others of `documents`.",
    )
    objective: Objective = Field(
        default="perplexity",
        description="What candidates are compared by: `perplexity` of all tokens past the original length, "
        "or `needle`: of numbers hidden in the documents and asked for at their end.",
    )
    population: Annotated[int, BeforeValidator(no_bool), Field(ge=2, le=1024)] = Field(
        default=POPULATION,
        description="Half of it are the best so far, half are new in each generation.",
    )
    generations: Annotated[int, BeforeValidator(no_bool), Field(ge=1, le=1000)] = Field(
        default=GENERATIONS, description="After the known methods, which are tried first."
    )
    search_documents: _Documents = Field(
        default=SEARCH_DOCUMENTS, description="Documents that every candidate is scored on."
    )
    accept_documents: _Documents = Field(default=ACCEPT_DOCUMENTS, description="Others, that decide.")
    tokens: Window | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tokens of each document; by default `target_length`. The time grows with their square.",
    )
    needles: Annotated[int, BeforeValidator(no_bool), Field(ge=1, le=MOST_NEEDLES)] = Field(
        default=NEEDLES, description="Numbers hidden in a document, evenly over its depth."
    )
    short_slack: Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)] = Field(
        default=SHORT_SLACK,
        description="Nats a token by which the factors may be worse than YaRN within the original length and "
        "still count as equal.",
    )
    seed: Seed | None = Field(
        default=None,
        exclude_if=is_none,
        description="Decides documents and candidates; by default the recipe's seed.",
    )
