"""NVFP4: E2M1 values in blocks of 16, an E4M3 scale a block, an fp32 scale for the whole tensor.

Stored as compressed_tensors@0.19 compressors/nvfp4/base.py: the scale of a block is its E4M3 value divided by
``weight_global_scale``. Legend: O out_features, I in_features, C = I / 16 blocks in a row, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from compressor.schemes.base import Arithmetic, FreeScales, Scales, Scheme, Search, indivisible
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from compressor.numerics.input_ranges import InputRange
    from compressor.numerics.lattice import Lattice

BLOCK = 16
# How many E4M3 codes away the scales are that ``near`` gives: one code is 6 to 13 percent.
NEAR_STEPS = (-1, 1, -2, 2)


class Nvfp4A16(Scheme):
    """Weight-only NVFP4; matrices that the engine fuses share the tensor-level scale."""

    kind: Literal["nvfp4a16"] = "nvfp4a16"

    @property
    def label(self) -> str:
        """See ``Scheme.label``."""
        return "NVFP4A16"

    @property
    def shares_tensor_scale(self) -> bool:
        """See ``Scheme.shares_tensor_scale``."""
        return True

    def problem(self, out_features: int, in_features: int, *, fused: bool) -> str | None:
        """See ``Scheme.problem``."""
        return indivisible(out_features, in_features, BLOCK, "block of NVFP4")

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """``weight_packed`` U8 [O, I/2], ``weight_scale`` F8_E4M3 [O, C], ``weight_global_scale`` F32 [1]."""
        return (
            TensorHeader(f"{module}.weight_packed", "U8", (out_features, in_features // 2)),
            TensorHeader(f"{module}.weight_scale", "F8_E4M3", (out_features, in_features // BLOCK)),
            TensorHeader(f"{module}.weight_global_scale", "F32", (1,)),
        )

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """The library's preset of the same name."""
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.label, targets)
        scheme.format = CompressionFormat.nvfp4_pack_quantized
        return scheme

    def fit(
        self,
        weights_OI: Sequence[torch.Tensor],
        *,
        search: Search,
        importance_I: torch.Tensor | None = None,
    ) -> list[Scales]:
        """See ``Scheme.fit``; all matrices get one tensor-level scale. Scales are fp32 [O, C]."""
        from compressor.schemes.nvfp4_fit import fit_full, fit_minmax

        if search == "full":
            return fit_full(weights_OI, importance_I)
        args = self.ct_scheme([]).weights
        assert args is not None
        return fit_minmax(weights_OI, args)

    def encode(self, weight_OI: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """See ``Scheme.encode``; extra memory beside the result: one chunk of rows."""
        import torch

        from compressor.numerics.fp4 import pack_nibbles
        from compressor.numerics.fp8 import to_e4m3
        from compressor.numerics.grids import E2M1
        from compressor.schemes.group_codes import encode_chunks

        assert scales.global_scale is not None, "NVFP4 scales come with a tensor-level scale"
        effective = Scales(scales.scale.float() / scales.global_scale)
        chunks = encode_chunks(weight_OI, effective, (1, BLOCK), E2M1)
        return {
            "weight_packed": torch.cat([pack_nibbles(codes_OI) for codes_OI in chunks]),
            "weight_scale": to_e4m3(scales.scale.float()),
            "weight_global_scale": scales.global_scale,
        }

    def decode(self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int) -> torch.Tensor:
        """See ``Scheme.decode``; extra memory beside the result: one chunk of rows."""
        import torch

        from compressor.numerics.fp4 import unpack_nibbles
        from compressor.numerics.grids import E2M1
        from compressor.numerics.groups import row_chunks
        from compressor.schemes.group_codes import decode_rows

        packed = tensors["weight_packed"]
        scale_OC = tensors["weight_scale"].float() / tensors["weight_global_scale"]
        weight_OI = torch.empty(out_features, in_features, device=packed.device)
        for rows in row_chunks(out_features, in_features):
            codes_OI = unpack_nibbles(packed[rows])
            weight_OI[rows] = decode_rows(codes_OI, scale_OC[rows], None, (1, BLOCK), E2M1)
        return weight_OI

    def scales(self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int) -> Scales:
        """See ``Scheme.scales``."""
        return Scales(tensors["weight_scale"].float(), global_scale=tensors["weight_global_scale"])

    def free_scales(
        self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int
    ) -> FreeScales | None:
        """See ``Scheme.free_scales``: the E4M3 scales; the tensor-level one stays."""
        import torch

        scale_OC, shared = tensors["weight_scale"], tensors["weight_global_scale"]
        ones = {"weight_scale": torch.ones_like(scale_OC, dtype=torch.float32)}
        ones["weight_global_scale"] = torch.ones_like(shared)
        units_OI = self.decode(tensors | ones, out_features, in_features)
        return FreeScales(units_OI, scale_OC, (1, BLOCK), divisor=shared)

    def lattice(self, scales: Scales, out_features: int, in_features: int) -> Lattice:
        """See ``Scheme.lattice``."""
        import torch

        from compressor.numerics.grids import E2M1
        from compressor.numerics.lattice import Lattice

        assert scales.global_scale is not None, "NVFP4 scales come with a tensor-level scale"
        scale_OC = scales.scale.float() / scales.global_scale
        return Lattice(E2M1, scale_OC, torch.zeros_like(scale_OC))

    def near(self, scales: Scales, in_features: int) -> list[Scales]:
        """See ``Scheme.near``: the neighbouring E4M3 codes."""
        import torch

        from compressor.numerics.fp8 import E4M3_CODES, e4m3_ladder, to_e4m3

        ladder = e4m3_ladder(scales.scale.device)
        codes_OC = to_e4m3(scales.scale.float()).view(torch.uint8).to(torch.int32)
        steps = [ladder[(codes_OC + step).clamp(1, E4M3_CODES)] for step in NEAR_STEPS]
        return [scales, *(Scales(scale_OC, global_scale=scales.global_scale) for scale_OC in steps)]


class Nvfp4(Nvfp4A16):
    """NVFP4 weights and inputs: engines round blocks of 16 inputs under a tensor-level scale that is stored.

    The scale is a divisor as the weights' is: a block's E4M3 scale is its largest value / 6 times it. vLLM
    0.32 keeps the widest range of a MoE layer's experts (fused_moe/oracle/nvfp4.py), but the *narrowest* of
    linear layers that it fuses (compressed_tensors_w4a4_nvfp4.py): these read the same input and must be
    given the same range.
    """

    kind: Literal["nvfp4"] = "nvfp4"  # type: ignore[assignment]

    @property
    def label(self) -> str:
        """See ``Scheme.label``."""
        return "NVFP4"

    @property
    def arithmetic(self) -> Arithmetic:
        """See ``Scheme.arithmetic``."""
        return "fp4"

    @property
    def static_inputs(self) -> bool:
        """See ``Scheme.static_inputs``."""
        return True

    def outputs(
        self, module: str, out_features: int, in_features: int, *, dtype: str = "BF16"
    ) -> tuple[TensorHeader, ...]:
        """As NVFP4A16, and ``input_global_scale`` F32 [1]."""
        weight = super().outputs(module, out_features, in_features, dtype=dtype)
        return (*weight, TensorHeader(f"{module}.input_global_scale", "F32", (1,)))

    def input_tensors(self, heard: InputRange) -> dict[str, torch.Tensor]:
        """See ``Scheme.input_tensors``; a power of two."""
        import torch

        from compressor.numerics.input_ranges import best_nvfp4_scale
        from compressor.schemes.inputs import checked

        return {"input_global_scale": torch.tensor([best_nvfp4_scale(checked(heard))])}
