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
from compressor.numerics.grids import E2M1, E4M3, INT8, Grid
from compressor.numerics.groups import row_chunks

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

    from compressor.numerics.input_ranges import InputRange

# No model's inputs are larger; smaller ones tell nothing.
LARGEST = 1e8
SMALLEST = 1e-12
_GRIDS: dict[tuple[str, int], Grid] = {("float", 4): E2M1, ("float", 8): E4M3, ("int", 8): INT8}


def round_rows(
    x_NI: torch.Tensor, args: QuantizationArgs, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The inputs rounded as ``args`` describe, in their own dtype; the arithmetic is fp32, as engines'.

    On fp32 inputs bit for bit what the library's ``forward_quantize`` gives. Extra memory beside the result:
    one chunk of rows.

    Args:
        x_NI: the inputs.
        args: symmetric ``input_activations`` of a scheme.
        tensors: local name -> tensor; ``input_scale`` or ``input_global_scale`` where ``args`` are static.
    """
    grid = _GRIDS[str(args.type), args.num_bits]
    size = args.group_size or x_NI.shape[1]
    stored = tensors["input_scale"].to(x_NI.device).float() if args.dynamic is False else None
    shared = None
    if args.strategy == "tensor_group":
        shared = tensors["input_global_scale"].to(x_NI.device).float()
    # where scales are dynamic the library adds a zero point, which makes 0 of -0; minus zero changes nothing
    zero = -0.0 if args.dynamic is False else 0.0
    rounded_NI = torch.empty_like(x_NI)
    for rows in row_chunks(*x_NI.shape):
        x_NCG = x_NI[rows].float().reshape(-1, x_NI.shape[1] // size, size)
        scale = _dynamic_scale(x_NCG, args, shared)[..., None] if stored is None else stored
        rounded_NI[rows] = (grid.round(x_NCG / scale + zero) * scale).flatten(1).to(x_NI.dtype)
    return rounded_NI


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
