"""FP8 blocks as DeepSeek-V3 stores them (``quant_method: fp8``): E4M3 codes, and a factor for each block.

As transformers 5.17 integrations/finegrained_fp8.py, ``Fp8Dequantize``: weight = code x ``*_scale_inv`` in
fp32, rounded to bfloat16 once. Without ``weight_block_size`` there is one factor for the entire matrix.

Legend: E experts, O out_features, I in_features; R, C rows and columns of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.packed import SCALE_DTYPES, Layout, Packed, expect, kv_scales
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

_SCALE = "_scale_inv"
# Scales of the inputs, as transformers and older writers call them.
_INPUTS = ("activation_scale", "input_scale")
MAX_BLOCK = 2**20


def fp8_layout(headers: Mapping[str, TensorHeader], description: Mapping[str, Any], where: str) -> Layout:
    """What an FP8 checkpoint consists of.

    Args:
        headers: every stored tensor.
        description: its ``quantization_config``.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: another format than E4M3, or tensors that do not fit together.
    """
    if description.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"FP8 format {str(description['fmt'])[:40]!r}; only e4m3 is read", where=where)
    block = _block(description.get("weight_block_size"), where)
    tensors = {}
    for name, header in headers.items():
        if header.dtype != "F8_E4M3" or len(header.shape) not in (2, 3):
            continue
        shape = None
        if block is not None:
            steps = zip(header.shape[-2:], block, strict=True)
            shape = (*header.shape[:-2], *(-(-size // step) for size, step in steps))
        expect(headers, name + _SCALE, SCALE_DTYPES, shape)
        module = name.removesuffix("weight")
        beside = tuple(
            module + leaf for leaf in _INPUTS if name.endswith(".weight") and module + leaf in headers
        )
        for other in beside:
            expect(headers, other, SCALE_DTYPES, None)
        tensors[name] = Packed(
            TensorHeader(name, "BF16", header.shape),
            {"weight": name, "scale_inv": name + _SCALE},
            beside,
            partial(_decode, block=block),
            by_expert=len(header.shape) == 3 and block is not None,
        )
    lost = next(
        (name for name in headers if name.endswith(_SCALE) and name.removesuffix(_SCALE) not in tensors), ""
    )
    if lost:
        raise CheckpointError(f"tensor {lost} scales no tensor of F8_E4M3", where=where)
    sizes = "one factor a matrix" if block is None else f"blocks of {block[0]} x {block[1]}"
    return Layout(tensors, kv_scales(headers), f"FP8 in {sizes}" if block else f"FP8 with {sizes}")


def _block(stated: object, where: str) -> tuple[int, int] | None:
    """Rows and columns of a block."""
    if stated is None:
        return None
    if (
        isinstance(stated, list)
        and len(stated) == 2
        and all(type(size) is int and 0 < size <= MAX_BLOCK for size in stated)
    ):
        return stated[0], stated[1]
    raise CheckpointError(
        f"config.json: weight_block_size is {str(stated)[:40]}, not a list of two sizes", where=where
    )


def _decode(parts: Mapping[str, torch.Tensor], block: tuple[int, int] | None) -> torch.Tensor:
    """bf16 of the codes' shape, in chunks of rows."""
    import torch

    from compressor.numerics.groups import row_chunks

    codes, scale = parts["weight"], parts["scale_inv"].float()
    found = torch.empty(codes.shape, dtype=torch.bfloat16)
    if codes.dim() == 3:
        for expert, codes_OI in enumerate(codes):
            own = scale if block is None else scale[expert]
            found[expert] = _decode({"weight": codes_OI, "scale_inv": own}, block)
        return found
    rows, columns = codes.shape
    for chunk in row_chunks(rows, columns, 1 if block is None else block[0]):
        factor = scale
        if block is not None:
            height, width = block
            of_rows = scale[chunk.start // height : -(-chunk.stop // height)]
            # A block may be larger than the matrix by any factor.
            factor = of_rows.repeat_interleave(min(height, rows), 0)[: chunk.stop - chunk.start]
            factor = factor.repeat_interleave(min(width, columns), 1)[:, :columns]
        found[chunk] = codes[chunk].float() * factor
    return found
