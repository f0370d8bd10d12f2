"""NVFP4A16."""

from __future__ import annotations

from typing import Literal

from compressor.schemes.base import Scheme


class Nvfp4A16(Scheme):
    """NVFP4 weights."""

    kind: Literal["nvfp4a16"] = "nvfp4a16"
