"""gpt-oss's experts (``quant_method: mxfp4``): FP4 codes in blocks of 32, a power of two for each block.

As transformers 5.17 integrations/mxfp4.py, ``convert_moe_packed_tensors``: ``X_blocks`` [E, O, I/32, 16] and
``X_scales`` [E, O, I/32], both U8, are the parameter ``X`` [E, I, O]. Exact in bfloat16.

Legend: E experts, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compressor.checkpoint.packed import Layout, Packed, expect, kv_scales
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16


def mxfp4_layout(headers: Mapping[str, TensorHeader], where: str) -> Layout:
    """What such a checkpoint consists of.

    Raises:
        CheckpointError: blocks without scales or of another shape, or none at all.
    """
    tensors = {}
    for name, header in headers.items():
        if not name.endswith(_BLOCKS) or header.dtype != "U8":
            continue
        plain = name.removesuffix(_BLOCKS)
        if len(header.shape) != 4 or header.shape[-1] != _BYTES:
            raise CheckpointError(
                f"tensor {name} has shape {list(header.shape)}, not [experts, out, in / 32, {_BYTES}]",
                where=where,
            )
        experts, rows, groups, _ = header.shape
        expect(headers, plain + _SCALES, ("U8",), (experts, rows, groups))
        tensors[plain] = Packed(
            TensorHeader(plain, "BF16", (experts, 2 * _BYTES * groups, rows)),
            {"blocks": name, "scales": plain + _SCALES},
            (),
            _decode,
            by_expert=True,
        )
    if not tensors:
        raise CheckpointError("quant_method mxfp4, but no tensor is called *_blocks", where=where)
    return Layout(tensors, kv_scales(headers), "MXFP4")


def _decode(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """bf16 [E, I, O], or [I, O] of one expert."""
    import torch

    from compressor.numerics.fp4 import e2m1_values, unpack_nibbles
    from compressor.numerics.mx import e8m0_values

    blocks, scales = parts["blocks"], parts["scales"]
    if blocks.dim() == 4:
        experts, rows, groups, size = blocks.shape
        found = torch.empty((experts, 2 * size * groups, rows), dtype=torch.bfloat16)
        for expert, codes in enumerate(blocks):
            found[expert] = _decode({"blocks": codes, "scales": scales[expert]})
        return found
    every_byte = torch.arange(256, dtype=torch.uint8)[:, None]
    of_byte = e2m1_values(unpack_nibbles(every_byte)).bfloat16()
    pairs = of_byte.index_select(0, blocks.flatten().int()).view(*scales.shape, 2 * _BYTES)
    # Powers of two: exact in bfloat16 too.
    return (pairs * e8m0_values(scales).bfloat16()[..., None]).flatten(-2).T.contiguous()
