"""INT8."""

from __future__ import annotations

from typing import Literal

from compressor.schemes.base import Scheme


class Int8(Scheme):
    """INT8."""

    kind: Literal["int8"] = "int8"
    activations: Literal["none", "dynamic"] = "none"
    group_size: Literal[128, 64, 32] | None = None
