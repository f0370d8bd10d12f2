"""What was measured of a KV-cache format, as plain records; ``to_json`` gives the shape that scripts read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressor.evals.base import TextResult


@dataclass(frozen=True)
class GenerationResult:
    """Greedy continuations with the format's cache against those with a 16-bit one.

    Attributes:
        prompts: how many texts were continued.
        new_tokens: by how many tokens each.
        until_divergence: mean number of tokens before the first that differs; ``new_tokens`` where none does.
        agreeing: fraction of all generated tokens that are the same at the same place.
        identical: fraction of prompts whose continuations are the same to the end.
    """

    prompts: int
    new_tokens: int
    until_divergence: float
    agreeing: float
    identical: float

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class NeedleCell:
    """Needles at one depth of texts of one length.

    Attributes:
        tokens: length of the texts, needle, question and answer included.
        depth: 0 at the beginning, 1 right before the question.
        trials: how many texts.
        found_16bit: texts whose answer the model ranks first, token by token, with a 16-bit cache.
        found: the same with the format's cache.
        logprob_16bit: mean log-probability of an answer with a 16-bit cache, nats.
        logprob: the same with the format's cache.
    """

    tokens: int
    depth: float
    trials: int
    found_16bit: int
    found: int
    logprob_16bit: float
    logprob: float


@dataclass(frozen=True)
class NeedleResult:
    """A number hidden in other text and asked for: by length and depth, in that order."""

    cells: tuple[NeedleCell, ...]

    @property
    def relative_score(self) -> float | None:
        """Answers found with the format's cache over those found with 16 bit; None where these are none."""
        found_16bit = sum(cell.found_16bit for cell in self.cells)
        return sum(cell.found for cell in self.cells) / found_16bit if found_16bit else None

    @property
    def logprob_change(self) -> float:
        """Mean change of an answer's log-probability against 16 bit, nats; negative where it is worse."""
        trials = sum(cell.trials for cell in self.cells)
        return sum(cell.trials * (cell.logprob - cell.logprob_16bit) for cell in self.cells) / trials

    def at(self, tokens: int) -> NeedleResult:
        """The same for texts of one length."""
        return NeedleResult(tuple(cell for cell in self.cells if cell.tokens == tokens))

    def to_json(self) -> dict[str, Any]:
        """``relative_score``, ``logprob_change`` and the cells."""
        return {
            "relative_score": self.relative_score,
            "logprob_change": self.logprob_change,
            "cells": [dict(vars(cell)) for cell in self.cells],
        }


@dataclass(frozen=True)
class KvResult:
    """One KV-cache format against the same model with a 16-bit cache.

    Attributes:
        format: its name.
        mode: ``strict``: every key and value is read as stored; ``vllm``: as vLLM 0.32 reads them, which for
            its TurboQuant leaves a prompt's first chunk raw.
        text: perplexity, KL and agreement; ``source`` is the 16-bit cache.
        generation: greedy continuations, or None where not measured.
        needle: retrieval, or None where not measured.
        stored_tokens: length of the sequence whose cache was weighed.
        stored_bytes: all that it holds for that sequence: slots, 16-bit tokens and layers, recurrent states.
        stored_bytes_16bit: the same in 16 bit throughout.
        peak_bytes: buffers of that sequence with their free room, and the decoded keys and values of the
            layer that was read last: the most that a step needed of cache memory.
    """

    format: str
    mode: str
    text: TextResult
    generation: GenerationResult | None
    needle: NeedleResult | None
    stored_tokens: int
    stored_bytes: int
    stored_bytes_16bit: int
    peak_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes over the tokens that they hold."""
        return self.stored_bytes / self.stored_tokens

    @property
    def bits(self) -> float:
        """16 x stored bytes over those of 16 bit: over all layers, those left in 16 bit too."""
        return 16 * self.stored_bytes / self.stored_bytes_16bit

    def to_json(self) -> dict[str, Any]:
        """JSON-able: ``format``, ``mode``, ``bits``, bytes, and the text's figures beside them."""
        return {
            "format": self.format,
            "mode": self.mode,
            "bits": self.bits,
            "bytes_per_token": self.bytes_per_token,
            "stored_tokens": self.stored_tokens,
            "stored_bytes": self.stored_bytes,
            "stored_bytes_16bit": self.stored_bytes_16bit,
            "peak_bytes": self.peak_bytes,
            **self.text.to_json(),
            "generation": self.generation.to_json() if self.generation else None,
            "needle": self.needle.to_json() if self.needle else None,
        }
