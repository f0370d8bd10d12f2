"""What the parts of a starter recipe share: a section with its reasons, and what is known of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from compressor.checkpoint.base import Source
from compressor.planner.kv_bytes import full_context
from compressor.recipe.gpus import Gpu
from compressor.stages.base import Claim

Goal = Literal["memory", "speed", "quality"]
# Sources beyond are not measured or solved with data unless asked: both compute the whole model in 16 bit.
LARGE_BYTES = 40_000_000_000


@dataclass(frozen=True)
class Section:
    """One section of the recipe.

    Attributes:
        name: its key.
        value: what it says, JSON-able; None where the recipe leaves it out.
        reasons: why, one sentence each.
        instead: the same section for whoever wants it, shown as a comment where ``value`` is None.
    """

    name: str
    value: Any
    reasons: tuple[str, ...] = ()
    instead: Any = None


@dataclass
class Found:
    """What is known of the model while sections are chosen.

    Attributes:
        source: its headers, as a run reads them.
        gpu: that the result is for.
        goal: what for.
        claims: of the weights that were chosen.
    """

    source: Source
    gpu: Gpu
    goal: Goal
    claims: list[Claim] = field(default_factory=list)

    @property
    def bytes_16bit(self) -> int:
        """Of all weights."""
        return sum(claim.bytes_16bit for claim in self.claims)

    @property
    def reach(self) -> int | None:
        """Tokens that the model reads, or None where its config does not say."""
        return full_context(self.source.config)
