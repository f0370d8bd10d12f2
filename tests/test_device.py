"""Which device and dtype compute."""

from __future__ import annotations

import pytest
import torch

from compressor.device import device_name, fast_dtype, peak_device_bytes, pick_device, reset_peak, synchronize


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(
    abilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated bfloat16 is slower than float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert fast_dtype(torch.device("cpu")) is expected


def test_device_facts_agree() -> None:
    """The device picked exists, has a name, and its peak counts what was allocated on it alone."""
    device = pick_device()
    reset_peak()
    kept = torch.zeros(1 << 20, device=device)
    synchronize(device)
    assert device_name()
    assert (peak_device_bytes() >= kept.nbytes) is (device.type == "cuda")
