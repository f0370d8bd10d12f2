"""Packed keys and values against the codecs on the CPU: the same bytes.

On an NVIDIA GPU or in Triton's interpreter.
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


def _rows(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal heads with outliers, a row of zeros, one of equal values, one of tiny ones."""
    x = torch.randn(2, 3, 9, head_dim, generator=torch.Generator().manual_seed(head_dim))
    x[:, 1, :, 3] *= 30
    x[0, 0, 0] = 0.0
    x[0, 0, 1] = 1.25
    x[0, 0, 2] *= 1e-6
    return x.to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes(name: str, head_dim: int, dtype: torch.dtype) -> None:
    """Equal to the codecs', for keys and for values."""
    made = FORMATS[name].make
    assert made is not None
    x = _rows(head_dim, dtype)
    for codec, side in zip(made(), packed(name, head_dim), strict=True):
        if side.kind != "e4m3":
            ours = import_module("compressor.kernels.kv_store_cuda").encode(x.to(DEVICE), side).cpu()
            assert torch.equal(ours, codec.encode(x)), side.kind
