"""Test-only vLLM plugin (0.32): formats without a usable CPU kernel are decoded when a model is loaded.

vLLM's own loader, parameter layout, sharding into fused matrices and scale handling run as on a GPU; only the
last step, the kernel, is replaced: weights are decoded by vLLM's reference functions and multiplied in the
model's dtype. It says nothing of GPU kernels. Nothing of the package under test is imported.

- NVFP4 linear layers, compressed-tensors and ModelOpt; FP4 activations through ``ref_nvfp4_quant_dequant``.
- MXFP4 linear layers, as weight-only: vLLM loads both sorts alike, and Marlin rounds no activations either.
- MXFP8 linear layers, through vLLM's own emulation.
- W8A16 linear layers of compressed-tensors, and W4A16 in shapes that the CPU kernel does not take.
- FP8 linear layers with a scale a row: vLLM quantizes the activations, and only ``torch._scaled_mm``, which
  takes seconds for one matrix on a CPU, is replaced by a product in float32.
- NVFP4 (weight-only) and FP8_DYNAMIC experts of compressed-tensors, one expert after the other.
- ModelOpt checkpoints in float32, in which agreement is exact.

With ``COMPRESSOR_SERVE_WEIGHT_ONLY=1`` no activation is rounded, and W8A8 is decoded too. Rounded activations
make log-probabilities chaotic: without them the weights can be compared to the last digit.

Found by vLLM through the entry point beside this file when this folder is in PYTHONPATH.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.kernels import (
    linear,
)
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearKernel, MxFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import Mxfp8LinearLayerConfig
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm import (
    pytorch as torch_fp8,
)
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization import (
    modelopt,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as ct_nvfp4_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as ct_fp8_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w4a4_mxfp4 as ct_mxfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w4a4_nvfp4 as ct_nvfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w8a8_mxfp8 as ct_mxfp8,
)
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    break_fp4_bytes,
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    unpack_quantized_values_into_int32,
)
from vllm.platforms import current_platform

WEIGHT_ONLY = os.environ.get("COMPRESSOR_SERVE_WEIGHT_ONLY") == "1"
NVFP4_BLOCK, MXFP4_BLOCK, E8M0_BIAS = 16, 32, 127


class _Everywhere:
    """A kernel for any device and layer, with decoded weights; mixed into vLLM's abstract kernels."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: object) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight = Parameter(self.decode(layer), requires_grad=False)

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(self.round_input(layer, x), layer.weight, bias)

    def round_input(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        return x


class EmulatedNvFp4(_Everywhere, NvFp4LinearKernel):
    def __init__(self, use_a16: bool) -> None:
        super().__init__(NvFp4LinearLayerConfig())
        self.use_a16 = use_a16 or WEIGHT_ONLY

    def decode(self, layer: torch.nn.Module) -> Tensor:
        return dequantize_to_dtype(
            layer.weight.data,
            layer.weight_scale.data,
            layer.weight_global_scale,
            layer.params_dtype,
            NVFP4_BLOCK,
            swizzle=False,
        )

    def round_input(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        if self.use_a16:
            return x
        rows = x.reshape(-1, x.shape[-1])
        return ref_nvfp4_quant_dequant(rows, layer.input_global_scale_inv, NVFP4_BLOCK).reshape(x.shape)


class EmulatedMxFp4(_Everywhere, MxFp4LinearKernel):
    def decode(self, layer: torch.nn.Module) -> Tensor:
        # vLLM's own reference needs amd-quark; the format is a value of E2M1 times a power of two.
        values = break_fp4_bytes(layer.weight.data, torch.float32)
        scale = torch.exp2(layer.weight_scale.data.to(torch.float32) - E8M0_BIAS)
        return (values * scale.repeat_interleave(MXFP4_BLOCK, dim=1)).to(layer.params_dtype)


class EmulatedWNA16(_Everywhere, MPLinearKernel):
    """Only where no kernel before it in vLLM's list takes the layer."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        assert not self.config.zero_points, "only symmetric weights"
        packed, scale, _ = self._get_weight_params(layer)
        codes = unpack_quantized_values_into_int32(packed.data, self.config.weight_type, packed_dim=1)
        values = (codes - self.config.weight_type.bias).to(torch.float32)
        group = values.shape[1] // scale.shape[1]
        weight = values * scale.data.to(torch.float32).repeat_interleave(group, dim=1)
        layer.weight = Parameter(weight.to(self.config.act_type), requires_grad=False)


def _fp8_product(
    self: torch_fp8.ChannelWiseTorchFP8ScaledMMLinearKernel,
    *,
    A: Tensor,
    B: Tensor,
    out_dtype: torch.dtype,
    As: Tensor,
    Bs: Tensor,
    bias: Tensor | None,
    output_shape: list[int],
) -> Tensor:
    """``apply_scaled_mm`` of the class, with ``torch._scaled_mm`` written out."""
    tokens = torch_fp8._get_num_tokens(output_shape)
    out = (A[:tokens].to(torch.float32) @ B.to(torch.float32)) * As[:tokens] * Bs.t()
    return (out if bias is None else out + bias).to(out_dtype).view(*output_shape)


def _fp8_weight_only(
    self: torch_fp8.ChannelWiseTorchFP8ScaledMMLinearKernel,
    layer: torch.nn.Module,
    x: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``apply_weights`` of the class without its activations; vLLM keeps these weights transposed."""
    weight, scale, _, _ = self._get_layer_params(layer)
    return F.linear(x, (weight.t().to(torch.float32) * scale.reshape(-1, 1)).to(x.dtype), bias)


class Int8WeightOnly(_Everywhere, Int8ScaledMMLinearKernel):
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight, scale, *_ = self._get_layer_params(layer)
        self.weight = weight.data.to(torch.float32) * scale.data

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), bias)


