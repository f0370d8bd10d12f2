"""Scales from the range of each group, exactly as ``llmcompressor``'s min-max observer takes them.

Scales are computed by ``compressed_tensors``' ``calculate_qparams`` in the weight's own dtype, as
llmcompressor@0.14 observers/min_max.py does. Imported only where arithmetic is done.

Legend: O out_features, I in_features, G groups along I, B rows of groups (O, or O / 128 for blocks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compressor.numerics.groups import row_chunks, to_groups
from compressor.schemes.base import Scales

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs


def storage_dtype(weight_OI: torch.Tensor) -> torch.dtype:
    """The dtype in which formats with scales "of the model's dtype" store them: 16 bit, as the result's."""
    return torch.float16 if weight_OI.dtype == torch.float16 else torch.bfloat16


def group_ranges(weight_OI: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value [B, G] of each group of ``rows`` by ``columns``, in the weight's dtype."""
    groups_in_row = weight_OI.shape[1] // columns
    least, greatest = [], []
    for chunk in row_chunks(weight_OI.shape[0], weight_OI.shape[1], rows):
        low_N, high_N = to_groups(weight_OI[chunk], rows, columns).aminmax(dim=1)
        least.append(low_N.view(-1, groups_in_row))
        greatest.append(high_N.view(-1, groups_in_row))
    return torch.cat(least), torch.cat(greatest)


def range_scales(
    low_BG: torch.Tensor,
    high_BG: torch.Tensor,
    args: QuantizationArgs,
    *,
    dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
) -> Scales:
    """Min-max scales [B, G] in ``dtype``: finite and positive whatever the range, 0 to the largest float.

    ``global_scale``: the tensor-level scale that the group scales are stored relative to.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    scale_BG, zero_BG = calculate_qparams(low_BG, high_BG, args, global_scale=global_scale)
    info = torch.finfo(dtype)
    # The range of huge values overflows; a scale can vanish when it is narrowed to 16 bit.
    scale_BG = scale_BG.clamp(max=info.max).to(dtype).clamp(min=info.smallest_normal * info.eps)
    if args.symmetric:
        return Scales(scale_BG, global_scale=global_scale)
    # A group of zeros has the zero point 0 / 0, which is no integer.
    zero_BG = torch.where((low_BG == 0) & (high_BG == 0), 0, zero_BG)
    return Scales(scale_BG, zero_BG, global_scale)
