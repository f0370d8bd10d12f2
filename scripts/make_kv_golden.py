"""Makes ``tests/kv/golden_vllm.safetensors``: keys and values, and the bytes that vLLM's own kernels store.

Run with the interpreter that has vLLM 0.32 (scripts/serve_env.sh), the root of the repository being the
working folder:

    .venv-serve/bin/python scripts/make_kv_golden.py            # writes the file
    .venv-serve/bin/python scripts/make_kv_golden.py --compare  # counts bytes that differ from the file

Where vLLM is not installed, ``--sources FOLDER`` takes its kernels from files alone: see
scripts/vllm_kernels_alone.py. On a machine with an NVIDIA GPU the kernels run there, otherwise in Triton's
interpreter on the CPU. The interpreter's own cast of fp32 to e4m3 drops carries, ties and saturation; it is
replaced by the cast of the GPU's instruction ``cvt.rn.satfinite.e4m3x2.f32``. Nothing else of vLLM or Triton
is changed. On a GPU a few bytes may differ: Triton divides fp32 approximately there, norms and rotations go
through cuBLAS, and the transform of int4 through bf16 tensor cores.

Legend: T tokens, H KV heads, D head_dim, S bytes of a slot.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm_kernels_alone import install

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
GOLDEN = Path(__file__).resolve().parent.parent / "tests/kv/golden_vllm.safetensors"
HEAD_DIMS = (64, 128, 256)
HEADS = 2
PLAIN = 8  # random tokens; those after them are edge cases
TIED = slice(8, 12)  # keys that are rotated onto boundaries: what a BLAS makes of them is stored too
BLOCK = 16
PRESETS = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")


def main() -> None:
    """Writes or compares the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", action="store_true", help="count the bytes that differ from the file")
    parser.add_argument("--sources", type=Path, help="folder of vLLM's sources, where it is not installed")
    asked = parser.parse_args()
    if not ON_GPU:
        _use_interpreter()
    if asked.sources:
        install(asked.sources)
    import triton
    import vllm

    tensors: dict[str, torch.Tensor] = {}
    for head_dim in HEAD_DIMS:
        tensors |= {f"{head_dim}/{name}": tensor.cpu() for name, tensor in _of(head_dim).items()}
    if asked.compare:
        return _compare(tensors)
    metadata = {"vllm": vllm.__version__, "triton": triton.__version__, "torch": torch.__version__}
    metadata["ran_on"] = torch.cuda.get_device_name() if ON_GPU else "triton interpreter, e4m3 cast replaced"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, GOLDEN, metadata)
    print(f"{GOLDEN}: {len(tensors)} tensors, {GOLDEN.stat().st_size} bytes, {metadata}")
    return None


