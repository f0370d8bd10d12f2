"""Experts that a checkpoint stores in one 3-D tensor: the matrices in it, written one by one.

``gate_up_proj`` holds every expert's gate and up, ``down_proj`` its down; engines read quantized ones from
matrices named ``experts.{e}.gate_proj`` and so on (vLLM 0.32 fused_moe ``make_expert_params_mapping``).

Legend: E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import re

from compressor.errors import CheckpointError
from compressor.spec import LinearPart, TensorHeader

# Each expert becomes matrices of its own; a header that claims more than this is not a model's.
MAX_EXPERTS = 65_536

_EXPERTS = re.compile(r"(?P<experts>(?:.*\.)?layers\.\d+\.\w+\.experts)\.(?P<kind>gate_up|down)_proj$")


def fused_experts(header: TensorHeader, *, transposed: bool) -> tuple[LinearPart, ...] | None:
    """The matrices of a layer's experts in a 3-D tensor, or None where the tensor is no such thing.

    Args:
        header: of ``...layers.3.mlp.experts.gate_up_proj`` or ``down_proj``.
        transposed: the layout is ``[E, H, 2 * I]`` and ``[E, I, H]``, as Llama 4 has it, and not
            ``[E, 2 * I, H]`` and ``[E, H, I]``, as transformers 5.17 ``integrations/moe.py`` has it.

    Raises:
        CheckpointError: the tensor does not split into experts' matrices.
    """
    found = _EXPERTS.match(header.name)
    if found is None or len(header.shape) != 3:
        return None
    count, *matrix = header.shape
    if header.numel == 0 or count > MAX_EXPERTS:
        raise CheckpointError(f"no model has experts of the shape {list(header.shape)}", where=header.name)
    out_features, in_features = reversed(matrix) if transposed else matrix
    halves = ("gate", "up") if found["kind"] == "gate_up" else ("down",)
    rows, rest = divmod(out_features, len(halves))
    if rest:
        raise CheckpointError(
            f"its {out_features} {'columns' if transposed else 'rows'} do not split into gate and up",
            where=header.name,
            fix="the checkpoint is broken: download it again",
        )
    return tuple(
        LinearPart(
            f"{found['experts']}.{expert}.{half}_proj",
            rows,
            in_features,
            expert=expert,
            transposed=transposed,
            row_start=index * rows,
            # Gate and up share a scale (vLLM: w13).
            fuse_group=f"{found['experts']}.{expert}.gate_up_proj" if len(halves) > 1 else None,
        )
        for expert in range(count)
        for index, half in enumerate(halves)
    )
