"""MXFP4."""

from __future__ import annotations

from typing import Literal

from compressor.schemes.base import Scheme


class Mxfp4(Scheme):
    """MXFP4 weights."""

    kind: Literal["mxfp4"] = "mxfp4"
    activations: Literal["none", "dynamic"] = "none"
