"""The base of all recipe sections, and how they blame one key for a fault of several."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Base of all recipe sections: frozen, and unknown keys are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def blamed(below: tuple[str | int, ...], message: str) -> PydanticCustomError:
    """A fault of several keys together, blamed on the one at ``below`` (read by compressor.recipe.check)."""
    return PydanticCustomError("recipe_fault", "{message}", {"message": message, "below": below})


def is_none(value: object) -> bool:
    """For ``exclude_if``: a key that was left out is not written either."""
    return value is None
