"""The recipe's ``weights.polish`` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from compressor.recipe.fields import Count, Seed, no_bool
from compressor.recipe.section import Section, is_none


class PolishSection(Section):
    """After all layers are solved: moves scales, norms and biases towards the source's predictions.

    The codes stay. Needs the source and the result in memory at once; a GPU for all but the smallest models.
    """

    steps: Annotated[Count, Field(le=100_000)] = Field(default=300, description="Steps of the optimizer.")
    learning_rate: Annotated[float, BeforeValidator(no_bool), Field(gt=0, le=0.1)] = Field(
        default=0.003,
        description="By about how much of itself a step moves a value at first; falls to zero in a cosine.",
    )
    tokens: Count = Field(
        default=8192, description="Calibration tokens of one step; one sequence at least, in whole ones."
    )
    seed: Seed | None = Field(
        default=None,
        exclude_if=is_none,
        description="Decides the order of the sequences; by default the recipe's seed.",
    )
