"""Scales of NVFP4 matrices. Imported only where arithmetic is done.

Legend: O out_features, I in_features, C = I / 16 blocks in a row, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp
from typing import TYPE_CHECKING

import torch

from compressor.kernels import search_nvfp4
from compressor.numerics.fp4 import E2M1_MAX
from compressor.numerics.fp8 import e4m3_ladder
from compressor.numerics.groups import importance_groups, row_chunks, to_groups
from compressor.schemes.base import Scales
from compressor.schemes.ranges import group_ranges, range_scales

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

BLOCK = 16
# The largest block's min-max scale is at most this in E4M3: room up to 448 for larger ones in the search.
LARGEST_SCALE = 256.0


def fit_minmax(weights_OI: Sequence[torch.Tensor], args: QuantizationArgs) -> list[Scales]:
    """Tensor-level and block scales exactly as ``llmcompressor``'s min-max observer takes them."""
    from compressed_tensors.quantization.utils import generate_gparam

    ranges = [group_ranges(weight_OI, 1, BLOCK) for weight_OI in weights_OI]
    largest = torch.stack([torch.maximum(-low.min(), high.max()) for low, high in ranges]).max().reshape(1)
    shared = generate_gparam(-largest, largest)
    return [range_scales(low, high, args, dtype=torch.float32, global_scale=shared) for low, high in ranges]


def fit_full(weights_OI: Sequence[torch.Tensor], importance_I: torch.Tensor | None) -> list[Scales]:
    """The best E4M3 scale of every block, for a tensor-level scale that is a power of two.

    A power of two instead of the usual 448 * 6 / max costs nothing that matters (relative squared error on
    the 210 matrices of SmolLM2-135M-Instruct, dequantized from Q4_1: 6.2461e-3 against 6.2457e-3, and
    6.2444e-3 for 256 * 6 / max), and makes every decoded weight exact in fp32 and in bf16: all engines
    compute with the same numbers.
    """
    ends = [float(end) for weight_OI in weights_OI for end in weight_OI.aminmax()]
    shared = tensor_scale(max(abs(end) for end in ends))
    return [_search(weight_OI, shared, importance_I) for weight_OI in weights_OI]


def tensor_scale(largest: float) -> float:
    """The greatest power of two G with ``largest * G <= 6 * 256``, kept where 1 / G is a normal fp32."""
    if largest == 0.0:
        return 1.0
    mantissa, exponent = frexp(E2M1_MAX * LARGEST_SCALE / largest)
    assert mantissa < 1.0
    return 2.0 ** max(min(exponent - 1, 126), -126)


def _search(weight_OI: torch.Tensor, shared: float, importance_I: torch.Tensor | None) -> Scales:
    out_features, in_features = weight_OI.shape
    if importance_I is None:
        importance_I = torch.ones(in_features, device=weight_OI.device)
    h_C16 = importance_groups(importance_I.float() / importance_I.max(), 1, BLOCK)
    ladder = e4m3_ladder(weight_OI.device)
    scale_OC = torch.empty(out_features, in_features // BLOCK, device=weight_OI.device)
    for rows in row_chunks(out_features, in_features):
        u_N16 = to_groups(weight_OI[rows].float() * shared, 1, BLOCK)
        codes_N = search_nvfp4(u_N16, h_C16)
        scale_OC[rows] = ladder[codes_N.to(torch.int32)].view(-1, in_features // BLOCK)
    return Scales(scale_OC, global_scale=torch.tensor([shared], device=weight_OI.device))
