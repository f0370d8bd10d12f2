"""FP8 E4M3 weights: a scale for each row (``fp8_dynamic``) or for each block of 128 x 128 (``fp8_block``).

Activations are rounded to FP8 by the engine as it goes (per token, or per 128 channels of a token). Stored as
compressed_tensors@0.19 compressors/naive_quantized/base.py. Legend: O out_features, I in_features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compressor.schemes.base import indivisible
from compressor.schemes.grouped import GroupedScheme, Ratios, ratios_between, scale_dtype
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from compressor.numerics.grids import Grid

BLOCK = 128


class _Fp8(GroupedScheme):
    """What both have in common.

    The full search tries scales over one octave: E4M3 is a floating-point format, and a further octave only
    shifts the exponents. From 2 percent (rows of 16,384) to 13 percent (rows of 576) less squared error than
    min-max was measured.
    """

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """The library's preset of the same name."""
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.label, targets)
        scheme.format = CompressionFormat.float_quantized
        return scheme

    def _grid(self) -> Grid:
        from compressor.numerics.grids import E4M3

        return E4M3

    def _ratios(self) -> Ratios:
        return Ratios(ratios_between(1.0, 2.0, 16))


class Fp8Dynamic(_Fp8):
    """FP8 weights with a scale for each output channel."""

    kind: Literal["fp8_dynamic"] = "fp8_dynamic"

    @property
    def label(self) -> str:
        """See ``Scheme.label``."""
        return "FP8_DYNAMIC"

    def problem(self, out_features: int, in_features: int, *, fused: bool) -> str | None:
        """See ``Scheme.problem``."""
        return indivisible(out_features, in_features, 1, "row")

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """``weight`` F8_E4M3 [O, I], ``weight_scale`` [O, 1] in the model's dtype."""
        return (
            TensorHeader(f"{module}.weight", "F8_E4M3", (out_features, in_features)),
            TensorHeader(f"{module}.weight_scale", scale_dtype(dtype), (out_features, 1)),
        )

    def _group(self, in_features: int) -> tuple[int, int]:
        return 1, in_features


class Fp8Block(_Fp8):
    """FP8 weights with a scale for each 128 x 128 block, as DeepSeek-V3 stores them."""

    kind: Literal["fp8_block"] = "fp8_block"

    @property
    def label(self) -> str:
        """See ``Scheme.label``."""
        return "FP8_BLOCK"

    def problem(self, out_features: int, in_features: int, *, fused: bool) -> str | None:
        """See ``Scheme.problem``; a matrix by itself may end within a block of rows, a fused one may not."""
        advice = "use fp8_dynamic for it, or leave it in 16 bit with ignore"
        if fused and out_features % BLOCK:
            return (
                f"out_features {out_features} is not a multiple of {BLOCK}, the block of FP8_BLOCK, and the "
                f"engine fuses this matrix with others: {advice}"
            )
        return indivisible(out_features, in_features, BLOCK, "block of FP8_BLOCK", advice)

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """``weight`` F8_E4M3 [O, I], ``weight_scale`` [O/128 rounded up, I/128] in the model's dtype."""
        blocks = (-(-out_features // BLOCK), in_features // BLOCK)
        return (
            TensorHeader(f"{module}.weight", "F8_E4M3", (out_features, in_features)),
            TensorHeader(f"{module}.weight_scale", scale_dtype(dtype), blocks),
        )

    def _group(self, in_features: int) -> tuple[int, int]:
        return BLOCK, BLOCK
