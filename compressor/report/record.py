"""What all parts of a report are made of: frozen strict records, counts and measures."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _from_word(value: object) -> object:
    """JSON has no infinities: they are written as words, which strict floats would refuse."""
    words = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
    return words.get(value, value) if isinstance(value, str) else value


Count = Annotated[int, Field(ge=0)]
Measure = Annotated[float, BeforeValidator(_from_word)]
_V = TypeVar("_V")
Ordered = dict[str, _V]  # read-only by convention: order is the order of tables


class Record(BaseModel):
    """Base of the report's parts: frozen, no unknown keys, no coercion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="strings")
