"""What smoothing a block adds to the memory of a walk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from compressor.planner.sizes import DTYPE_BYTES, is_routed
from compressor.solvers.smooth import MOST_EXPERTS, ROWS
from compressor.spec import LinearPart
from compressor.stages.base import Claim
from compressor.stages.walk import WalkSpec

# fp32 matrices of a group that shares a scale: as they are, scaled, decoded, and what fitting scales takes.
_MATRICES = 6
# Sampled rows of one input: one after the other in one tensor, divided by scales, rounded.
_ROWS = 3


def smoothed_bytes(block: Sequence[Claim], spec: WalkSpec, tokens: int) -> tuple[int, int]:
    """(bytes while scales of a block are chosen, bytes held until its matrices are solved)."""
    parts = [
        (claim, part)
        for claim in block
        if claim.solver is not None and claim.solver.smoothing is not None
        for part in claim.role.parts
    ]
    if not parts:
        return 0, 0
    rows = max(ROWS, -(-tokens // spec.batch_tokens))
    readers: dict[str, list[LinearPart]] = defaultdict(list)
    together: dict[str, int] = defaultdict(int)
    for claim, part in parts:
        readers["experts" if is_routed(part.module) else part.fuse_group or part.module].append(part)
        shares = claim.scheme is not None and claim.scheme.shares_tensor_scale
        group = (part.fuse_group if shares else None) or part.module
        together[group] += part.out_features * part.in_features
    widths = [max(part.in_features for part in found) for found in readers.values()]
    # Two matrices of an expert read its input.
    outputs = max(
        sum(sorted((part.out_features for part in found), reverse=True)[: 2 * MOST_EXPERTS])
        for found in readers.values()
    )
    sampled = rows * (sum(widths) + _ROWS * max(widths) + outputs)
    held = sum(part.out_features * part.in_features for _, part in parts) if spec.dtype == "bfloat16" else 0
    return 4 * (sampled + _MATRICES * max(together.values())), DTYPE_BYTES[spec.dtype] * held
