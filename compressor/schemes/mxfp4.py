"""MXFP4: E2M1 weights in groups of 32 with power-of-two (E8M0) scales.

Open Compute Project, Microscaling formats 1.0; stored as compressed_tensors@0.19 compressors/mxfp4/base.py.
Legend: O out_features, I in_features, G = I / 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compressor.schemes.base import Arithmetic, indivisible
from compressor.schemes.grouped import GroupedScheme, Ratios
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from compressor.numerics.grids import Grid

GROUP = 32


class Mxfp4(GroupedScheme):
    """MXFP4 weights; the engine leaves activations alone or rounds them to MXFP4 as it goes.

    The full search tries the neighbouring powers of two of the one that the library's rule takes.
    """

    kind: Literal["mxfp4"] = "mxfp4"
    activations: Literal["none", "dynamic"] = "none"

    @property
    def label(self) -> str:
        """See ``Scheme.label``."""
        return "MXFP4A16" if self.activations == "none" else "MXFP4"

    @property
    def arithmetic(self) -> Arithmetic:
        """See ``Scheme.arithmetic``."""
        return "bf16" if self.activations == "none" else "fp4"

    def problem(self, out_features: int, in_features: int, *, fused: bool) -> str | None:
        """See ``Scheme.problem``."""
        return indivisible(out_features, in_features, GROUP, "group of MXFP4")

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """``weight_packed`` U8 [O, I/2], ``weight_scale`` U8 [O, G] (biased exponents)."""
        return (
            TensorHeader(f"{module}.weight_packed", "U8", (out_features, in_features // 2)),
            TensorHeader(f"{module}.weight_scale", "U8", (out_features, in_features // GROUP)),
        )

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """The library's preset MXFP4A16 or MXFP4."""
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.label, targets)
        scheme.format = CompressionFormat.mxfp4_pack_quantized
        return scheme

    @property
    def _codes_name(self) -> str:
        return "weight_packed"

    def _group(self, in_features: int) -> tuple[int, int]:
        return 1, GROUP

    def _grid(self) -> Grid:
        from compressor.numerics.grids import E2M1

        return E2M1

    def _ratios(self) -> Ratios:
        return Ratios((0.5, 2.0))

    @property
    def _scales_are_free(self) -> bool:
        return False

    def _near_ratios(self) -> tuple[float, ...]:
        return 0.5, 2.0

    def _store(self, codes_OI: torch.Tensor) -> torch.Tensor:
        from compressor.numerics.fp4 import pack_nibbles

        return pack_nibbles(codes_OI)

    def _load(self, stored: torch.Tensor, in_features: int) -> torch.Tensor:
        from compressor.numerics.fp4 import unpack_nibbles

        return unpack_nibbles(stored)

    def _store_scale(self, scale_BC: torch.Tensor) -> torch.Tensor:
        from compressor.numerics.mx import e8m0_codes

        return e8m0_codes(scale_BC)

    def _load_scale(self, stored: torch.Tensor) -> torch.Tensor:
        from compressor.numerics.mx import e8m0_values

        return e8m0_values(stored)
