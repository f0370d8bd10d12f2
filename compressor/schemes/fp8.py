"""FP8."""

from __future__ import annotations

from typing import Literal

from compressor.schemes.base import Scheme


class Fp8Dynamic(Scheme):
    """FP8 per channel."""

    kind: Literal["fp8_dynamic"] = "fp8_dynamic"


class Fp8Block(Scheme):
    """FP8 block."""

    kind: Literal["fp8_block"] = "fp8_block"
