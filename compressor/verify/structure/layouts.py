"""How one weight matrix is stored: which tensors, of which dtypes and shapes, follow from its format.

compressed-tensors 0.19 compressors/*/base.py (``compression_param_names``) and quantization/lifecycle;
ModelOpt as vLLM 0.32 model_executor/layers/quantization/modelopt.py creates its parameters.

Legend: O out_features, I in_features; R x C the values that share a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from compressor.spec import TensorHeader

FLOATS = frozenset({"F16", "BF16", "F32"})
F32 = frozenset({"F32"})
E4M3 = frozenset({"F8_E4M3"})
E8M0 = frozenset({"U8", "F8_E8M0"})
_SCALAR: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))

# Tensors that only quantized modules have.
MARKERS = frozenset(
    {
        *("weight_packed", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape"),
        *("weight_g_idx", "weight_scale_2", "weight_scale_inv", "input_scale", "input_global_scale"),
        *("input_zero_point", "output_scale", "output_zero_point", "pre_quant_scale"),
    }
)
# What a matrix's codes may be stored as; unquantized weights are floating point.
CODE_DTYPES = frozenset({"U8", "I8", "I32", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class Slot:
    """One tensor of a module: what it may be stored as, and the shapes that it may have."""

    dtypes: frozenset[str]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True

    def fault(self, header: TensorHeader) -> str | None:
        """How the stored tensor differs, or None."""
        if header.dtype in self.dtypes and header.shape in self.shapes:
            return None
        dtypes = "/".join(sorted(self.dtypes))
        return f"{header.dtype} {list(header.shape)} instead of {dtypes} {list(self.shapes[0])}"


@dataclass(frozen=True)
class Layout:
    """A format, as far as the tensors of one matrix go.

    Attributes:
        label: as messages name it.
        codes: the tensor that holds the codes: ``weight_packed`` or ``weight``.
        code_dtype: ``U8`` (two FP4 codes a byte), ``I32`` (packed integers), ``I8`` or ``F8_E4M3``.
        bits: of one code.
        rows: how many rows share a scale, None: all.
        columns: how many columns share a scale, None: all.
        scale_dtypes: of ``weight_scale``.
        tensor_scale: the tensor-level scale beside it, or None.
        zero_point: ``packed`` like the codes, ``plain`` (int8), or None where the format is symmetric.
        weight_shape: whether ``weight_shape`` holds [O, I].
        inputs: the scalars of static activation quantization; all of ``F32`` or ``FLOATS``.
        inputs_optional: whether they may be left out.
    """

    label: str
    codes: str
    code_dtype: str
    bits: int
    rows: int | None
    columns: int | None
    scale_dtypes: frozenset[str]
    tensor_scale: str | None = None
    zero_point: Literal["packed", "plain"] | None = None
    weight_shape: bool = False
    inputs: tuple[str, ...] = ()
    inputs_optional: bool = False

    @property
    def largest_code(self) -> float:
        """The largest magnitude that a code stands for."""
        if self.code_dtype == "F8_E4M3":
            return 448.0
        return 6.0 if self.code_dtype == "U8" else float(1 << (self.bits - 1))

    def width(self, in_features: int) -> int:
        """Contents columns of the codes of ``in_features`` values."""
        per_element = {"U8": 8, "I32": 32}.get(self.code_dtype, self.bits)
        return -(-in_features * self.bits // per_element)

    def logical(self, codes: TensorHeader) -> tuple[int, int] | None:
        """(O, I) as the codes tell them, or None; packed integers tell I only up to one word."""
        if len(codes.shape) != 2 or codes.dtype != self.code_dtype:
            return None
        per_element = {"U8": 8, "I32": 32}.get(self.code_dtype, self.bits)
        return codes.shape[0], codes.shape[1] * per_element // self.bits

    def grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Rows and columns of scales."""
        return -(-out_features // (self.rows or out_features or 1)), -(
            -in_features // (self.columns or in_features or 1)
        )

    def slots(self, out_features: int, in_features: int) -> Mapping[str, Slot]:
        """Every tensor of a matrix [O, I] by its local name."""
        scales = self._scale_shapes(out_features, in_features)
        slots = {
            self.codes: Slot(frozenset({self.code_dtype}), ((out_features, self.width(in_features)),)),
            "weight_scale": Slot(self.scale_dtypes, scales),
            "weight_g_idx": Slot(frozenset({"I32", "I64"}), ((in_features,),), required=False),
            "output_scale": Slot(FLOATS, _SCALAR, required=False),
            "output_zero_point": Slot(frozenset({"I8", *FLOATS, *E4M3}), _SCALAR, required=False),
        }
        if self.tensor_scale:
            slots[self.tensor_scale] = Slot(F32, _SCALAR)
        if self.zero_point == "packed":
            rows, columns = self.grid(out_features, in_features)
            slots["weight_zero_point"] = Slot(frozenset({"I32"}), ((-(-rows * self.bits // 32), columns),))
        elif self.zero_point == "plain":
            slots["weight_zero_point"] = Slot(frozenset({"I8"}), scales)
        if self.weight_shape:
            slots["weight_shape"] = Slot(frozenset({"I64", "I32"}), ((2,),))
        for name in self.inputs:
            slots[name] = Slot(FLOATS, _SCALAR, required=not self.inputs_optional)
        if "input_scale" in self.inputs:
            slots["input_zero_point"] = Slot(frozenset({"I8", *FLOATS, *E4M3}), _SCALAR, required=False)
        return slots

    def _scale_shapes(self, out_features: int, in_features: int) -> tuple[tuple[int, ...], ...]:
        if self.rows is None and self.columns is None:
            return _SCALAR
        rows, columns = self.grid(out_features, in_features)
        if self.columns is None:
            return ((rows, 1), (rows,))
        if self.rows == 1:
            return ((rows, columns),)
        # ModelOpt writes blocks with the dimensions that it reduced over kept.
        return ((rows, columns), (rows, 1, columns, 1))
