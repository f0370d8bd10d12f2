"""Round to nearest."""

from __future__ import annotations

from typing import Literal

from compressor.schemes.base import Search
from compressor.solvers.base import Solver


class Rtn(Solver):
    """Round to nearest with the scales found by ``search``."""

    kind: Literal["rtn"] = "rtn"
    search: Search = "full"
