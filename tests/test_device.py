"""Which device and dtype compute."""

from __future__ import annotations

import pytest
import torch

from compressor import device


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "amx_bf16"}, torch.bfloat16),
        ({"avx512_bf16"}, torch.bfloat16),
        ({"avx2", "avx512f"}, torch.float32),
        (set(), torch.float32),
    ],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(
    flags: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated bfloat16 is slower than float32."""
    monkeypatch.setattr(device, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    assert device.fast_dtype(torch.device("cpu")) is expected
    assert device.has_fast_bfloat16() is (expected is torch.bfloat16)


def test_flags_are_torchs() -> None:
    """What the kernel says of bfloat16 is what torch finds out."""
    able = torch.cpu.get_capabilities()
    assert bool(able.get("amx_bf16") or able.get("avx512_bf16")) == bool(
        device._cpu_flags() & device._BF16_FLAGS
    )


def test_device_facts_agree() -> None:
    """The device picked exists, has a name, and its peak counts what was allocated on it alone."""
    picked = device.pick_device()
    device.reset_peak()
    kept = torch.zeros(1 << 20, device=picked)
    device.synchronize(picked)
    assert device.device_name()
    assert (device.peak_device_bytes() >= kept.nbytes) is (picked.type == "cuda")
    assert device.has_accelerator() is (picked.type == "cuda")
