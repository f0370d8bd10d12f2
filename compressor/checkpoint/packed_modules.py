"""Modules stored by compressed-tensors or ModelOpt, decoded by compressed-tensors itself (``model.decode``).

Legend: O out_features, I in_features, G groups along I.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.packed import SCALE_DTYPES, SIXTEEN_BIT, Layout, Packed, expect, kv_scales
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from compressor.model.decode import QuantizedWeights

_CODES = ("weight_packed", "weight")
_OF_PACKED = (".weight_packed", ".weight_shape", ".weight_zero_point")
_ONE_VALUE = ("weight_global_scale", "weight_scale_2")
# What activations are rounded with: no part of the weight.
_INPUTS = ("input_scale", "input_global_scale", "input_zero_point", "output_scale", "output_zero_point")
_WORD_BITS = 32
_MOST_BITS = 8
# Rows or columns that the library may pad a smaller matrix to, to fill its blocks.
_PADDED = 256


def module_layout(
    headers: Mapping[str, TensorHeader],
    description: Mapping[str, Any],
    method: str,
    read: Callable[[str], torch.Tensor],
    where: str,
) -> Layout:
    """What a checkpoint in either dialect consists of.

    Args:
        headers: every stored tensor.
        description: its ``quantization_config``.
        method: the ``quant_method`` of that.
        read: gives a tensor as it lies.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: something that is not read here, or tensors that do not fit together.
    """
    from compressor.model.decode import QuantizedWeights

    _refuse_unread(description, where)
    weights = QuantizedWeights(description, method, headers, read, where)
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in headers:
        module, _, leaf = name.rpartition(".")
        leaves[module].append(leaf)
    kv = kv_scales(headers)
    tensors = {}
    formats: dict[str, None] = {}
    for module in weights.modules:
        formats[_format_name(weights, module)] = None
        tensors[f"{module}.weight"] = _packed(weights, module, leaves[module], headers, kv)
    if not tensors:
        raise CheckpointError(f"quant_method {method}, but no tensor is called *.weight_scale", where=where)
    named = ", ".join(formats)
    if weights.dialect == "modelopt":
        return Layout(tensors, kv, f"ModelOpt {named}")
    # Codes in words of 32 bits: their dtype does not tell that they are no plain tensor.
    lost = (name for name in headers if name.endswith(_OF_PACKED))
    for module, _, leaf in (name.rpartition(".") for name in lost):
        if f"{module}.weight" not in tensors:
            raise CheckpointError(
                f"tensor {module}.{leaf} belongs to a quantized module, whose weight_scale is missing",
                where=where,
                fix="fetch the checkpoint again",
            )
    schemes = {f"{module}.weight": weights.scheme(module) for module in weights.modules}
    return Layout(tensors, kv, f"compressed-tensors {named}", schemes)


def _refuse_unread(description: Mapping[str, Any], where: str) -> None:
    """Refuses what changes weights in ways that decoding does not undo."""
    sparsity = description.get("sparsity_config") or {}
    is_sparse = not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"
    for found, what in (
        (is_sparse, "its weights are stored sparse (sparsity_config)"),
        (bool(description.get("transform_config")), "its weights are rotated (transform_config)"),
    ):
        if found:
            raise CheckpointError(
                f"compressed-tensors: {what}, which is not read here",
                where=where,
                fix=f"use the {SIXTEEN_BIT}",
            )


def _format_name(weights: QuantizedWeights, module: str) -> str:
    from compressor.model.decode import format_of

    if weights.dialect == "modelopt":
        return weights.algorithm(module).name
    return format_of(weights.scheme(module))


def _packed(
    weights: QuantizedWeights,
    module: str,
    leaves: list[str],
    headers: Mapping[str, TensorHeader],
    kv: frozenset[str],
) -> Packed:
    """One quantized module, its tensors checked."""
    parts = {name.removeprefix(f"{module}."): name for name in weights.parts(module)}
    beside = tuple(f"{module}.{leaf}" for leaf in leaves if leaf in _INPUTS and leaf not in parts)
    for leaf in leaves:
        name = f"{module}.{leaf}"
        if leaf not in parts and name not in beside and name not in kv and leaf != "bias":
            raise CheckpointError(
                f"tensor {name} belongs to a quantized module, and what it is for is not known here",
                fix=f"use the {SIXTEEN_BIT}",
            )
    codes = next(leaf for leaf in _CODES if leaf in parts)
    parts = {codes: parts[codes], **parts}
    shape = _checked_shape(weights, module, codes, parts, headers)
    for name in (*beside, *(parts[leaf] for leaf in parts if leaf in _INPUTS)):
        expect(headers, name, (*SCALE_DTYPES, "I8", "U8"), None)
    decode = partial(_decode, weights=weights, module=module, shape=shape)
    return Packed(TensorHeader(f"{module}.weight", "BF16", shape), parts, beside, decode)


def _checked_shape(
    weights: QuantizedWeights,
    module: str,
    codes: str,
    parts: Mapping[str, str],
    headers: Mapping[str, TensorHeader],
) -> tuple[int, int]:
    """O and I of a module whose tensors have the dtypes and shapes that its scheme says."""
    scheme = weights.scheme(module)
    args = scheme.weights
    if args is None:
        raise CheckpointError("quantized, but its group in quantization_config has no weights", where=module)
    if not 1 <= args.num_bits <= _MOST_BITS:
        raise CheckpointError(
            f"quantization_config says {args.num_bits:,} bits for its weights", where=module
        )
    packed = "weight_shape" in parts
    four_bit_float = args.type == "float" and args.num_bits == 4
    dtype = "I32" if packed else "U8" if four_bit_float else "F8_E4M3" if args.type == "float" else "I8"
    stored = headers.get(parts[codes])
    if stored is None or len(stored.shape) != 2:
        stored = expect(headers, parts[codes], (dtype,), (0, 0))
    rows, columns = expect(headers, parts[codes], (dtype,), stored.shape).shape
    columns = columns * _WORD_BITS // args.num_bits if packed else 2 * columns if four_bit_float else columns
    grid = _scale_grid(scheme, rows, columns)
    found = headers.get(parts["weight_scale"])
    scale_dtypes = _scale_dtypes(scheme)
    # ModelOpt and others leave out or add dimensions of one.
    loose = weights.dialect == "modelopt" or prod(grid) == 1 or args.strategy == "channel"
    same = found is not None and loose and _without_ones(found.shape) == _without_ones(grid)
    expect(headers, parts["weight_scale"], scale_dtypes, found.shape if same and found is not None else grid)
    for leaf in _ONE_VALUE:
        if leaf in parts:
            expect(headers, parts[leaf], ("F32",), None)
    if packed:
        expect(headers, parts["weight_shape"], ("I64", "I32"), (2,))
    if "weight_zero_point" in parts:
        zero_rows = -(-rows * args.num_bits // _WORD_BITS) if packed else grid[0]
        expect(headers, parts["weight_zero_point"], ("I32" if packed else "I8",), (zero_rows, grid[1]))
    return rows, columns


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _scale_grid(scheme: QuantizationScheme, rows: int, columns: int) -> tuple[int, int]:
    """How many scales a matrix has, down and across."""
    args = scheme.weights
    assert args is not None
    if args.strategy == "tensor":
        return 1, 1
    if args.strategy == "channel":
        return rows, 1
    if args.strategy == "block" and args.block_structure:
        height, width = args.block_structure
        if height > max(rows, _PADDED) or width > max(columns, _PADDED):
            raise CheckpointError(f"blocks of {height:,} x {width:,} in a matrix of {rows:,} x {columns:,}")
        return -(-rows // height), -(-columns // width)
    if args.strategy in ("group", "tensor_group") and args.group_size:
        return rows, -(-columns // args.group_size)
    raise CheckpointError(f"compressed-tensors strategy {args.strategy} is not read here")


def _scale_dtypes(scheme: QuantizationScheme) -> tuple[str, ...]:
    from compressor.model.decode import format_of

    layout = format_of(scheme)
    if layout.startswith("mx"):
        return ("U8",)
    return ("F8_E4M3",) if layout.startswith("nvfp4") else SCALE_DTYPES


def _decode(
    parts: Mapping[str, torch.Tensor], weights: QuantizedWeights, module: str, shape: tuple[int, int]
) -> torch.Tensor:
    """bf16 [O, I], in chunks of rows; each value is rounded from fp32 once."""
    import torch

    from compressor.numerics.groups import row_chunks

    local = weights.respelled(module, dict(parts))
    stated = local.get("weight_shape")
    if stated is not None and tuple(stated.tolist()) != shape:
        raise CheckpointError(
            f"its weight_shape is {stated.tolist()}, its codes are padded to {list(shape)}",
            where=module,
            fix=f"widths that do not fill words of {_WORD_BITS} bits are not read; use the {SIXTEEN_BIT}",
        )
    args = weights.scheme(module).weights
    assert args is not None
    height = args.block_structure[0] if args.block_structure else 1
    found = torch.empty(shape, dtype=torch.bfloat16)
    # Words of packed zero points hold several rows.
    for chunk in row_chunks(*shape, multiple=max(height, _WORD_BITS)):
        some = {
            name: _rows(tensor, chunk, shape[0], height, args.num_bits, name)
            for name, tensor in local.items()
        }
        found[chunk] = weights.decode(module, some)
    return found


def _rows(tensor: torch.Tensor, chunk: slice, rows: int, height: int, bits: int, name: str) -> torch.Tensor:
    """What of a module's tensor belongs to some rows of its weight."""
    import torch

    if name == "weight_shape":
        return torch.tensor([chunk.stop - chunk.start, int(tensor[1])])
    if tensor.numel() == 1:
        return tensor
    step = 1
    if name == "weight_zero_point" and tensor.dtype == torch.int32:
        step = _WORD_BITS // bits
    elif name in ("weight_scale", "weight_zero_point"):
        step = height
    return tensor[chunk.start // step : -(-chunk.stop // step)]
