"""The recipe's ``context`` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from compressor.recipe.context_search import SearchSection
from compressor.recipe.fields import Window, no_bool
from compressor.recipe.section import Section, blamed, is_none
from compressor.rope.spec import ContextSpec, Method

_MOST_FREQUENCIES = 1024
_Factor = Annotated[float, BeforeValidator(no_bool), Field(ge=1, le=4096)]


class ContextSection(Section):
    """How far the result is to read, beyond what its source was trained at."""

    method: Method = Field(
        description="How rotary frequencies are scaled: `yarn` (the best without training), `linear`, `ntk` "
        "(a raised theta), `longrope` (a factor for each frequency), `llama3`, or `dynamic`."
    )
    target_length: Window = Field(description="Tokens that the result must read.")
    original_length: Window | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tokens that the source was trained at; by default what its config.json says.",
    )
    factor: _Factor | None = Field(
        default=None,
        exclude_if=is_none,
        description="Of the scaling; by default the smallest that reaches `target_length`, since larger ones "
        "cost short prompts more.",
    )
    factors: Annotated[tuple[_Factor, ...], Field(min_length=1, max_length=_MOST_FREQUENCIES)] | None = Field(
        default=None,
        exclude_if=is_none,
        description="Of longrope: what each frequency is divided by, the highest frequency first; half as "
        "many as a head has rotated elements.",
    )
    search: SearchSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="Of longrope: how the factors are found, where they are not given.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ContextSection:
        if self.factors is not None and self.method != "longrope":
            raise blamed(("factors",), f"factors go with longrope only; {self.method} computes its own")
        if self.search is not None and self.method != "longrope":
            raise blamed(("search",), f"a search goes with longrope only; {self.method} computes its factors")
        if self.search is not None and self.factors is not None:
            raise blamed(("search",), "the factors are given: there is nothing to search")
        if self.method == "longrope" and self.factors is None and self.search is None:
            raise blamed(("method",), "longrope needs its factors beside it, or a search for them")
        if self.original_length is not None and self.original_length >= self.target_length:
            what = f"is not below the target_length of {self.target_length}: there is nothing to extend"
            raise blamed(("original_length",), what)
        return self

    def spec(self) -> ContextSpec:
        """What stages are told."""
        return ContextSpec(self.method, self.target_length, self.original_length, self.factor, self.factors)
