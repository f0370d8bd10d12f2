"""What INT4 and INT8 weights packed into int32 words have in common.

Stored as compressed_tensors@0.19 compressors/pack_quantized/base.py. Legend: O out_features, I in_features,
B x C the groups as a matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compressor.schemes.grouped import GroupedScheme, scale_dtype
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from compressor.numerics.grids import Grid
    from compressor.schemes.base import Scales

GroupSize = Literal[128, 64, 32]
# Of two 4-bit scales less than about 1/32 apart, neither is worth a trial beside the other.
NEAR_RATIOS = (0.97, 1.03, 0.94, 1.06)
GROUP_SIZES: tuple[GroupSize, ...] = (128, 64, 32)


class PackedInt(GroupedScheme):
    """Weight-only integers of 4 or 8 bits, in groups along the rows or with a scale for each row."""

    group_size: GroupSize | None

    @property
    def _symmetric(self) -> bool:
        return True

    @property
    def _bits(self) -> Literal[4, 8]:
        raise NotImplementedError

    @property
    def _codes_name(self) -> str:
        return "weight_packed"

    def _group(self, in_features: int) -> tuple[int, int]:
        return 1, self.group_size or in_features

    def _near_ratios(self) -> tuple[float, ...]:
        return NEAR_RATIOS if self.group_size and self._bits == 4 else ()

    def _grid(self) -> Grid:
        from compressor.numerics.grids import INT4, INT8

        return INT4 if self._bits == 4 else INT8

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """``weight_packed`` I32 [O, I * bits / 32], ``weight_scale`` [O, C] in the model's dtype,
        ``weight_shape`` I64 [2], and ``weight_zero_point`` I32 [O * bits / 32, C] where asymmetric.
        """
        words = -(-in_features * self._bits // 32)
        groups = in_features // (self.group_size or in_features)
        headers = [
            TensorHeader(f"{module}.weight_packed", "I32", (out_features, words)),
            TensorHeader(f"{module}.weight_scale", scale_dtype(dtype), (out_features, groups)),
            TensorHeader(f"{module}.weight_shape", "I64", (2,)),
        ]
        if not self._symmetric:
            zero_words = -(-out_features * self._bits // 32)
            headers.append(TensorHeader(f"{module}.weight_zero_point", "I32", (zero_words, groups)))
        return tuple(headers)

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """Integers as the library's preset W4A16 or W8A16 describes them, with this group size."""
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        weights = QuantizationArgs(
            num_bits=self._bits,
            type="int",
            strategy="group" if self.group_size else "channel",
            group_size=self.group_size,
            symmetric=self._symmetric,
            dynamic=False,
        )
        return QuantizationScheme(targets=targets, weights=weights, format=CompressionFormat.pack_quantized)

    def _store(self, codes_OI: torch.Tensor) -> torch.Tensor:
        from compressor.numerics.packing import pack_int32

        return pack_int32(codes_OI, self._bits)

    def _load(self, stored: torch.Tensor, in_features: int) -> torch.Tensor:
        from compressor.numerics.packing import unpack_int32

        return unpack_int32(stored, self._bits, in_features)

    def _extras(self, shape: tuple[int, int], scales: Scales) -> dict[str, torch.Tensor]:
        import torch

        from compressor.numerics.packing import pack_int32

        extras = {"weight_shape": torch.tensor(shape, dtype=torch.int64)}
        if scales.zero_point is not None:
            extras["weight_zero_point"] = pack_int32(scales.zero_point, self._bits, dim=0)
        return extras

    def _load_zero_point(self, tensors: dict[str, torch.Tensor], out_features: int) -> torch.Tensor | None:
        from compressor.numerics.packing import unpack_int32

        if self._symmetric:
            return None
        return unpack_int32(tensors["weight_zero_point"], self._bits, out_features, dim=0).float()


def group_advice(in_features: int, group_size: int) -> str:
    """Which group size would divide ``in_features``, for ``Scheme.problem``; empty if none."""
    smaller = [size for size in GROUP_SIZES if size < group_size and in_features % size == 0]
    return f"use group_size: {smaller[0]}, or leave the matrix in 16 bit with ignore" if smaller else ""
