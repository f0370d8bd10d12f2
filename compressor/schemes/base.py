"""A scheme: how a weight matrix is STORED (codes, scales, names, engine config). It chooses nothing.

Importing a scheme must not import torch: the plan sizes 200 GB sources from it in seconds. Methods that do
arithmetic import ``compressor.numerics`` when they are called.

Legend: O out_features, I in_features, G groups or blocks along I.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from compressor.schemes.kinds import Kinds
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from compressor.numerics.input_ranges import InputRange
    from compressor.numerics.lattice import Lattice

__all__ = ["Arithmetic", "FreeScales", "Kinds", "Scales", "Scheme", "Search", "indivisible"]

Search = Literal["full", "minmax"]
Arithmetic = Literal["bf16", "fp8", "int8", "fp4"]


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


@dataclass(frozen=True)
class FreeScales:
    """A stored matrix taken apart: its codes, and the scales that may change while the codes stay.

    In fp32 the weight is the unit times its group's scale (over ``divisor``, where there is one), the same
    number that ``decode`` gives.

    Attributes:
        units_OI: fp32, the value of each code less its zero point.
        scale_BC: as stored, in any floating dtype.
        group: rows and columns that share a scale; the last rows of groups may be missing.
        divisor: fp32 [1], the tensor-level scale, which stays; or None.
        local: local name of the stored scales.
    """

    units_OI: torch.Tensor
    scale_BC: torch.Tensor
    group: tuple[int, int]
    divisor: torch.Tensor | None = None
    local: str = "weight_scale"


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

    @property
    def static_inputs(self) -> bool:
        """Whether a scale of the matrix's inputs is stored, which calibration must measure."""
        return False

    @property
    def rounds_inputs(self) -> bool:
        """Whether engines round the matrix's inputs as they compute."""
        return _input_args(self) is not None

    @property
    def arithmetic(self) -> Arithmetic:
        """The format that engines multiply in, where the device has it; plans ask, so nothing is imported."""
        return "bf16"

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

        Those of ``input_tensors`` are not among them.

        Byte-for-byte what ``compressed_tensors``' compressor of the same format makes of the same scales.
        """
        raise NotImplementedError

    def decode(self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int) -> torch.Tensor:
        """fp32 [O, I]: the weight that an engine computes with, from ``encode``'s tensors."""
        raise NotImplementedError

    def scales(self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int) -> Scales:
        """The scales that ``encode`` was given, from its tensors."""
        raise NotImplementedError

    def free_scales(
        self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int
    ) -> FreeScales | None:
        """``encode``'s tensors as codes and scales; None where scales are powers of two, or one a tensor."""
        return None

    def lattice(self, scales: Scales, out_features: int, in_features: int) -> Lattice:
        """The values that a matrix of this shape can take under ``scales``.

        ``encode`` stores a matrix of such values as it is: what ``decode`` gives are the same numbers, up to
        the rounding of one fp32 product.
        """
        raise NotImplementedError

    def near(self, scales: Scales, in_features: int) -> list[Scales]:
        """``scales`` and others that every group by itself may take instead, nearest first.

        Only ``scales`` where groups are whole rows or span several: there is little to gain.
        """
        return [scales]

    def input_tensors(self, heard: InputRange) -> dict[str, torch.Tensor]:
        """Local name -> stored tensor, on the CPU, from what calibration heard of the matrix's inputs.

        Matrices that read the same input get the same; engines keep one scale for all experts of a layer
        that do so, the widest: give them the merged range.

        Raises:
            CheckpointError: nothing was heard, or values that no model has.
        """
        return {}

    def round_inputs(self, x_NI: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What engines make of the matrix's inputs: of the same shape and dtype, computed in fp32.

        ``tensors``: the matrix's stored ones; only those of ``input_tensors`` are looked at. The inputs
        themselves where engines leave them alone.
        """
        activations = _input_args(self)
        if activations is None:
            return x_NI
        from compressor.schemes.inputs import round_rows

        return round_rows(x_NI, activations, tensors)

    def options(self) -> dict[str, Any]:
        """The fields that differ from the defaults, for tables."""
        return self.model_dump(exclude={"kind"}, exclude_defaults=True)


@cache
def _input_args(scheme: Scheme) -> QuantizationArgs | None:
    """How the library describes the rounding of a matrix's inputs; to look at only."""
    return scheme.ct_scheme([]).input_activations
