"""Every built-in scheme with its options, and matrices to store in them."""

from __future__ import annotations

import torch

from compressor.numerics.input_ranges import InputRange, RangeSums
from compressor.schemes import parse_scheme
from compressor.schemes.base import Scheme

SPELLINGS: list[dict[str, object]] = [
    {"kind": "nvfp4a16"},
    {"kind": "nvfp4"},
    {"kind": "mxfp4"},
    {"kind": "mxfp4", "activations": "dynamic"},
    {"kind": "fp8_dynamic"},
    {"kind": "fp8_block"},
    {"kind": "fp8_static"},
    *(
        {"kind": "int4", "group_size": size, "symmetric": sym}
        for size in (128, 64, 32)
        for sym in (True, False)
    ),
    {"kind": "int8"},
    *({"kind": "int8", "group_size": size} for size in (128, 64, 32)),
    {"kind": "int8", "activations": "dynamic"},
]
SCHEMES: list[Scheme] = [parse_scheme(spelling) for spelling in SPELLINGS]
LABELS = [scheme.label for scheme in SCHEMES]


def matrices() -> dict[str, torch.Tensor]:
    """Name -> weights [O, I] with I a multiple of 128."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(136, 256, generator=generator) * 0.02
    mixed[3] = 0
    mixed[4] = 1.5
    mixed[5] *= 1e-4
    mixed[7, :128] = 0
    mixed[9, :6] = torch.tensor([0.0, -0.0, 1e-8, -1e-8, 3.0, -3.0])
    mixed[11] = mixed[11].abs()
    tails = torch.randn(128, 128, generator=generator) / torch.rand(128, 128, generator=generator)
    return {
        "mixed bf16": mixed.bfloat16(),
        "tails bf16": tails.clamp(-50, 50).bfloat16(),
        "fp16": torch.randn(128, 128, generator=generator).half(),
        "fp32": torch.randn(128, 128, generator=generator),
        "transposed": torch.randn(128, 136, generator=generator).bfloat16().T,
        "tiny": (torch.randn(128, 128, generator=generator) * 1e-38).bfloat16(),
        "huge": (torch.randn(128, 128, generator=generator) * 1e36).bfloat16(),
        "largest": (torch.randn(128, 128, generator=generator) * 1e38).clamp(-3.3e38, 3.3e38).bfloat16(),
        "zero": torch.zeros(128, 128, dtype=torch.bfloat16),
    }


def applicable(scheme: Scheme, weight: torch.Tensor) -> bool:
    """Whether the scheme takes a matrix of this shape."""
    return scheme.problem(weight.shape[0], weight.shape[1], fused=False) is None


def hard_inputs() -> torch.Tensor:
    """fp32 [N, I] with zeros, an outlier, ties of both grids and a row that is next to nothing."""
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(70, 256, generator=generator) * torch.rand(70, 1, generator=generator) * 4
    x_NI[3] = 0
    x_NI[5] = 1e-20
    x_NI[7, :16] = 0
    x_NI[9, 4] = 900.0
    x_NI[11] = torch.arange(256) / 4 - 20
    x_NI[12] = torch.tensor(
        [0.25, -0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -6.0, 0.0, -0.0, 448, 464, 17, 19]
    ).repeat(16)
    return x_NI


def wild_inputs() -> torch.Tensor:
    """``hard_inputs`` with zeros below 0, next to nothing beside ordinary values, and what is not finite."""
    x_NI = hard_inputs()
    x_NI[13] = -0.0
    x_NI[14, :7] = torch.tensor([-1e-30, 1e-30, -1e-45, -1e-5, 1e-3, -1e-2, 2e-3])
    x_NI[20, 3], x_NI[21, 100], x_NI[22, 7] = float("nan"), float("inf"), -float("inf")
    return x_NI


def some_range(x_NI: torch.Tensor) -> InputRange:
    """What calibration hears of these inputs alone."""
    sums = RangeSums(x_NI.shape[1], "cpu")
    sums.add(x_NI)
    return sums.result()
