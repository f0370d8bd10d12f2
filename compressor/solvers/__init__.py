"""How stored values are chosen: one file for each solver, and the table of all.

Adding a solver: write its file here, add the class to ``BUILTIN_SOLVERS``. Other packages add theirs
through the entry point group ``compressor.solvers`` (value: the class).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from compressor.schemes.base import Kinds
from compressor.solvers.base import Solver
from compressor.solvers.gptq import Gptq
from compressor.solvers.llmcompressor import LlmCompressor
from compressor.solvers.rtn import Rtn

BUILTIN_SOLVERS: tuple[type[Solver], ...] = (Rtn, Gptq, LlmCompressor)

_CALIBRATED = "needs calibration, not available in this version; use rtn or gptq"

_SOLVERS: Kinds[Solver] = Kinds(
    "solver",
    group="compressor.solvers",
    base=Solver,
    builtins=BUILTIN_SOLVERS,
    refused=dict.fromkeys(("awq", "autoround", "smoothquant"), _CALIBRATED),
)


def known_solvers() -> Mapping[str, type[Solver]]:
    """Every solver's name -> its class, built-in ones first; other packages' are loaded when looked up."""
    return _SOLVERS


def parse_solver(value: str | Mapping[str, Any] | Solver) -> Solver:
    """The solver that a recipe spells as a name or as a mapping (``{kind: rtn, search: minmax}``).

    Raises:
        ValueError: unknown name or bad options (pydantic's ValidationError is one).
        UserError: another package's solver is broken.
    """
    return _SOLVERS.parse(value)


SolverField = Annotated[SerializeAsAny[Solver], BeforeValidator(parse_solver), _SOLVERS]
"""A pydantic field that takes any solver, by name or mapping."""
