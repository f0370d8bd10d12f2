"""The types of single recipe values: names, counts, sizes, patterns; each refuses with a sentence."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    StringConstraints,
    TypeAdapter,
    WithJsonSchema,
)
from pydantic_core import CoreSchema

from compressor.recipe.patterns import compile_pattern
from compressor.schemes import SchemeField, parse_scheme
from compressor.schemes.base import Scheme
from compressor.solvers import SolverField, parse_solver
from compressor.solvers.base import Solver

_BYTE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MAX_BYTES = 2**63 - 1
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_FACTORY = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
_METRIC = f"(perplexity|kl|needle|acceptance|task(:{_NAME})?)"


def no_bool(value: object) -> object:
    """The value, unless it is true or false, which pydantic would read as one or zero."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def _bytes(value: object) -> object:
    """Bytes of ``"2GB"``, ``"512 MiB"``; numbers pass through."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([KMG]i?B|)", value.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{value!r} is no size: write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(Decimal(match[1]) * _BYTE_UNITS[match[2]])


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _metric(value: str) -> str:
    if re.fullmatch(_METRIC, value) is None:
        raise ValueError(
            f"unknown metric {value!r} (known: perplexity, kl, task, task:NAME, needle, acceptance)"
        )
    return value


def _pattern(value: str) -> str:
    compile_pattern(value)
    return value


def _scheme_or_copy(value: Any) -> Scheme | Literal["copy"]:
    return "copy" if value == "copy" else parse_scheme(value)


def _scheme_or_auto(value: Any) -> Scheme | Literal["auto"]:
    return "auto" if value == "auto" else parse_scheme(value)


def _solver_or_none(value: Any) -> Solver | None:
    return None if value is None else parse_solver(value)


class _Or:
    """The JSON Schema of a constant or a plug-in field; made late: it scans other packages."""

    def __init__(self, constant: str | None, field: Any) -> None:
        self._constant = constant
        self._field = field

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"const": self._constant}, TypeAdapter(self._field).json_schema()]}


Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_SLUG = rf"^{_NAME}$"
_REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$"
_SHA256 = r"^[0-9a-fA-F]{64}$"
# What to say where one does not match.
PATTERN_WORDS = {
    _SLUG: "must be up to 100 letters, digits, '.', '_' and '-', the first a letter or digit",
    _REVISION: "must be a branch, tag or commit: letters, digits, '.', '_', '/' and '-'",
    _SHA256: "must be 64 hexadecimal digits",
}
Slug = Annotated[str, StringConstraints(pattern=_SLUG)]
Metric = Annotated[
    str, AfterValidator(_metric), WithJsonSchema({"type": "string", "pattern": rf"^{_METRIC}$"})
]
Revision = Annotated[str, StringConstraints(pattern=_REVISION)]
Factory = Annotated[str, StringConstraints(pattern=_FACTORY, max_length=400)]
Sha256 = Annotated[str, StringConstraints(pattern=_SHA256, to_lower=True)]
Count = Annotated[int, BeforeValidator(no_bool), Field(ge=1, le=10**12)]
Window = Annotated[int, BeforeValidator(no_bool), Field(ge=2, le=2**24)]
Seed = Annotated[int, BeforeValidator(no_bool), Field(ge=0, lt=2**32)]
Bytes = Annotated[
    int,
    BeforeValidator(no_bool),
    BeforeValidator(_bytes, json_schema_input_type=int | str),
    Field(ge=1, le=_MAX_BYTES),
]
Pattern = Annotated[str, AfterValidator(_pattern)]
Patterns = Annotated[
    tuple[Pattern, ...],
    BeforeValidator(_one_or_many, json_schema_input_type=Pattern | list[Pattern]),
    Field(min_length=1),
]
SchemeOrCopy = Annotated[
    SerializeAsAny[Scheme] | Literal["copy"], BeforeValidator(_scheme_or_copy), _Or("copy", SchemeField)
]
SchemeOrAuto = Annotated[
    SerializeAsAny[Scheme] | Literal["auto"], BeforeValidator(_scheme_or_auto), _Or("auto", SchemeField)
]
SolverOrNone = Annotated[
    SerializeAsAny[Solver] | None, BeforeValidator(_solver_or_none), _Or(None, SolverField)
]
