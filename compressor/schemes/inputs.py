"""Activations as schemes have engines round them, and the scales stored for it. Imported only for arithmetic.

Legend: N rows (tokens), I in_features, G values that share a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING

import torch

from compressor.errors import CheckpointError
from compressor.kernels.input_rounding import RoundGroups, twin_for
from compressor.numerics.grids import E2M1, E4M3, INT8, Grid
from compressor.numerics.groups import row_chunks
from compressor.numerics.input_ranges import E4M3_FOR_ZERO

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

    from compressor.numerics.input_ranges import InputRange

# No model's inputs are larger; smaller ones tell nothing.
LARGEST = 1e8
SMALLEST = 1e-12
# Of values that share a scale: what one program of the kernel for CUDA holds.
LARGEST_GROUP = 1 << 16
_GRIDS: dict[tuple[str, int], Grid] = {("float", 4): E2M1, ("float", 8): E4M3, ("int", 8): INT8}


def round_rows(
    x_NI: torch.Tensor, args: QuantizationArgs, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The inputs rounded as ``args`` describe, in their own dtype; the arithmetic is fp32, as engines'.

    On fp32 inputs bit for bit what the library's ``forward_quantize`` gives. Extra memory beside the result:
    at most one chunk of rows; on CUDA none.

    Args:
        x_NI: the inputs.
        args: symmetric ``input_activations`` of a scheme.
        tensors: local name -> tensor; ``input_scale`` or ``input_global_scale`` where ``args`` are static.
    """
    grid = _GRIDS[str(args.type), args.num_bits]
    size = args.group_size or x_NI.shape[1]
    stored = _given("input_scale", tensors, x_NI) if args.dynamic is False else None
    shared = _given("input_global_scale", tensors, x_NI) if args.strategy == "tensor_group" else None
    twin = twin_for(x_NI) if _has_twin(args, size) else None
    if twin is not None:
        return _round_at_once(twin, x_NI, size, grid, stored, shared)
    # where scales are dynamic the library adds a zero point, which makes 0 of -0; minus zero changes nothing
    zero = -0.0 if args.dynamic is False else 0.0
    rounded_NI = torch.empty_like(x_NI)
    for rows in row_chunks(*x_NI.shape):
        x_NCG = x_NI[rows].float().reshape(-1, x_NI.shape[1] // size, size)
        scale = _dynamic_scale(x_NCG, args, shared)[..., None] if stored is None else stored
        rounded_NI[rows] = (grid.round(x_NCG / scale + zero) * scale).flatten(1).to(x_NI.dtype)
    return rounded_NI


def _given(name: str, tensors: Mapping[str, torch.Tensor], x_NI: torch.Tensor) -> torch.Tensor:
    """A stored scale beside the inputs; the device need not be waited for."""
    return tensors[name].to(x_NI.device, torch.float32, non_blocking=True)


def _has_twin(args: QuantizationArgs, size: int) -> bool:
    """Whether scales are fp32, or E4M3 under a tensor-level one, and a group fits a kernel."""
    plain = args.strategy != "tensor_group" and args.scale_dtype is None
    return size <= LARGEST_GROUP and (plain or args.scale_dtype == torch.float8_e4m3fn)


def _round_at_once(
    twin: RoundGroups,
    x_NI: torch.Tensor,
    size: int,
    grid: Grid,
    stored: torch.Tensor | None,
    shared: torch.Tensor | None,
) -> torch.Tensor:
    """As ``round_rows``, without temporaries of torch's."""
    # the library divides by half of what lies between the bounds, and has these scales for groups of zeros
    half_range = (grid.high - grid.low) / 2
    if stored is not None:
        return twin(x_NI, size, grid, "stored", stored, half_range=half_range, smallest=0.0)
    if shared is not None:
        return twin(x_NI, size, grid, "e4m3", shared, half_range=half_range, smallest=E4M3_FOR_ZERO)
    smallest = torch.finfo(torch.float32).eps
    return twin(x_NI, size, grid, "own", None, half_range=half_range, smallest=smallest)


def _dynamic_scale(x_NCG: torch.Tensor, args: QuantizationArgs, shared: torch.Tensor | None) -> torch.Tensor:
    """fp32 [N, C], as the library's ``compute_dynamic_scales_and_zp``."""
    from compressed_tensors.quantization.utils import calculate_qparams

    scale_NC: torch.Tensor = calculate_qparams(*x_NCG.aminmax(dim=-1), args, global_scale=shared)[0]
    return scale_NC if shared is None else scale_NC / shared


def checked(heard: InputRange) -> InputRange:
    """The range, once it is one that a model's inputs can have; up to 1 where they were all as good as zero.

    Raises:
        CheckpointError: no row was heard, a value was not finite, or one larger than ``LARGEST``.
    """
    if heard.rows == 0:
        raise CheckpointError(
            "no token of the calibration text reached it, so the scale of its inputs is unknown",
            fix="calibrate with more text, or use a scheme that measures activations as it goes",
        )
    if not isfinite(heard.largest):
        raise CheckpointError("its inputs on the calibration text are not finite")
    if heard.largest > LARGEST:
        raise CheckpointError(f"its inputs on the calibration text reach {heard.largest:.3g}")
    return heard if heard.largest > SMALLEST else replace(heard, largest=1.0)
