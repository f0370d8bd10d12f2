"""How a weight is stored: one file for each scheme, and the table of all.

Adding a scheme: write its file here, add the class to ``BUILTIN_SCHEMES``. Other packages add theirs
through the entry point group ``compressor.schemes`` (value: the class).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from compressor.schemes.base import Kinds, Scheme
from compressor.schemes.fp8 import Fp8Block, Fp8Dynamic, Fp8Static
from compressor.schemes.int4 import Int4
from compressor.schemes.int8 import Int8
from compressor.schemes.mxfp4 import Mxfp4
from compressor.schemes.nvfp4 import Nvfp4, Nvfp4A16

BUILTIN_SCHEMES: tuple[type[Scheme], ...] = (
    Nvfp4A16,
    Nvfp4,
    Mxfp4,
    Fp8Dynamic,
    Fp8Block,
    Fp8Static,
    Int4,
    Int8,
)

_SCHEMES: Kinds[Scheme] = Kinds(
    "scheme",
    group="compressor.schemes",
    base=Scheme,
    builtins=BUILTIN_SCHEMES,
    refused={
        "nvfp4a4": "is spelt nvfp4",
        "w4a4": "is spelt nvfp4",
        "fp8": "is spelt fp8_dynamic, or fp8_static with scales of activations that calibration measures",
        "int8_static": "is not written here; use {kind: int8, activations: dynamic}",
        "mxfp4a16": "is spelt mxfp4",
        "w4a16": "is spelt int4",
        "w4a16_asym": "is spelt {kind: int4, symmetric: false}",
        "w8a16": "is spelt int8",
        "w8a8": "is spelt {kind: int8, activations: dynamic}",
    },
)


def known_schemes() -> Mapping[str, type[Scheme]]:
    """Every scheme's name -> its class, built-in ones first; other packages' are loaded when looked up."""
    return _SCHEMES


def parse_scheme(value: str | Mapping[str, Any] | Scheme) -> Scheme:
    """The scheme that a recipe spells as a name or as a mapping (``{kind: int4, group_size: 64}``).

    Raises:
        ValueError: unknown name or bad options (pydantic's ValidationError is one).
        UserError: another package's scheme is broken.
    """
    return _SCHEMES.parse(value)


SchemeField = Annotated[SerializeAsAny[Scheme], BeforeValidator(parse_scheme), _SCHEMES]
"""A pydantic field that takes any scheme, by name or mapping."""
