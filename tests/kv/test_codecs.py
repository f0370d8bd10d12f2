"""What every codec promises, for the keys and the values of every format."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from compressor.device import pick_device
from compressor.kv.base import KvCodec
from compressor.kv.formats import FORMATS

# Largest relative error of Gaussian keys and values, |decoded - x| / |x|, with a tenth to spare.
ERRORS = {
    "bf16": 0.002,
    "fp8": 0.03,
    "fp8_per_token_head": 0.03,
    "int8_per_token_head": 0.008,
    "int4_per_token_head": 0.12,
    "nvfp4": 0.11,
    "nvfp4_4over6": 0.10,
    "turboquant_k8v4": 0.12,
    "turboquant_4bit_nc": 0.12,
    "turboquant_k3v4_nc": 0.20,
    "turboquant_3bit_nc": 0.25,
    "turboquant_mse_1bit": 0.65,
    "turboquant_mse_2bit": 0.37,
    "turboquant_mse_3bit": 0.20,
    "turboquant_mse_4bit": 0.11,
    "turboquant_prod_2bit": 0.82,
    "turboquant_prod_3bit": 0.46,
    "turboquant_prod_4bit": 0.25,
    "turboquant_2.5bit": 0.34,
    "turboquant_3.5bit": 0.19,
}


def _codecs(name: str) -> Iterator[tuple[str, KvCodec]]:
    make = FORMATS[name].make
    assert make is not None
    yield from zip(("key", "value"), make(), strict=True)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_all_formats_are_here() -> None:
    """The table above is complete, but for what has to be fitted."""
    assert set(ERRORS) == {name for name, form in FORMATS.items() if form.make is not None}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ERRORS)
def test_sizes_and_errors(name: str, head_dim: int) -> None:
    """Slots are as large as the format says, and decode to what was stored."""
    x = _normal(2, 3, 40, head_dim)
    for side, codec in _codecs(name):
        slots = codec.encode(x)
        size = FORMATS[name].key_bytes if side == "key" else FORMATS[name].value_bytes
        assert codec.slot_bytes(head_dim) == size(head_dim)
        assert slots.shape == (2, 3, 40, size(head_dim))
        assert slots.dtype == torch.uint8
        read = codec.decode(slots, head_dim, torch.float32)
        assert read.shape == x.shape
        assert float((read - x).norm() / x.norm()) < ERRORS[name]
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(codec.decode(slots, head_dim, dtype), read.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ERRORS)
def test_slots_do_not_depend_on_their_company(name: str, dtype: torch.dtype) -> None:
    """Token by token, all at once, sequence by sequence and from a strided view: the same bits."""
    x = _normal(2, 3, 800, 64, seed=1).to(dtype)  # more rows than the CPU treats at once
    for _, codec in _codecs(name):
        together = codec.encode(x)
        for token in (0, 1, 399, 799):
            assert torch.equal(codec.encode(x[:, :, token : token + 1]), together[:, :, token : token + 1])
        assert torch.equal(codec.encode(x[1:]), together[1:])
        assert torch.equal(codec.encode(x[:, :, 300:571]), together[:, :, 300:571])
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(codec.encode(strided), together)


@pytest.mark.cuda
@pytest.mark.skipif(pick_device().type == "cpu", reason="compares a GPU with the CPU")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ERRORS)
def test_a_gpu_stores_the_same_bytes(name: str, head_dim: int) -> None:
    """Sums whose order a GPU chooses are taken in fp64: slots written there can be read here."""
    x = _normal(2, 3, 500, head_dim, seed=3).bfloat16()
    for _, codec in _codecs(name):
        slots = codec.encode(x)
        assert torch.equal(codec.encode(x.to(pick_device())).cpu(), slots)
        there = codec.decode(slots.to(pick_device()), head_dim, torch.float32).cpu()
        torch.testing.assert_close(there, codec.decode(slots, head_dim, torch.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ERRORS)
def test_edge_values_stay_finite(name: str) -> None:
    """Zeros, constants, one large channel, tiny and large rows decode without NaN or infinity."""
    x = torch.zeros(1, 6, 1, 64)
    x[0, 1] = 1.0
    x[0, 2, :, 5] = 300.0
    x[0, 3] = _normal(64) * 1e-7
    x[0, 4] = _normal(64) * 300
    x[0, 5] = -2.0
    for _, codec in _codecs(name):
        read = codec.decode(codec.encode(x), 64, torch.float32)
        assert bool(read.isfinite().all())
        assert float(read[0, 0].abs().max()) < 1e-4


@pytest.mark.parametrize("name", ERRORS)
def test_options_and_tensors_make_it_again(name: str) -> None:
    """What a plan stores of a codec is enough."""
    x = _normal(1, 2, 5, 64, seed=2)
    for _, codec in _codecs(name):
        again = type(codec)(**codec.options(), **codec.tensors())
        assert torch.equal(again.encode(x), codec.encode(x))


@pytest.mark.parametrize("name", ERRORS)
def test_formats_and_codecs_agree_on_head_dims(name: str) -> None:
    """What a format accepts its codecs accept, and can store."""
    for head_dim in range(8, 136, 8):
        if FORMATS[name].problem(head_dim) is None:
            for _, codec in _codecs(name):
                assert codec.problem(head_dim) is None
                slots = codec.encode(_normal(1, 1, 2, head_dim))
                assert slots.shape[-1] == codec.slot_bytes(head_dim)


@pytest.mark.parametrize("name", ERRORS)
def test_no_tokens(name: str) -> None:
    """An empty cache has empty slots."""
    for _, codec in _codecs(name):
        slots = codec.encode(torch.zeros(1, 2, 0, 64))
        assert slots.shape == (1, 2, 0, codec.slot_bytes(64))
        assert codec.decode(slots, 64, torch.float32).shape == (1, 2, 0, 64)
