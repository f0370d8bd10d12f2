"""A family told by a table: which names are projections, why other tensors stay, which norms feed them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from compressor.model.families.experts import fused_experts
from compressor.model.families.naming import PREDICTION, common_role, whole
from compressor.spec import InputNorm, Role, TensorHeader


@dataclass(eq=False)
class NamedFamily:
    """An architecture whose tensors' names say all; its experts may be stored one by one or fused.

    Attributes:
        name: see ``base.Family``, as ``model_types``, ``inferred`` and ``renamed``.
        projections: matches the names of the tensors that are quantized.
        kept: (pattern of tensor names, why such a tensor stays in 16 bit); the first match tells.
        norm: the name of a tensor -> the norm that feeds it.
        by_rule_only: (pattern, why) of projections that stay in 16 bit unless the recipe's rules name them.
        fused: how experts that lie in one 3-D tensor are taken out of it: outputs in ``rows``, outputs in
            ``columns``, or not at all: they are ``kept``.
    """

    name: str
    model_types: tuple[str, ...]
    projections: re.Pattern[str]
    kept: tuple[tuple[re.Pattern[str], str], ...]
    norm: Callable[[str], InputNorm | None]
    by_rule_only: tuple[tuple[re.Pattern[str], str], ...] = ()
    fused: Literal["rows", "columns", "kept"] = "rows"
    renamed: bool = False
    inferred: str = ""

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """Projections and experts are ``linear``, what ``kept`` names and the rest ``other``.

        Those of prediction layers are ``other`` with parts, so that only a rule that names them takes them.

        Raises:
            CheckpointError: experts that do not split into matrices.
        """
        common = common_role(header, config)
        if common is not None and common.reason != PREDICTION:
            return common
        parts = None
        if self.fused != "kept":
            parts = fused_experts(header, transposed=self.fused == "columns")
        if parts is None and len(header.shape) == 2 and self.projections.search(header.name):
            parts = (whole(header, header.name.removesuffix(".weight")),)
        if common is not None:
            norm = None if parts is None else self.norm(header.name)
            return Role("other", parts or (), PREDICTION, input_norm=norm)
        if parts is not None:
            reason = _first(self.by_rule_only, header.name)
            return Role("linear", parts, reason, input_norm=self.norm(header.name))
        reason = _first(self.kept, header.name)
        return Role("other", reason=reason or "not a projection of attention, MLP or experts")


def _first(table: tuple[tuple[re.Pattern[str], str], ...], name: str) -> str:
    return next((reason for pattern, reason in table if pattern.search(name)), "")
