"""Bytes equal to those of vLLM 0.32's store kernels, and reads equal to its decode kernels."""

from __future__ import annotations

import pytest
import torch

from compressor.kv.formats import FORMATS
from compressor.kv.vllm_turboquant import VllmTurboKeyCodec, vllm_levels
from tests.kv.golden import HEAD_DIMS, PLAIN, PRESETS, TIED, as_cache, as_tokens, golden

PER_TOKEN_HEAD = ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")


def _stored(name: str, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of the golden keys and values by our codecs, [1, H, T, S]."""
    make = FORMATS[name].make
    assert make is not None
    key, value = make()
    return (
        key.encode(as_cache(golden()[f"{head_dim}/key"])),
        value.encode(as_cache(golden()[f"{head_dim}/value"])),
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PRESETS)
def test_turboquant_slots_are_vllms(name: str, head_dim: int) -> None:
    """All bytes, edge cases included: key's slot, then value's.

    Some keys are rotated onto boundaries between codes, where the last bit of vLLM's matrix product decides:
    of those the codec gets the rotated keys that vLLM's store kernel was given.
    """
    stored_key, stored_value = _stored(name, head_dim)
    slots = as_tokens(torch.cat((stored_key, stored_value), dim=-1))
    if PRESETS[name][0] != 8:
        rotated = golden()[f"{head_dim}/turboquant_4bit_nc/rotated"]
        norms = golden()[f"{head_dim}/turboquant_4bit_nc/norm"]
        tied = VllmTurboKeyCodec(PRESETS[name][0]).encode_rotated(rotated.flatten(0, 1), norms.flatten(0, 1))
        slots[TIED, :, : stored_key.shape[-1]] = tied.view(*rotated.shape[:2], -1)
    assert torch.equal(slots, golden()[f"{head_dim}/{name}/slots"])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PER_TOKEN_HEAD)
def test_per_token_head_slots_are_vllms(name: str, head_dim: int) -> None:
    """All bytes: codes, then the scale."""
    for side, slots in zip(("key", "value"), _stored(name, head_dim), strict=True):
        assert torch.equal(as_tokens(slots), golden()[f"{head_dim}/{name}/{side}"]), side


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [3, 4])
def test_levels_are_vllms(bits: int, head_dim: int) -> None:
    """The codebook is part of the format: bit by bit."""
    name = "turboquant_4bit_nc" if bits == 4 else "turboquant_3bit_nc"
    assert torch.equal(vllm_levels(head_dim, bits), golden()[f"{head_dim}/{name}/levels"])


@pytest.mark.parametrize("name", ["turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_reads_are_vllms(name: str) -> None:
    """vLLM's kernel hands out fp16, keys before the rotation back: half an fp16 step apart."""
    make = FORMATS[name].make
    assert make is not None
    key, value = make()
    slots = as_cache(golden()[f"64/{name}/slots"])
    size = key.slot_bytes(64)
    reads = {"value": value.decode(slots[..., size:], 64, torch.float32)}
    if isinstance(key, VllmTurboKeyCodec):
        rows = slots[..., :size].reshape(-1, size)
        reads["key"] = key.decode_rotated(rows, 64).view(*slots.shape[:-1], 64)
    else:
        reads["key"] = key.decode(slots[..., :size], 64, torch.float32)
    for side, read in reads.items():
        expected = as_cache(golden()[f"64/{name}/{side}_read"].float())
        # Infinite norms (beyond 65504) read as infinities in both.
        torch.testing.assert_close(read.half().float(), expected, rtol=2**-10, atol=2**-24, equal_nan=True)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PRESETS)
def test_attention_over_reads_is_vllms(name: str, head_dim: int) -> None:
    """Softmax attention over what is decoded, against vLLM's fused decode: fp32 sums in another order."""
    make = FORMATS[name].make
    assert make is not None
    key, value = make()
    slots = as_cache(golden()[f"{head_dim}/{name}/slots"])[:, :, :PLAIN]
    size = key.slot_bytes(head_dim)
    keys = key.decode(slots[..., :size], head_dim, torch.float32)
    values = value.decode(slots[..., size:], head_dim, torch.float32)
    query = golden()[f"{head_dim}/query"].float().transpose(0, 1)[None]
    attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    expected = golden()[f"{head_dim}/{name}/attention"].transpose(0, 1)[None]
    torch.testing.assert_close(attended, expected.view_as(attended), rtol=1e-4, atol=1e-4)
