"""How decoding is measured. Importing this does not import torch: for plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Domain -> a shipped text. Those of chat and code serve calibration too.
SHIPPED_DOMAINS: Mapping[str, str] = {
    "prose": "calibration/heldout.jsonl",
    "chat": "calibration/chat.jsonl",
    "code": "calibration/code.jsonl",
}
# Of a text for calibration, the last of so many documents is measured on: what trains a head leaves it out.
HELD_OUT_EVERY = 8
# What is sampled at: below, logits divided by it overflow, and vLLM 0.32 takes no less either
# (sampling_params.py, _MAX_TEMP).
TEMPERATURES = (0.01, 2.0)


def usable_temperature(value: float) -> bool:
    """Whether it is 0, which takes the likeliest token, or within ``TEMPERATURES``."""
    return value == 0 or TEMPERATURES[0] <= value <= TEMPERATURES[1]


@dataclass(frozen=True)
class DecodeSpec:
    """How decoding is measured.

    Attributes:
        domains: name -> a plain or ``.jsonl`` text, see ``decode_texts.prompts_of``.
        prompts: of each domain.
        prompt_tokens: of each prompt.
        new_tokens: that a continuation has at most.
        tokens: K, proposed at a time.
        temperature: 0 for greedy decoding.
        batches: sequences at once, measured one after another.
        runs: that are timed, plain decoding and each drafter by turns.
        seed: of the draws.
        stop: whether the model's end of text ends a continuation; else it is a token like others.
    """

    domains: Mapping[str, Path]
    prompts: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 128
    tokens: int = 3
    temperature: float = 0.0
    batches: tuple[int, ...] = (1,)
    runs: int = 3
    seed: int = 0
    stop: bool = True
