"""A scheme: how a weight matrix is STORED (codes, scales, names, engine config). It chooses nothing.

Importing a scheme must not import torch: the plan sizes 200 GB sources from it in seconds. Methods that do
arithmetic import ``compressor.numerics`` when they are called.

Legend: O out_features, I in_features, G groups or blocks along I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from compressor.schemes.kinds import Kinds
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from compressed_tensors.quantization import QuantizationScheme

__all__ = ["Kinds", "Scales", "Scheme", "Search", "indivisible"]

Search = Literal["full", "minmax"]


def indivisible(out_features: int, in_features: int, size: int, what: str, advice: str = "") -> str | None:
    """The problem of a matrix whose rows do not divide into groups of ``size``, or None.

    ``what`` names the group ("16-value block of NVFP4"), ``advice`` a size that would do.
    """
    if out_features < 1 or in_features < 1:
        return f"the matrix is empty ({out_features} x {in_features})"
    if in_features % size == 0:
        return None
    return (
        f"in_features {in_features} is not a multiple of {size}, the {what}: "
        f"{advice or 'leave the matrix in 16 bit with ignore'}"
    )


@dataclass(frozen=True)
class Scales:
    """The chosen quantization parameters of one matrix, in the format's own value domain.

    Attributes:
        scale: block or group scales as stored before casting; shape by scheme ([O, G], [O, 1], blocks).
        zero_point: integer zero points of ``scale``'s shape for asymmetric schemes, else None.
        global_scale: fp32 [1], the tensor-level scale (NVFP4: effective scale = scale / global_scale).
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None


class Scheme(BaseModel):
    """Base of all weight schemes; a frozen pydantic model so that it is also the recipe's spelling of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str

    @property
    def label(self) -> str:
        """The conventional name in checkpoint names and tables, e.g. ``NVFP4A16``."""
        raise NotImplementedError

    @property
    def shares_tensor_scale(self) -> bool:
        """Whether parts of one fuse group must share a tensor-level scale."""
        return False

    def problem(self, out_features: int, in_features: int, *, fused: bool) -> str | None:
        """Why a matrix of this shape cannot be stored so (a sentence with a suggestion), or None.

        ``fused``: the engine concatenates this matrix with others along out_features.
        """
        raise NotImplementedError

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """The exact tensors written for one matrix, named ``module.weight_packed`` and so on.

        ``dtype``: safetensors dtype of the source weight; some formats store their scales in it.
        """
        raise NotImplementedError

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """The ``compressed_tensors`` description written into ``quantization_config`` (with ``format``)."""
        raise NotImplementedError

    def fit(
        self,
        weights_OI: Sequence[torch.Tensor],
        *,
        search: Search,
        importance_I: torch.Tensor | None = None,
    ) -> list[Scales]:
        """Scales for matrices of one fuse group (usually one matrix), from the weights alone.

        ``search``: ``full`` minimises the squared error over the scales the format can store; ``minmax``
        takes the range. ``importance_I``: optional positive weight of each input channel in that error.
        """
        raise NotImplementedError

    def encode(self, weight_OI: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """Local name (``weight_packed``, ``weight_scale``...) -> stored tensor, as ``outputs`` lists them.

        Byte-for-byte what ``compressed_tensors``' compressor of the same format makes of the same scales.
        """
        raise NotImplementedError

    def decode(self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int) -> torch.Tensor:
        """fp32 [O, I]: the weight that an engine computes with, from ``encode``'s tensors."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The fields that differ from the defaults, for tables."""
        return self.model_dump(exclude={"kind"}, exclude_defaults=True)
