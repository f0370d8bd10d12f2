"""Attention over packed keys and values against attention over what the codecs decode.

On an NVIDIA GPU or in Triton's interpreter, where plain operations stand for the assembly.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from compressor.device import pick_device
from compressor.kv.formats import FORMATS
from tests.kernels.kv_cases import NAMES, packed

DEVICE = pick_device()

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in Triton's interpreter where there is no GPU."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def _attention(q_BHD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, scale: float) -> torch.Tensor:
    group = q_BHD.shape[1] // k_BHTD.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k_BHTD, v_BHTD))
    p = (torch.einsum("bhd,bhtd->bht", q_BHD.double(), k) * scale).softmax(-1)
    return torch.einsum("bht,bhtd->bhd", p, v)


def _error(name: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, capacity: int) -> float:
    """Relative error of the kernel on slots within a buffer of ``capacity`` tokens."""
    head_dim, length = query.shape[-1], keys.shape[2]
    made = FORMATS[name].make
    assert made is not None
    decoded, slots = [], []
    for codec, x in zip(made(), (keys, values), strict=True):
        packed_x = codec.encode(x)
        decoded.append(codec.decode(packed_x, head_dim, torch.float32))
        buffer = torch.full((*x.shape[:2], capacity, packed_x.shape[3]), 0xFF, dtype=torch.uint8)
        buffer[:, :, :length] = packed_x
        slots.append(buffer.to(DEVICE)[:, :, :length])
    scale = head_dim**-0.5
    twin = import_module("compressor.kernels.kv_decode_cuda")
    assert twin.problem(query.to(DEVICE), *slots, *packed(name, head_dim)) is None
    ours = twin.decode_attention(query.to(DEVICE), *slots, *packed(name, head_dim), scale).cpu()
    expected = _attention(query, *decoded, scale)
    return float((ours.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "head_dim,length,heads,kv_heads",
    [(128, 77, 8, 2), (64, 130, 3, 3), (128, 300, 16, 1)],
    ids=["part of a tile", "no groups, head_dim 64", "several runs, wide group"],
)
def test_decode(name: str, head_dim: int, length: int, heads: int, kv_heads: int) -> None:
    """As attention in fp64 over what the codecs decode, but for roundings.

    bf16 probabilities err by 2^-9 at most and independently, so about 1e-3 of a sum at the worst and less in
    the mean; fp16 queries and levels by 2^-11. A wrong place, shift or token errs by tenths.
    """
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, heads, head_dim, generator=generator)
    keys = torch.randn(2, kv_heads, length, head_dim, generator=generator) * 1.5
    values = torch.randn(2, kv_heads, length, head_dim, generator=generator) + 0.5
    assert _error(name, query, keys, values, capacity=length + 3) < 2e-3


def test_large_scores() -> None:
    """Queries beyond fp16, scores far apart: one token takes all."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(1, 4, 128, generator=generator) * 1e5
    keys = torch.randn(1, 1, 40, 128, generator=generator)
    values = torch.randn(1, 1, 40, 128, generator=generator) * 1e-3
    assert _error("turboquant_4bit_nc", query, keys, values, capacity=40) < 4e-3


def test_problems() -> None:
    """What the kernel does not take is said."""
    twin = import_module("compressor.kernels.kv_decode_cuda")
    keys, values = packed("turboquant_4bit_nc", 128)
    query, k, v = torch.zeros(1, 4, 128), *(torch.zeros(1, 2, 8, n, dtype=torch.uint8) for n in (66, 68))
    assert twin.problem(query, k, v, keys, values) is None
    assert "heads of 96" in twin.problem(query[..., :96], k, v, keys, values)
    assert "5 query heads" in twin.problem(torch.zeros(1, 5, 128), k, v, keys, values)
    assert "slots of 68" in twin.problem(query, v, v, keys, values)
    assert "affine keys" in twin.problem(query, v, v, values, values)
    assert "multiples of 4" in twin.problem(
        query,
        k[:, :, :6],
        torch.zeros(8 * 2 * 68 + 2, dtype=torch.uint8)[2:].view(1, 2, 8, 68)[:, :, :6],
        keys,
        values,
    )
