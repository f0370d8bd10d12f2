"""Llama 4, text-only and with vision: experts are stored as 3-D tensors and written one by one.

Layout: transformers 5.17 ``modeling_llama4.py`` Llama4TextExperts, ``x @ gate_up_proj`` with the gate in the
first half of the columns. Output names: vLLM 0.32 ``llama4.py`` load_moe_expert_weights, not fused
(``experts.{e}.gate_proj``), which is also what llm-compressor writes.

Legend: E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import re
from typing import Any

from compressor.errors import CheckpointError
from compressor.model.families.naming import common_role, input_norm, whole
from compressor.spec import InputNorm, LinearPart, Role, TensorHeader

_LINEAR = re.compile(
    r"(?:^|\.)layers\.\d+\."
    r"(?:self_attn\.[qkvo]_proj|feed_forward\.(?:shared_expert\.|experts\.\d+\.)?(?:gate|up|down)_proj)\.weight$"
)
_EXPERTS = re.compile(
    r"(?P<experts>(?:^|.*\.)layers\.\d+\.feed_forward\.experts)\.(?P<kind>gate_up|down)_proj$"
)


# Each expert becomes matrices of its own; a header that claims more than this is not a model's.
MAX_EXPERTS = 65_536


class Llama4Family:
    """Llama 4 Scout, Maverick and their text-only forms."""

    name = "llama4"
    model_types: tuple[str, ...] = ("llama4", "llama4_text")
    inferred = ""

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """Projections and experts are ``linear``; routers, norms, vision tower and projector ``other``.

        Raises:
            CheckpointError: experts that do not split into matrices.
        """
        common = common_role(header, config)
        if common is not None:
            return common
        experts = _EXPERTS.match(header.name)
        if experts and len(header.shape) == 3:
            split = _gate_up if experts["kind"] == "gate_up" else _down
            return Role("linear", split(header, experts["experts"]), input_norm=_input_norm(header.name))
        if _LINEAR.search(header.name) and len(header.shape) == 2:
            part = whole(header, header.name.removesuffix(".weight"))
            return Role("linear", (part,), input_norm=_input_norm(header.name))
        if header.name.endswith(".router.weight"):
            return Role("other", reason="router")
        return Role("other", reason="not a projection of attention, MLP or experts")


def _input_norm(name: str) -> InputNorm | None:
    return input_norm(name, "input_layernorm", "post_attention_layernorm", 0.0)


def _expert_shape(header: TensorHeader) -> tuple[int, int, int]:
    """The shape ``[E, in, out]``, once every expert is known to hold weights and there are not too many."""
    count, rows, columns = header.shape
    if header.numel == 0 or count > MAX_EXPERTS:
        raise CheckpointError(f"no model has experts of the shape {list(header.shape)}", where=header.name)
    return count, rows, columns


def _gate_up(header: TensorHeader, experts: str) -> tuple[LinearPart, ...]:
    """Gate and up ``[I, H]`` of every expert in ``[E, H, 2 * I]``; the two share a scale (vLLM: w13)."""
    count, hidden, columns = _expert_shape(header)
    if columns % 2:
        raise CheckpointError(
            f"its {columns} columns do not split into gate and up",
            where=header.name,
            fix="the checkpoint is broken: download it again",
        )
    rows = columns // 2
    return tuple(
        LinearPart(
            f"{experts}.{expert}.{half}_proj",
            rows,
            hidden,
            expert=expert,
            transposed=True,
            row_start=start,
            fuse_group=f"{experts}.{expert}.gate_up_proj",
        )
        for expert in range(count)
        for half, start in (("gate", 0), ("up", rows))
    )


def _down(header: TensorHeader, experts: str) -> tuple[LinearPart, ...]:
    """Down ``[H, I]`` of every expert in ``[E, I, H]``."""
    count, intermediate, hidden = _expert_shape(header)
    return tuple(
        LinearPart(f"{experts}.{expert}.down_proj", hidden, intermediate, expert=expert, transposed=True)
        for expert in range(count)
    )
