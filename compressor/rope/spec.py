"""What is asked of the positions, as stages are told it. Importing this does not import torch: for plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How rotary frequencies are scaled (rope/methods.py).
Method = Literal["linear", "ntk", "dynamic", "yarn", "longrope", "llama3"]


@dataclass(frozen=True)
class ContextSpec:
    """How far a model is to read, and by which scaling.

    Attributes:
        method: of the frequencies.
        target_length: tokens that the result must read.
        original_length: tokens that the model was trained at, or None for what its config says.
        factor: of the scaling, or None for the smallest that reaches ``target_length``.
        factors: of method ``longrope``, one for each frequency, or None where they are searched.
        attention_factor: of method ``longrope``, what cosine and sine are multiplied by, or None for the
            method's own.
    """

    method: Method
    target_length: int
    original_length: int | None = None
    factor: float | None = None
    factors: tuple[float, ...] | None = None
    attention_factor: float | None = None


@dataclass(frozen=True)
class ScaledConfig:
    """A config whose positions are scaled.

    Attributes:
        config: contents of config.json: all of the source's but what the scaling changes.
        length: tokens that it reads: the tokenizer's limit is at least this.
        factor: of the scaling, as written.
        notes: what a person should know, for plan and card.
    """

    config: dict[str, object]
    length: int
    factor: float
    notes: tuple[str, ...] = ()
