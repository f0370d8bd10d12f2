"""FP8 E4M3 weights: scales of rows (``fp8_dynamic``), of blocks (``fp8_block``) or one (``fp8_static``).

Activations are rounded to FP8 by the engine as it goes: per token, per 128 channels of a token, or by a scale
that is stored. As compressed_tensors@0.19 compressors/naive_quantized/base.py.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from compressor.schemes.base import Arithmetic, Scales, Search, indivisible
from compressor.schemes.grouped import GroupedScheme, Ratios, ratios_between, scale_dtype
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from compressor.numerics.grids import Grid
    from compressor.numerics.input_ranges import InputRange
    from compressor.numerics.lattice import Lattice

BLOCK = 128


class _Fp8(GroupedScheme):
    """What they have in common.

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

    @property
    def arithmetic(self) -> Arithmetic:
        """See ``Scheme.arithmetic``."""
        return "fp8"


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


class Fp8Static(_Fp8):
    """FP8 weights and inputs with one scale each for the whole matrix.

    One scale for the weights, since vLLM 0.32 takes rows of scales with static inputs in linear layers only
    (compressed_tensors_moe_w8a8_fp8.py), and ModelOpt has no such form. Fused matrices share it: vLLM keeps
    the largest and rounds the others again. Both searches take it from the range: E4M3 is a floating-point
    format, so a scale a little smaller gains next to nothing. Of the input scales of fused matrices or of a
    layer's experts vLLM keeps the largest.
    """

    kind: Literal["fp8_static"] = "fp8_static"

    @property
    def label(self) -> str:
        """See ``Scheme.label``."""
        return "FP8"

    @property
    def shares_tensor_scale(self) -> bool:
        """See ``Scheme.shares_tensor_scale``."""
        return True

    @property
    def static_inputs(self) -> bool:
        """See ``Scheme.static_inputs``."""
        return True

    def problem(self, out_features: int, in_features: int, *, fused: bool) -> str | None:
        """See ``Scheme.problem``."""
        return indivisible(out_features, in_features, 1, "row")

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """``weight`` F8_E4M3 [O, I], ``weight_scale`` [1] in the model's dtype, ``input_scale`` F32 [1]."""
        return (
            TensorHeader(f"{module}.weight", "F8_E4M3", (out_features, in_features)),
            TensorHeader(f"{module}.weight_scale", scale_dtype(dtype), (1,)),
            TensorHeader(f"{module}.input_scale", "F32", (1,)),
        )

    def fit(
        self,
        weights_OI: Sequence[torch.Tensor],
        *,
        search: Search,
        importance_I: torch.Tensor | None = None,
    ) -> list[Scales]:
        """See ``Scheme.fit``; all matrices get one scale [1], of the range."""
        import torch

        from compressor.schemes.ranges import range_scales, storage_dtype

        args = self.ct_scheme([]).weights
        assert args is not None
        ends = [end for weight_OI in weights_OI for end in weight_OI.aminmax()]
        low, high = torch.stack(ends).aminmax()
        shared = range_scales(low, high, args, dtype=storage_dtype(weights_OI[0]))
        return [shared] * len(weights_OI)

    def encode(self, weight_OI: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """See ``Scheme.encode``; extra memory beside the result: one chunk of rows."""
        tensors = super().encode(weight_OI, _for_rows(scales, len(weight_OI)))
        return tensors | {"weight_scale": scales.scale}

    def decode(self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int) -> torch.Tensor:
        """See ``Scheme.decode``; extra memory beside the result: one chunk of rows."""
        scale_O1 = tensors["weight_scale"].expand(out_features, 1)
        return super().decode(tensors | {"weight_scale": scale_O1}, out_features, in_features)

    def lattice(self, scales: Scales, out_features: int, in_features: int) -> Lattice:
        """See ``Scheme.lattice``."""
        return super().lattice(_for_rows(scales, out_features), out_features, in_features)

    def input_tensors(self, heard: InputRange) -> dict[str, torch.Tensor]:
        """See ``Scheme.input_tensors``."""
        import torch

        from compressor.numerics.input_ranges import best_e4m3_scale
        from compressor.schemes.inputs import checked

        return {"input_scale": torch.tensor([best_e4m3_scale(checked(heard))])}

    @property
    def _scales_are_free(self) -> bool:
        return False

    def _group(self, in_features: int) -> tuple[int, int]:
        return 1, in_features


def _for_rows(scales: Scales, rows: int) -> Scales:
    """The one scale, once for each row."""
    return replace(scales, scale=scales.scale.expand(rows, 1))
