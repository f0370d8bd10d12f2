"""Plain descriptions that every room shares: tensor headers, linear parts and roles. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

# safetensors dtype names -> bytes per element (https://github.com/huggingface/safetensors, Dtype)
DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Name, safetensors dtype and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data as stored."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One weight matrix ``[out_features, in_features]`` that lies inside a source tensor.

    A plain linear layer's tensor has one part, the whole of it. A fused expert tensor
    (``experts.gate_up_proj`` of Llama 4: ``[experts, in, 2 * out]``) has one part for each expert and half.

    Attributes:
        module: module name in the output checkpoint, without ``.weight``.
        out_features: rows of the part.
        in_features: columns of the part; blocks and groups run along these.
        expert: index along the tensor's first dimension, or None where it is 2-D.
        transposed: the source stores ``[in_features, out_features]``.
        row_start: first row of the part among the (transposed back) matrix's rows.
        fuse_group: parts with equal names share one tensor-level scale, because the engine fuses them.
    """

    module: str
    out_features: int
    in_features: int
    expert: int | None = None
    transposed: bool = False
    row_start: int = 0
    fuse_group: str | None = None


@dataclass(frozen=True, slots=True)
class InputNorm:
    """The RMS norm whose output a linear layer reads.

    Its output has a second moment of about ``(weight + offset)^2`` per channel whatever the text, so that is
    how much an error in this input channel counts.

    Attributes:
        tensor: name of the norm's weight, ``[in_features]``.
        offset: added to the weight by the model (Gemma's norms store it less one).
    """

    tensor: str
    offset: float = 0.0


RoleKind = Literal["linear", "embedding", "lm_head", "other"]


@dataclass(frozen=True, slots=True)
class Role:
    """What a source tensor is to its model.

    Attributes:
        kind: ``linear`` tensors are quantized by default, but those with a reason; these, ``embedding`` and
            ``lm_head`` only where a rule says so; ``other`` (norms, biases, routers, convolutions, vision
            towers) never, but the matrices of prediction layers, where a rule says so.
        parts: the weight matrices inside (empty for ``other`` that is never quantized).
        reason: why the tensor stays in 16 bit by default, as the plan prints it; empty where it does not.
        input_norm: the norm that feeds these matrices, where there is one right before them.
    """

    kind: RoleKind
    parts: tuple[LinearPart, ...] = ()
    reason: str = ""
    input_norm: InputNorm | None = None
