"""What llm-compressor left of a matrix: whether its layout is its scheme's, and its scales are sane.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressor.checkpoint.safetensors_file import safetensors_dtype, torch_dtype
from compressor.errors import CheckpointError
from compressor.solvers.measure import squares
from compressor.spec import LinearPart, TensorHeader
from compressor.stages.base import Claim
from compressor.stages.receipts import PartError

STAYS = "leave it in 16 bit with ignore, or use one of this tool's solvers"
# What a weight or an input can be at the most and, as the largest of its tensor, at the least.
_LARGEST = 1e8
_SMALLEST = 1e-12
# Divisors; the other scales are factors. What they divide into is at most the largest code, 6 x 448.
_DIVISORS = ("weight_global_scale", "input_global_scale")
_NVFP4_MAX = 6.0 * 448.0


def fitted(
    made: Mapping[str, torch.Tensor], headers: Mapping[str, TensorHeader], module: str
) -> dict[str, torch.Tensor]:
    """The tensors, once they are those of the scheme; scales may be held in another dtype, never rounded."""
    if made.keys() != headers.keys():
        raise CheckpointError(
            f"llm-compressor left {', '.join(sorted(made))}, the scheme stores {', '.join(sorted(headers))}",
            where=module,
        )
    fitted = {}
    for local, header in headers.items():
        tensor = made[local]
        cast = tensor.to(torch_dtype(header.dtype))
        kept = cast.dtype == tensor.dtype or torch.equal(cast.double(), tensor.double())
        if tuple(tensor.shape) != header.shape or not kept:
            raise CheckpointError(
                f"llm-compressor left {local} as {safetensors_dtype(tensor.dtype)} {list(tensor.shape)}, the "
                f"scheme stores {header.dtype} {list(header.shape)}",
                where=module,
            )
        fitted[local] = cast.contiguous()
    return fitted


def checked(
    claim: Claim,
    part: LinearPart,
    tensors: Mapping[str, torch.Tensor],
    weight_OI: torch.Tensor,
    tokens: int,
) -> PartError:
    """The errors of a stored matrix, once its scales are such as a model can have.

    Args:
        claim: on the tensor.
        part: of it, the matrix.
        tensors: local name -> stored tensor.
        weight_OI: what was rounded.
        tokens: how many calibration tokens reached it.
    """
    scheme = claim.scheme
    assert scheme is not None
    args = scheme.ct_scheme([]).weights
    for local, tensor in tensors.items():
        if local.endswith("scale"):
            # AutoRound gives groups of integers a negative scale where that spares the largest weight.
            signed = local == "weight_scale" and args is not None and args.type == "int"
            _check_scale(local, tensor.abs() if signed else tensor, part.module)
    decoded_OI = scheme.decode(dict(tensors), part.out_features, part.in_features)
    error, norm = squares(weight_OI, decoded_OI)
    if not error <= norm:
        raise CheckpointError(
            f"what llm-compressor stored of it is no nearer to the weights than zeros (relative error "
            f"{error / norm if norm else error:.3g})",
            where=part.module,
            fix=STAYS,
        )
    size = part.out_features * part.in_features
    return PartError(part.module, scheme.label, error, norm, size, solver="llmcompressor", tokens=tokens)


def _check_scale(local: str, scale: torch.Tensor, module: str) -> None:
    """Experts that no token reached are left with uninitialized memory (4e31 and 1e-43 have been seen)."""
    if scale.dtype == torch.uint8:  # E8M0: an exponent, 255 is NaN
        sane = bool((scale != 255).all())
    else:
        values = scale.double()
        sane = bool(values.isfinite().all()) and bool((values >= 0.0).all())
        if sane and scale.numel() == 1:
            largest = float(_NVFP4_MAX / values if local in _DIVISORS else values)
            sane = _SMALLEST < largest < _LARGEST
        elif sane:
            sane = float(values.max()) < _LARGEST
    if not sane:
        raise CheckpointError(
            f"llm-compressor left {local} with values that no model has: perhaps no token of the calibration "
            "text reached it",
            where=module,
            fix="calibrate with more text, or use one of this tool's solvers",
        )
