"""How stored values are chosen: one file for each solver, and the table of all.

Adding a solver: write its file here, add the class to ``BUILTIN_SOLVERS``. Other packages add theirs
through the entry point group ``compressor.solvers`` (value: the class).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, GetJsonSchemaHandler, SerializeAsAny
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from compressor.schemes.base import Kinds
from compressor.solvers.base import Solver
from compressor.solvers.gptq import Gptq
from compressor.solvers.learned import Learned
from compressor.solvers.llmcompressor import LlmCompressor
from compressor.solvers.rtn import Rtn
from compressor.solvers.smooth import Smooth

BUILTIN_SOLVERS: tuple[type[Solver], ...] = (Rtn, Gptq, Smooth, Learned, LlmCompressor)

# What may come first and last where names are joined by "+", and the option that holds the rest.
_OUTER = {"smooth": "then"}
_INNERMOST = {"learned": "start"}
_APART = ("llmcompressor",)


class _Solvers(Kinds[Solver]):
    """The table of solvers, which also reads names joined by "+": ``smooth+gptq+learned``."""

    def parse(self, value: str | Mapping[str, Any] | Solver) -> Solver:
        """See ``Kinds.parse``."""
        joined = value.get("kind") if isinstance(value, Mapping) else value
        if not isinstance(joined, str) or "+" not in joined:
            return super().parse(value)
        made = self._nested(joined)
        if isinstance(value, Mapping) and len(value) > 1:
            raise ValueError(
                f"options of which solver of {joined!r}? Write the one inside the other, each with its own: "
                f"{_spelled(made)}"
            )
        return super().parse(made)

    def _nested(self, joined: str) -> dict[str, Any]:
        """The mapping that names joined by "+" stand for."""
        names = [name.strip() for name in joined.split("+")]
        if "" in names:
            raise ValueError(f"the name of a solver is missing beside '+' in {joined!r}")
        for name in names:
            self._find(name)
        if not re.search(self._joined(), joined):
            raise ValueError(
                f"solvers cannot be joined as {joined!r}: one that chooses values (rtn, gptq) may have "
                "smooth before it and learned after it: smooth+gptq, gptq+learned, smooth+gptq+learned"
            )
        outer = names.pop(0) if names[0] in _OUTER else None
        last = names.pop() if names and names[-1] in _INNERMOST else None
        made: dict[str, Any] = {"kind": names[0] if names else "rtn"}
        if last is not None:
            made = {"kind": last, _INNERMOST[last]: made}
        if outer is not None:
            made = {"kind": outer, _OUTER[outer]: made}
        return made

    def _joined(self) -> str:
        """The pattern of all names joined by "+", for this parser and for JSON schemas."""
        apart = (*_OUTER, *_INNERMOST, *_APART)
        # "-" is no special character here, and JSON schemas forbid its escape.
        ones = [re.escape(name).replace(r"\-", "-") for name in self if name not in apart]
        outer, chooser, last = (f"({'|'.join(names)})" for names in (_OUTER, ones, _INNERMOST))
        plus = r"\s*\+\s*"
        after = rf"({chooser}({plus}{last})?|{last})"
        return rf"^\s*({outer}{plus}{after}|{chooser}{plus}{last})\s*$"

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """As ``Kinds`` gives it, and names joined by "+"."""
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        joined = {"type": "string", "pattern": self._joined()}
        mapping = {"type": "object", "properties": {"kind": joined}, "required": ["kind"]}
        schema["anyOf"] += [joined, mapping | {"additionalProperties": False}]
        return schema


def _spelled(made: Mapping[str, Any]) -> str:
    """A mapping of solvers as a recipe has it, with room for options."""
    shown = [f"{key}: {value if key == 'kind' else _spelled(value)}" for key, value in made.items()]
    return f"{{{', '.join((*shown, '...'))}}}"


_SOLVERS = _Solvers(
    "solver",
    group="compressor.solvers",
    base=Solver,
    builtins=BUILTIN_SOLVERS,
    refused={
        "awq": "goes by another name here: smooth+gptq",
        "smoothquant": "goes by another name here: smooth",
        "autoround": "goes by another name here: learned",
        "polish": "is none but a stage after the solver: set weights.polish to {}",
    },
)


def known_solvers() -> Mapping[str, type[Solver]]:
    """Every solver's name -> its class, built-in ones first; other packages' are loaded when looked up."""
    return _SOLVERS


def parse_solver(value: str | Mapping[str, Any] | Solver) -> Solver:
    """The solver that a recipe spells as a name, as a mapping (``{kind: rtn, search: minmax}``), or as names
    joined by "+": ``gptq+learned`` is ``{kind: learned, start: gptq}``.

    Raises:
        ValueError: unknown name or bad options (pydantic's ValidationError is one).
        UserError: another package's solver is broken.
    """
    return _SOLVERS.parse(value)


SolverField = Annotated[SerializeAsAny[Solver], BeforeValidator(parse_solver), _SOLVERS]
"""A pydantic field that takes any solver, by name or mapping."""
