"""Values of scales and codes: finite, positive, of a size that a model can have. One matrix at a time.

Legend: O out_features, I in_features, R x C the grid of scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.model.families.naming import fuse_group
from compressor.progress import Progress
from compressor.verify.structure.contents import Contents
from compressor.verify.structure.findings import Findings
from compressor.verify.structure.layouts import E8M0, FLOATS, Layout
from compressor.verify.structure.modules import Module

if TYPE_CHECKING:
    import torch

# What a weight, an activation or a key can be at the most and, as the largest of its tensor, at the least.
# Experts that saw no token are calibrated to 4e31 or 1e-43 by some tools.
LARGEST = 1e8
SMALLEST = 1e-12
_AGAIN = "quantize it again"
_ONE_VALUE = ("input_scale", "input_global_scale", "output_scale", "weight_global_scale", "weight_scale_2")
# Divisors, the others are factors (compressed-tensors against ModelOpt).
_DIVISORS = ("input_global_scale", "weight_global_scale")
_NVFP4_MAX = 6.0 * 448.0


def check_scales(
    stored: Contents, modules: Sequence[Module], progress: Progress, found: Findings
) -> tuple[int, int]:
    """Adds scales and codes that no quantizer writes, and matrices that an engine fuses but that differ.

    Returns:
        How many scales and how many matrices were looked at.

    Raises:
        CheckpointError: a file became unreadable.
    """
    chosen = [module for module in modules if module.quantized and module.layout is not None]
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    scales = 0
    progress.start("check scales", len(chosen), "items")
    for module in chosen:
        layout = module.layout
        assert layout is not None, "chosen for its layout"
        scales += _check_block_scales(stored, module, layout, found)
        _check_codes(stored, module, layout, found)
        _check_zero_point(stored, module, layout, found)
        _check_weight_shape(stored, module, found)
        for local in _ONE_VALUE:
            value = _one_value(stored, module, local, layout, found)
            shared = local == layout.tensor_scale or local in layout.inputs
            if value is not None and shared and (group := fuse_group(module.name)):
                groups[f"{group} {local}"][module.name] = value
        progress.advance(1, module.name)
    progress.finish()
    _check_fused(groups, found)
    return scales, len(chosen)


def scalar_fault(values: torch.Tensor, largest_code: float, *, divisor: bool = False) -> str | None:
    """What is wrong with a tensor-level scale, or None: its largest value must be one that models have."""
    import torch

    values = values.float()
    if not torch.isfinite(values).all():
        return "not finite"
    if not (values > 0).all():
        return "not positive"
    means = largest_code / values if divisor else largest_code * values
    if means.max() > LARGEST or means.min() < SMALLEST:
        return f"stands for values up to {float(means.max()):.3g}, which no model has"
    return None


def _one_value(stored: Contents, module: Module, local: str, layout: Layout, found: Findings) -> float | None:
    """Checks a tensor-level scale; returns it where it is one number."""
    header = module.tensors.get(local)
    if header is None or header.dtype not in FLOATS or header.numel != 1:
        return None
    name = f"{module.name}.{local}"
    values = stored.read(name)
    nvfp4 = local == layout.tensor_scale or (layout.bits == 4 and local.startswith("input"))
    fault = scalar_fault(values, _NVFP4_MAX if nvfp4 else 448.0, divisor=local in _DIVISORS)
    if fault:
        found.add(f"{fault}: {_AGAIN}", name)
    return float(values.float())


def _check_block_scales(stored: Contents, module: Module, layout: Layout, found: Findings) -> int:
    """Checks ``weight_scale``; returns how many scales that are."""
    import torch

    header, name = module.tensors.get("weight_scale"), f"{module.name}.weight_scale"
    if header is None or header.dtype not in layout.scale_dtypes:
        return 0
    scale = stored.read(name)
    if layout.scale_dtypes == E8M0:
        exponents = scale.view(torch.uint8)
        if (exponents == 255).any():
            found.add(f"holds 255, the E8M0 code of NaN: {_AGAIN}", name)
        scale = torch.exp2(exponents.double() - 127)[exponents < 255]
    elif layout.rows is None and layout.columns is None:
        fault = scalar_fault(scale, layout.largest_code)
        if fault:
            found.add(f"{fault}: {_AGAIN}", name)
        return header.numel
    else:
        scale = scale.float()
        if not torch.isfinite(scale).all():
            found.add(f"holds NaN or infinity: {_AGAIN}", name)
            return header.numel
        if (scale < 0).any():
            found.add(f"holds negative scales: {_AGAIN}", name)
        if (scale == 0).any() and not _zero_blocks_are_empty(stored, module, layout, scale):
            found.add(f"scales of zero for weights that are not: {_AGAIN}", name)
    if layout.tensor_scale is None and scale.numel() and scale.max() * layout.largest_code > LARGEST:
        largest = float(scale.max()) * layout.largest_code
        found.add(f"stands for values up to {largest:.3g}, which no model has: {_AGAIN}", name)
    return header.numel


def _zero_blocks_are_empty(stored: Contents, module: Module, layout: Layout, scale: torch.Tensor) -> bool:
    """Whether every code under a scale of zero is zero; only then does the zero lose nothing."""
    import torch

    codes, logical = module.tensors.get(layout.codes), module.logical()
    if codes is None or logical is None or layout.zero_point:
        return False
    rows, columns = layout.grid(*logical)
    if codes.dtype != layout.code_dtype or codes.shape != (logical[0], layout.width(logical[1])):
        return False
    if scale.numel() != rows * columns:
        return False
    used_OI = _nonzero(stored.read(f"{module.name}.{layout.codes}"), layout, logical[1])
    height, width = layout.rows or logical[0], layout.columns or logical[1]
    padded_OI = torch.nn.functional.pad(
        used_OI, (0, columns * width - logical[1], 0, rows * height - logical[0])
    )
    used_RC = padded_OI.view(rows, height, columns, width).any(3).any(1)
    return not bool((used_RC & (scale.view(rows, columns) == 0)).any())


def _nonzero(codes: torch.Tensor, layout: Layout, in_features: int) -> torch.Tensor:
    """bool [O, I]: which codes stand for something else than zero."""
    import torch

    from compressor.numerics.fp4 import unpack_nibbles
    from compressor.numerics.packing import unpack_int32

    if layout.code_dtype == "U8":
        return (unpack_nibbles(codes) & 7) != 0
    if layout.code_dtype == "I32" and layout.bits in (4, 8):
        return unpack_int32(codes, layout.bits, in_features) != 0
    if layout.code_dtype == "F8_E4M3":
        return (codes.view(torch.uint8) & 0x7F) != 0
    if layout.code_dtype == "I8":
        return codes != 0
    return torch.ones(len(codes), in_features, dtype=torch.bool)


def _check_codes(stored: Contents, module: Module, layout: Layout, found: Findings) -> None:
    """FP8 is the only code with values that are no numbers."""
    header = module.tensors.get(layout.codes)
    if layout.code_dtype != "F8_E4M3" or header is None or header.dtype != "F8_E4M3":
        return
    name = f"{module.name}.{layout.codes}"
    if any(bool(((chunk & 0x7F) == 0x7F).any()) for chunk in stored.chunks(name)):
        found.add(f"holds NaN (the FP8 code 0x7F or 0xFF): {_AGAIN}", name)


def _check_zero_point(stored: Contents, module: Module, layout: Layout, found: Findings) -> None:
    """Zero points in a byte of their own must be codes; packed ones cannot be anything else."""
    header, name = module.tensors.get("weight_zero_point"), f"{module.name}.weight_zero_point"
    if layout.zero_point != "plain" or header is None or header.dtype != "I8":
        return
    bound = 1 << (layout.bits - 1)
    values = stored.read(name).short()
    if ((values < -bound) | (values >= bound)).any():
        found.add(f"holds zero points outside of {-bound} to {bound - 1}: {_AGAIN}", name)


def _check_weight_shape(stored: Contents, module: Module, found: Findings) -> None:
    header, name = module.tensors.get("weight_shape"), f"{module.name}.weight_shape"
    if header is None or header.dtype not in ("I32", "I64") or header.shape != (2,):
        return
    told = tuple(int(size) for size in stored.read(name))
    if module.shape is not None and told != module.shape:
        found.add(f"says {list(told)} of a matrix of {list(module.shape)}: {_AGAIN}", name)


def _check_fused(groups: dict[str, dict[str, float]], found: Findings) -> None:
    """Matrices that engines concatenate get one tensor-level scale between them."""
    for group, values in groups.items():
        if len(set(values.values())) > 1:
            local = group.rpartition(" ")[2]
            found.add(
                f"their {local} differs, but engines fuse them and keep one: quantize them together",
                *sorted(values),
            )