def _compare(tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        print(f"file: {file.metadata()}")
        for name, tensor in tensors.items():
            known = file.get_tensor(name)
            if tensor.dtype == torch.uint8:
                print(f"{name}: {int((tensor != known).sum())} of {tensor.numel()} bytes differ")
            else:
                gap = (tensor.float() - known.float()).nan_to_num(0).abs().max().item()
                print(f"{name}: largest difference {gap:.3g}")


def _use_interpreter() -> None:
    """Triton's interpreter, which vLLM's CPU build would not take for a backend, with a true e4m3 cast."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from triton import language as tl
    from triton.runtime import interpreter

    plain: Callable[..., Any] = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return plain(data, source, target, rounding)
        exact = torch.from_numpy(data.copy()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return exact.view(torch.uint8).numpy()

    interpreter._convert_float = convert


def inputs(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 keys and values [T, H, D]: random tokens, then zeros, constants, outliers, ties, tiny and huge."""
    generator = torch.Generator().manual_seed(head_dim)

    def normal() -> torch.Tensor:
        return torch.randn(HEADS, head_dim, generator=generator)

    tokens = [[normal() * 2.0 ** (step - 2), normal() * 2.0 ** (step - 3)] for step in range(PLAIN)]
    outlier = normal()
    outlier[:, 3] = 300.0
    # The range is 15 (or 7) whole steps, so that halves lie between two codes.
    halves = (torch.arange(head_dim) % 31 / 2).expand(HEADS, -1)
    signs = torch.ones(HEADS, head_dim)
    signs[:, head_dim // 2 :] = -1.0
    tokens += [
        [torch.zeros(HEADS, head_dim), torch.zeros(HEADS, head_dim)],
        [torch.ones(HEADS, head_dim), torch.full((HEADS, head_dim), -2.5)],  # rotated: zeros, a boundary
        [signs * 3.0, halves],
        [halves - 7.5, (torch.arange(head_dim) % 15 / 2 - 3.5).expand(HEADS, -1)],
        [outlier, outlier.flip(1)],
        [normal() * 1e-3, normal() * 1e-3],
        [normal() * 1e-7, normal() * 1e-9],
        [normal() * 300.0, normal() * 300.0],
        [normal() * 3e4, normal() * 3e4],
    ]
    keys, values = zip(*tokens, strict=True)
    return torch.stack(keys).bfloat16().to(DEVICE), torch.stack(values).bfloat16().to(DEVICE)


def _of(head_dim: int) -> dict[str, torch.Tensor]:
    key, value = inputs(head_dim)
    query = torch.randn(1, 2 * HEADS, head_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = {"key": key, "value": value, "query": query}
    for preset in PRESETS:
        stored = _turboquant(preset, key, value, query.to(DEVICE))
        found |= {f"{preset}/{name}": tensor for name, tensor in stored.items()}
    for name in ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"):
        stored = _per_token_head(name, key, value, query.to(DEVICE))
        found |= {f"{name}/{side}": tensor for side, tensor in stored.items()}
    return found


def _turboquant(
    preset: str, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Slots [T, H, S], what is read of them, and the rotated keys that the store kernel was given."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops import triton_turboquant_decode as reading
    from vllm.v1.attention.ops import triton_turboquant_store as storing

    tokens, heads, head_dim = key.shape
    config = TurboQuantConfig.from_cache_dtype(preset, head_dim)
    rotation = _hadamard(head_dim)
    levels = get_centroids(head_dim, config.centroid_bits).to(DEVICE)
    blocks = -(-tokens // BLOCK)
    cache = torch.zeros(blocks, BLOCK, heads, config.slot_size_aligned, dtype=torch.uint8, device=DEVICE)
    heard = _Heard(storing._tq_fused_store_mse)
    storing._tq_fused_store_mse = heard
    storing.triton_turboquant_store(
        key,
        value,
        cache,
        torch.arange(tokens, dtype=torch.int32, device=DEVICE),
        rotation,
        (levels[:-1] + levels[1:]) / 2,
        config.key_mse_bits,
        config.key_packed_size,
        config.effective_value_quant_bits,
        key_fp8=config.key_fp8,
    )
    storing._tq_fused_store_mse = heard.kernel
    table = torch.arange(blocks, dtype=torch.int32, device=DEVICE)[None]
    key_read = torch.zeros(1, heads, tokens, head_dim, dtype=torch.float16, device=DEVICE)
    value_read = torch.zeros_like(key_read)
    reading._tq_full_dequant_kv[(tokens, heads)](
        cache,
        table,
        levels,
        key_read,
        value_read,
        *key_read.stride()[:3],
        *value_read.stride()[:3],
        *cache.stride()[:3],
        table.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=BLOCK,
        NUM_KV_HEADS=heads,
        MSE_BYTES=head_dim * config.key_mse_bits // 8,
        KPS=config.key_packed_size,
        VQB=config.effective_value_quant_bits,
        VAL_DATA_BYTES=head_dim * config.effective_value_quant_bits // 8,
        MSE_BITS=config.key_mse_bits,
        KEY_FP8=int(config.key_fp8),
        BLOCK_D=head_dim,
        NORM_CORRECTION=int(config.norm_correction),
    )
    attended = reading.triton_turboquant_decode_attention(
        query.float(),
        cache,
        table,
        torch.tensor([PLAIN], dtype=torch.int32, device=DEVICE),
        rotation,
        levels,
        head_dim**-0.5,
        config.mse_bits,
        config.key_packed_size,
        config.effective_value_quant_bits,
        key_fp8=config.key_fp8,
        norm_correction=config.norm_correction,
        max_num_kv_splits=2,
    )
    found = {"slots": cache.flatten(0, 1)[:tokens], "attention": attended}
    if head_dim == HEAD_DIMS[0] and preset != "turboquant_k3v4_nc":  # the file stays small
        found |= {"key_read": key_read[0].transpose(0, 1), "value_read": value_read[0].transpose(0, 1)}
    if preset in ("turboquant_4bit_nc", "turboquant_3bit_nc"):
        found["levels"] = levels
    if preset == "turboquant_4bit_nc":  # the same for all presets
        rotated, norms = (given.view(tokens, heads, -1)[TIED] for given in heard.arguments[:2])
        found |= {"rotated": rotated, "norm": norms}
    return found


def _hadamard(head_dim: int) -> torch.Tensor:
    """As ``v1/attention/backends/turboquant_attn.py`` builds it: Sylvester's matrix / sqrt(D)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < head_dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix / math.sqrt(head_dim)).to(DEVICE)


class _Heard:
    """A Triton kernel that remembers its last arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: tuple[Any, ...] = ()

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.arguments = arguments
            return self.kernel[grid](*arguments, **constants)

        return launch


def _per_token_head(
    name: str, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Slots [T, H, S] of keys and of values: codes, then the scale; for int4 attention as for the presets."""
    from vllm.v1.attention.ops import int4_per_token_head as reading
    from vllm.v1.attention.ops import triton_reshape_and_cache_flash as storing
    from vllm.v1.kv_cache_interface import KVQuantMode

    tokens, heads, head_dim = key.shape
    dtype = {"int8": torch.int8, "fp8_": torch.float8_e4m3fn, "int4": torch.uint8}[name[:4]]
    width = head_dim // 2 if dtype == torch.uint8 else head_dim
    blocks = -(-tokens // BLOCK)
    codes = [torch.zeros(blocks, BLOCK, heads, width, device=DEVICE).to(dtype) for _ in range(2)]
    scales = [torch.zeros(blocks, BLOCK, heads, device=DEVICE) for _ in range(2)]
    storing.triton_reshape_and_cache_flash_per_token_head_quant(
        key,
        value,
        *codes,
        *scales,
        torch.arange(tokens, device=DEVICE),
        KVQuantMode[name.upper()],
    )
    pairs = zip(codes, scales, strict=True)
    slots = [
        torch.cat((code.view(torch.uint8), scale[..., None].view(torch.uint8)), -1) for code, scale in pairs
    ]
    found = {side: both.flatten(0, 1)[:tokens] for side, both in zip(("key", "value"), slots, strict=True)}
    if dtype != torch.uint8:
        return found
    attended = torch.zeros_like(query, dtype=torch.float32)
    reading.unified_attention_int4(
        query.float(),
        *codes,
        attended,
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        max_seqlen_q=1,
        seqused_k=torch.tensor([PLAIN], dtype=torch.int32, device=DEVICE),
        max_seqlen_k=PLAIN,
        softmax_scale=head_dim**-0.5,
        window_size=(-1, -1),
        block_table=torch.arange(blocks, dtype=torch.int32, device=DEVICE)[None],
        softcap=0.0,
        sinks=None,
        alibi_slopes=None,
        use_alibi_sqrt=False,
        qq_bias=None,
        output_scale=None,
        mm_prefix_range=None,
        k_scale_cache=scales[0],
        v_scale_cache=scales[1],
    )
    return found | {"attention": attended}


if __name__ == "__main__":
    main()
