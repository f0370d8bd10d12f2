"""Tensors that a checkpoint stores quantized, from headers alone: what they become, what they consist of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.checkpoint.layout import PACKED_DTYPES
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

SIXTEEN_BIT = "16-bit original"
SCALE_DTYPES = ("F32", "BF16", "F16")
_E8M0_NAN = 255
# What engines store beside a quantized KV cache; it goes with the quantization_config that names it.
_KV_SCALES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")


@dataclass(frozen=True)
class Packed:
    """One tensor that is stored quantized.

    Attributes:
        header: what it decodes to: its plain name, BF16, its plain shape.
        parts: local name -> stored name of everything that ``decode`` reads; the first is the codes.
        beside: stored names that belong to it and say nothing of the weight (scales of its inputs).
        decode: bf16 weight of the plain shape from the parts by local name, or of the shape without its
            first dimension from one entry of each part.
        by_expert: whether all parts have the first dimension, so that one entry can be read alone.
    """

    header: TensorHeader
    parts: Mapping[str, str]
    beside: tuple[str, ...]
    decode: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    by_expert: bool = False


@dataclass(frozen=True)
class Layout:
    """A quantized checkpoint, taken apart.

    Attributes:
        tensors: plain name -> the quantized tensor.
        dropped: stored names that belong to no weight and go (scales of a KV cache).
        described: a few words on the format for notes ("FP8 in blocks of 128 x 128").
        schemes: plain name -> compressed-tensors' description, where the checkpoint is in its dialect.
    """

    tensors: Mapping[str, Packed]
    dropped: frozenset[str]
    described: str
    schemes: Mapping[str, QuantizationScheme] | None = None

    def checked(self, headers: Mapping[str, TensorHeader]) -> Layout:
        """The same, once it is sure that every stored tensor has its place.

        Raises:
            CheckpointError: a tensor would have the name of another, or is quantized in a way that the
                checkpoint's description does not tell.
        """
        taken = {
            name for packed in self.tensors.values() for name in (*packed.parts.values(), *packed.beside)
        }
        for name in self.tensors:
            if name in headers and name not in taken:
                raise CheckpointError(
                    "stored both quantized and plain", where=name, fix=f"use the {SIXTEEN_BIT}"
                )
        for name, header in headers.items():
            if header.dtype in PACKED_DTYPES and name not in taken and name not in self.dropped:
                raise CheckpointError(
                    f"tensor {name} is {header.dtype}, and {self.described} does not say how it is quantized",
                    fix=f"use the {SIXTEEN_BIT}",
                )
        return self


def kv_scales(headers: Iterable[str]) -> frozenset[str]:
    """Stored names that belong to a quantized KV cache."""
    return frozenset(name for name in headers if name.rpartition(".")[2] in _KV_SCALES)


def expect(
    headers: Mapping[str, TensorHeader], name: str, dtypes: Collection[str], shape: tuple[int, ...] | None
) -> TensorHeader:
    """The header of a stored tensor.

    Raises:
        CheckpointError: it is missing, or has another dtype or shape; ``shape`` None is one value.
    """
    found = headers.get(name)
    if found is None:
        raise CheckpointError(f"tensor {name} is missing", fix="fetch the checkpoint again")
    if found.dtype not in dtypes or (found.numel != 1 if shape is None else found.shape != shape):
        wanted = f"{' or '.join(dtypes)} {'of one value' if shape is None else list(shape)}"
        raise CheckpointError(
            f"tensor {name} is {found.dtype} {list(found.shape)}, where {wanted} belongs",
            fix=f"use the {SIXTEEN_BIT}",
        )
    return found


def check_finite(parts: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
    """Refuses scales that are NaN or infinite; ``names``: local name -> stored name."""
    import torch

    for local, tensor in parts.items():
        if "scale" not in local:
            continue
        # A scale of eight bits without a type of its own is E8M0.
        finite = tensor != _E8M0_NAN if tensor.dtype == torch.uint8 else torch.isfinite(tensor.float())
        if not bool(finite.all()):
            raise CheckpointError(
                f"tensor {names[local]} has values that are not finite", fix="fetch the checkpoint again"
            )