def _nvfp4_kernel(use_a16: bool = False) -> EmulatedNvFp4:
    return EmulatedNvFp4(use_a16)


def _mxfp4_kernel(activation_quant_key: object = None) -> EmulatedMxFp4:
    return EmulatedMxFp4(MxFp4LinearLayerConfig())


def _mxfp8_kernel(
    *, weight_shape: tuple[int, int], bmm_batch_size: int | None = None
) -> EmulationMxfp8LinearKernel:
    return EmulationMxfp8LinearKernel(Mxfp8LinearLayerConfig(weight_shape, bmm_batch_size))


class _EmulatedExperts:
    """Experts in the model's dtype; ``decode`` replaces the weights, ``round_input`` the activations."""

    is_monolithic = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.decode(layer)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        return None

    def apply(
        self,
        layer: torch.nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The sum over each token's experts; the runner adds shared experts itself."""
        assert layer.activation == MoEActivation.SILU
        out = torch.zeros_like(x)
        for expert in topk_ids.unique().tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            weight = topk_weights[token, slot, None].to(x.dtype)
            rows = x[token] * weight if layer.apply_router_weight_on_input else x[token]
            gate, up = F.linear(self.round_input(rows), layer.w13_weight[expert]).chunk(2, dim=-1)
            down = F.linear(self.round_input(F.silu(gate) * up), layer.w2_weight[expert])
            out.index_add_(0, token, down if layer.apply_router_weight_on_input else down * weight)
        return out


class EmulatedNvFp4Experts(_EmulatedExperts, ct_nvfp4_moe.CompressedTensorsW4A4Nvfp4MoEMethod):
    def __init__(self, moe: object, layer_name: str | None = None, use_a16: bool = False) -> None:
        assert use_a16, "FP4 activations of experts are not emulated"
        super().__init__(moe, layer_name, use_a16)

    def decode(self, layer: torch.nn.Module) -> None:
        for name, divisor in (
            ("w13", layer.w13_weight_global_scale[:, 0]),
            ("w2", layer.w2_weight_global_scale),
        ):
            packed = getattr(layer, f"{name}_weight_packed").data
            scale = getattr(layer, f"{name}_weight_scale").data
            weight = dequantize_to_dtype(
                packed, scale, 1.0 / divisor, layer.params_dtype, NVFP4_BLOCK, swizzle=False
            )
            delattr(layer, f"{name}_weight_packed")
            layer.register_parameter(f"{name}_weight", Parameter(weight, requires_grad=False))

    def round_input(self, x: Tensor) -> Tensor:
        return x


class EmulatedFp8Experts(_EmulatedExperts, ct_fp8_moe.CompressedTensorsW8A8Fp8MoEMethod):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        assert self.weight_block_size is None, "only FP8_DYNAMIC"
        assert not self.static_input_scales, "only FP8_DYNAMIC"
        self.quantize = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)

    def decode(self, layer: torch.nn.Module) -> None:
        for name in ("w13", "w2"):
            values = getattr(layer, f"{name}_weight").data.to(torch.float32)
            weight = values * getattr(layer, f"{name}_weight_scale").data
            layer.register_parameter(
                f"{name}_weight", Parameter(weight.to(layer.orig_dtype), requires_grad=False)
            )

    def round_input(self, x: Tensor) -> Tensor:
        if WEIGHT_ONLY:
            return x
        values, scale = self.quantize.forward_native(x)
        return (values.to(torch.float32) * scale).to(x.dtype)


def register() -> None:
    """Puts the emulations in the place of vLLM's choice of a kernel; may be called again."""
    for module in (ct_nvfp4, modelopt):
        module.init_nvfp4_linear_kernel = _nvfp4_kernel
    for module in (ct_mxfp8, modelopt):
        module.init_mxfp8_linear_kernel = _mxfp8_kernel
    ct_mxfp4.init_mxfp4_linear_kernel = _mxfp4_kernel
    linear.register_linear_kernel(EmulatedWNA16, current_platform._enum, "mp")
    if current_platform.is_cpu():
        torch_fp8.ChannelWiseTorchFP8ScaledMMLinearKernel.apply_scaled_mm = _fp8_product
    if WEIGHT_ONLY:
        torch_fp8.ChannelWiseTorchFP8ScaledMMLinearKernel.apply_weights = _fp8_weight_only
        linear._POSSIBLE_INT8_KERNELS[current_platform._enum] = [Int8WeightOnly]
    for config in (modelopt.ModelOptFp8Config, modelopt.ModelOptNvFp4Config):
        config.get_supported_act_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
    no_kernel = SimpleNamespace(is_monolithic=lambda: False)
    ct_nvfp4_moe.select_nvfp4_moe_backend = lambda **_: (ct_nvfp4_moe.NvFp4MoeBackend.EMULATION, no_kernel)
    ct_fp8_moe.select_fp8_moe_backend = lambda **_: (None, no_kernel)
    ct_nvfp4_moe.CompressedTensorsW4A4Nvfp4MoEMethod = EmulatedNvFp4Experts
    ct_fp8_moe.CompressedTensorsW8A8Fp8MoEMethod = EmulatedFp8Experts
