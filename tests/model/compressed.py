"""Compressed-tensors folders made by hand: random codes and scales, and the weights that they stand for.

Nothing here quantizes, and nothing decodes with the library: the expected weights follow from the codes as
the formats are defined.

Legend: O out_features, I in_features, G groups along I.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])

# Local name -> stored tensor, and the weight [O, I] in float64 that it means.
Made = tuple[dict[str, torch.Tensor], torch.Tensor]


def nvfp4(out: int, wide: int) -> Made:
    """Blocks of 16, E4M3 scales, one fp32 divisor."""
    codes_OI = torch.randint(16, (out, wide))
    scale_OG = (torch.rand(out, wide // 16) * 4 + 1).to(torch.float8_e4m3fn)
    divisor = torch.tensor([37.3])
    weight_OI = FP4_VALUES[codes_OI].double() * scale_OG.double().repeat_interleave(16, 1) / divisor.double()
    return {
        "weight_packed": (codes_OI[:, ::2] | codes_OI[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scale_OG,
        "weight_global_scale": divisor,
    }, weight_OI


def mxfp4(out: int, wide: int) -> Made:
    """Blocks of 32, power-of-two scales stored as exponents with bias 127."""
    codes_OI = torch.randint(16, (out, wide))
    exponent_OG = torch.randint(121, 125, (out, wide // 32))
    weight_OI = FP4_VALUES[codes_OI].double() * (2.0 ** (exponent_OG - 127).double()).repeat_interleave(32, 1)
    packed = (codes_OI[:, ::2] | codes_OI[:, 1::2] << 4).to(torch.uint8)
    return {"weight_packed": packed, "weight_scale": exponent_OG.to(torch.uint8)}, weight_OI


def int4(out: int, wide: int, *, symmetric: bool) -> Made:
    """Groups of 32, eight codes in an int32, first code lowest, stored with 8 added; zero points alike."""
    codes_OI = torch.randint(-8, 8, (out, wide))
    scale_OG = torch.rand(out, wide // 32) * 0.02 + 0.01
    zero_OG = torch.zeros(out, wide // 32) if symmetric else torch.randint(-8, 8, (out, wide // 32))
    weight_OI = (codes_OI - zero_OG.repeat_interleave(32, 1)).double()
    weight_OI = weight_OI * scale_OG.double().repeat_interleave(32, 1)
    tensors = {
        "weight_packed": _pack_int32(codes_OI + 8, 4),
        "weight_scale": scale_OG,
        "weight_shape": torch.tensor([out, wide]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = _pack_int32(zero_OG.T.long() + 8, 4).T.contiguous()
    return tensors, weight_OI


def int8_packed(out: int, wide: int) -> Made:
    """One scale a row, four codes in an int32, stored with 128 added."""
    codes_OI = torch.randint(-128, 128, (out, wide))
    scale_O1 = torch.rand(out, 1) * 0.002 + 0.001
    tensors = {
        "weight_packed": _pack_int32(codes_OI + 128, 8),
        "weight_scale": scale_O1,
        "weight_shape": torch.tensor([out, wide]),
    }
    return tensors, codes_OI.double() * scale_O1.double()


def int8(out: int, wide: int) -> Made:
    """One scale a row, plain int8."""
    codes_OI = torch.randint(-128, 128, (out, wide)).to(torch.int8)
    scale_O1 = torch.rand(out, 1) * 0.002 + 0.001
    return {"weight": codes_OI, "weight_scale": scale_O1}, codes_OI.double() * scale_O1.double()


def fp8(out: int, wide: int) -> Made:
    """One scale a row, plain E4M3."""
    codes_OI = (torch.randn(out, wide) * 60).to(torch.float8_e4m3fn)
    scale_O1 = torch.rand(out, 1) * 0.002 + 0.001
    return {"weight": codes_OI, "weight_scale": scale_O1}, codes_OI.double() * scale_O1.double()


def fp8_block(out: int, wide: int) -> Made:
    """One scale for each 128 x 128 block, the last ones smaller."""
    codes_OI = (torch.randn(out, wide) * 60).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-out // 128), -(-wide // 128)) * 0.002 + 0.001
    full = scale.double().repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :wide]
    return {"weight": codes_OI, "weight_scale": scale}, codes_OI.double() * full


def nvfp4_inputs(out: int, wide: int) -> Made:
    """NVFP4 with a divisor for the inputs as well."""
    tensors, weight_OI = nvfp4(out, wide)
    return tensors | {"input_global_scale": torch.tensor([64.0])}, weight_OI


def fp8_static(out: int, wide: int) -> Made:
    """One scale, and one for the inputs."""
    codes_OI = (torch.randn(out, wide) * 60).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.0015])
    tensors = {"weight": codes_OI, "weight_scale": scale, "input_scale": torch.tensor([0.0625])}
    return tensors, codes_OI.double() * scale.double()


# compressed_tensors' preset -> what makes one matrix of it.
FORMATS: dict[str, Callable[[int, int], Made]] = {
    "NVFP4A16": nvfp4,
    "NVFP4": nvfp4_inputs,
    "MXFP4A16": mxfp4,
    "W4A16": lambda out, wide: int4(out, wide, symmetric=True),
    "W4A16_ASYM": lambda out, wide: int4(out, wide, symmetric=False),
    "W8A16": int8_packed,
    "W8A8": int8,
    "FP8_DYNAMIC": fp8,
    "FP8_BLOCK": fp8_block,
    "FP8": fp8_static,
}


def compress_folder(source: Path, folder: Path, preset: str) -> dict[str, torch.Tensor]:
    """Copies ``source`` to ``folder`` with random quantized projections; returns the weights meant."""
    meant = {}

    def made(module: str, out: int, wide: int) -> dict[str, torch.Tensor]:
        tensors, meant[f"{module}.weight"] = FORMATS[preset](out, wide)
        return tensors

    replace_projections(source, folder, made, seed=1)
    write_quantization_config(folder, preset)
    return meant


def replace_projections(
    source: Path, folder: Path, make: Callable[[str, int, int], dict[str, torch.Tensor]], *, seed: int
) -> None:
    """Copies ``source`` to ``folder``; ``make(module, O, I)`` gives each projection's tensors by local name.

    Torch's generator starts at ``seed`` and is left as it was.
    """
    shutil.copytree(source, folder)
    stored = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in stored if name.endswith("_proj.weight")]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in modules:
            out, wide = stored.pop(f"{module}.weight").shape
            stored |= {f"{module}.{local}": tensor for local, tensor in make(module, out, wide).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def write_quantization_config(folder: Path, preset: str) -> None:
    """Adds the ``quantization_config`` of a preset, for all linear layers but the head, to config.json."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.strategy == "group" and scheme.weights.type == "int":
        scheme.weights.group_size = 32
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    described = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format.value,
        quantization_status="compressed",
        ignore=["lm_head", "re:.*router$"],
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = described.model_dump(mode="json")
    path.write_text(json.dumps(config))


def _pack_int32(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes along the last dimension, ``32 / bits`` in a word, the first in the lowest bits."""
    per_word = 32 // bits
    words = codes.reshape(*codes.shape[:-1], -1, per_word) << (torch.arange(per_word) * bits)
    return words.sum(-1).to(torch.uint32).view(torch.int32)
