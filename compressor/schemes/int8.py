"""INT8 weights: weight-only (W8A16), or with activations rounded to INT8 by the engine as it goes (W8A8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from compressor.schemes.base import Arithmetic, indivisible
from compressor.schemes.grouped import Ratios, ratios_between, scale_dtype
from compressor.schemes.packed_int import GroupSize, PackedInt, group_advice
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from compressor.schemes.base import Scales


class Int8(PackedInt):
    """Symmetric INT8: packed, in rows or groups, without activations; plain, in rows, with dynamic ones.

    The full search tries scales from 0.75 of min-max to min-max: clipping pays in rows with outliers.
    """

    kind: Literal["int8"] = "int8"
    activations: Literal["none", "dynamic"] = "none"
    group_size: GroupSize | None = None

    @model_validator(mode="after")
    def _one_scale_a_row(self) -> Int8:
        if self.activations == "dynamic" and self.group_size is not None:
            raise ValueError("INT8 activations need one weight scale a row: leave group_size out")
        return self

    @property
    def label(self) -> str:
        """See ``Scheme.label``."""
        if self.activations == "dynamic":
            return "W8A8"
        return f"W8A16 g{self.group_size}" if self.group_size else "W8A16"

    @property
    def arithmetic(self) -> Arithmetic:
        """See ``Scheme.arithmetic``."""
        return "bf16" if self.activations == "none" else "int8"

    @property
    def _bits(self) -> Literal[4, 8]:
        return 8

    def problem(self, out_features: int, in_features: int, *, fused: bool) -> str | None:
        """See ``Scheme.problem``."""
        if self.activations == "dynamic":
            return indivisible(out_features, in_features, 1, "row")
        if self.group_size is None:
            return indivisible(out_features, in_features, 4, "values in a word of packed INT8")
        advice = group_advice(in_features, self.group_size)
        return indivisible(out_features, in_features, self.group_size, "group of INT8", advice)

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """Packed as ``PackedInt.outputs``; W8A8: ``weight`` I8 [O, I], ``weight_scale`` [O, 1]."""
        if self.activations == "none":
            return super().outputs(module, out_features, in_features, dtype=dtype)
        return (
            TensorHeader(f"{module}.weight", "I8", (out_features, in_features)),
            TensorHeader(f"{module}.weight_scale", scale_dtype(dtype), (out_features, 1)),
        )

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """Weight-only as ``PackedInt.ct_scheme``; the library's preset W8A8."""
        if self.activations == "none":
            return super().ct_scheme(targets)
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.label, targets)
        scheme.format = CompressionFormat.int_quantized
        return scheme

    @property
    def _codes_name(self) -> str:
        return "weight_packed" if self.activations == "none" else "weight"

    def _ratios(self) -> Ratios:
        fine = tuple(step / 256 for step in (-3, -2, -1, 0, 1, 2, 3))
        return Ratios(ratios_between(0.75, 1.0, 64), fine)

    def _store(self, codes_OI: torch.Tensor) -> torch.Tensor:
        return super()._store(codes_OI) if self.activations == "none" else codes_OI

    def _load(self, stored: torch.Tensor, in_features: int) -> torch.Tensor:
        return super()._load(stored, in_features) if self.activations == "none" else stored

    def _extras(self, shape: tuple[int, int], scales: Scales) -> dict[str, torch.Tensor]:
        return super()._extras(shape, scales) if self.activations == "none" else {}
