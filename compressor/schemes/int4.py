"""INT4."""

from __future__ import annotations

from typing import Literal

from compressor.schemes.base import Scheme


class Int4(Scheme):
    """INT4 groups."""

    kind: Literal["int4"] = "int4"
    group_size: Literal[128, 64, 32] = 128
    symmetric: bool = True
