"""Families: which checkpoint tensors of an architecture are matrices to quantize, and what the rest is.

To add one, write a module with a class that satisfies ``base.Family`` and append an instance to ``BUILTINS``;
other packages name an instance under the entry-point group ``compressor.families``.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from compressor.errors import UserError
from compressor.model.families.base import Family
from compressor.model.families.deepseek import DEEPSEEK
from compressor.model.families.deepseek_v4 import DeepseekV4Family
from compressor.model.families.ends import embedding_problem, tied
from compressor.model.families.generic import GenericFamily
from compressor.model.families.gpt_oss import GPT_OSS
from compressor.model.families.jamba import JAMBA
from compressor.model.families.llama import LlamaFamily
from compressor.model.families.llama4 import LLAMA4
from compressor.model.families.mixtures import GLM4_MOE, MIXTRAL, QWEN_MOE
from compressor.model.families.naming import (
    block_index,
    is_lookup,
    is_prediction,
    is_tower,
    is_wrapper,
    member_rows,
    text_config,
)
from compressor.model.families.qwen3_next import QWEN3_NEXT
from compressor.model.families.qwen_vl import QwenVlFamily

__all__ = [
    "BUILTINS",
    "block_index",
    "embedding_problem",
    "families",
    "family_for",
    "is_lookup",
    "is_prediction",
    "is_tower",
    "is_wrapper",
    "member_rows",
    "renames_modules",
    "text_config",
    "tied",
]

ENTRY_POINT_GROUP = "compressor.families"
_NEEDED = ("name", "model_types", "inferred", "renamed", "role")

BUILTINS: tuple[Family, ...] = (
    LlamaFamily(),
    LLAMA4,
    MIXTRAL,
    QWEN_MOE,
    QWEN3_NEXT,
    GLM4_MOE,
    DEEPSEEK,
    JAMBA,
    QwenVlFamily(),
    GPT_OSS,
    DeepseekV4Family(),
)


@cache
def families() -> tuple[Family, ...]:
    """Installed families first, so that a package may refine a builtin one, then ``BUILTINS``.

    Raises:
        UserError: an installed family cannot be imported or is not a family.
    """
    installed: list[Family] = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            family = point.load()
        except Exception as error:
            raise UserError(
                f"the family {point.name!r} cannot be loaded: {error}",
                where=f"entry point {ENTRY_POINT_GROUP}:{point.name}",
                fix="mend or uninstall the package that provides it",
            ) from error
        if not all(hasattr(family, name) for name in _NEEDED):
            raise UserError(
                f"the family {point.name!r} is a {type(family).__name__}, not an instance of a family",
                where=f"entry point {ENTRY_POINT_GROUP}:{point.name}",
                fix=f"point it at an object with {', '.join(_NEEDED[:-1])} and {_NEEDED[-1]}",
            )
        installed.append(family)
    return (*installed, *BUILTINS)


def family_for(config: dict[str, Any]) -> Family:
    """The family that claims the ``model_type`` of a config.json, or the generic fallback.

    The outer ``model_type`` is asked first, then that of the nested ``text_config``.

    Raises:
        UserError: an installed family cannot be loaded.
    """
    model_types = [str(found) for c in (config, text_config(config)) if (found := c.get("model_type"))]
    for model_type in model_types:
        for family in families():
            if model_type in family.model_types:
                return family
    return GenericFamily(model_types[0] if model_types else "")


def renames_modules(config: dict[str, Any]) -> bool:
    """Whether vLLM 0.32 calls linear layers otherwise than checkpoints do (``hf_to_vllm_mapper``).

    Raises:
        UserError: an installed family cannot be loaded.
    """
    return is_wrapper(config) or family_for(config).renamed
