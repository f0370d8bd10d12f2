"""Keys stored with their rotary positions undone.

Legend: B sequences, H KV heads, T tokens, D head_dim, E = H * D, P rotary pairs.
"""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import rotate_half

from compressor.kv.fit_codec import find_coordinates, fit_codec, token_weights
from compressor.kv.fitted_rotary import RotaryFittedCodec, turned
from compressor.kv.layer import LayerCodecs, PackedLayer
from tests.kv.test_fitted import random_codec

HEADS, TOKENS, HEAD_DIM = 2, 300, 16
ELEMENTS = HEADS * HEAD_DIM
FREQUENCIES_P = 100.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))


def keys(sequences: int, seed: int) -> torch.Tensor:
    """[B, H, T, D] of few directions before rotation, rotated as transformers rotates."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(ELEMENTS, ELEMENTS, generator=torch.Generator().manual_seed(9))
    x_BTE = torch.randn(sequences, TOKENS, ELEMENTS, generator=made) * 0.7 ** torch.arange(ELEMENTS)
    x_BHTD = (x_BTE @ mixing).view(sequences, TOKENS, HEADS, HEAD_DIM).transpose(1, 2)
    angles_TD = (torch.arange(TOKENS)[:, None] * FREQUENCIES_P).repeat(1, 2)
    return x_BHTD * angles_TD.cos() + rotate_half(x_BHTD) * angles_TD.sin()


def test_turned_as_transformers_turns() -> None:
    """There and back; from a later token on; coordinates that are not rotated stay."""
    x_BHTD = torch.randn(1, HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    angles_TD = (torch.arange(TOKENS)[:, None] * FREQUENCIES_P).repeat(1, 2)
    expected = x_BHTD * angles_TD.cos() + rotate_half(x_BHTD) * angles_TD.sin()
    torch.testing.assert_close(turned(x_BHTD, FREQUENCIES_P, 0, back=False), expected)
    torch.testing.assert_close(turned(expected, FREQUENCIES_P, 0, back=True), x_BHTD)
    later = turned(x_BHTD[:, :, 100:], FREQUENCIES_P, 100, back=False)
    torch.testing.assert_close(later, expected[:, :, 100:])
    partly = turned(x_BHTD, FREQUENCIES_P[:3], 0, back=False)
    assert torch.equal(partly[..., 6:], x_BHTD[..., 6:])
    assert not torch.equal(partly[..., :6], x_BHTD[..., :6])


def test_less_error_than_without_turning() -> None:
    """With equal bytes, on keys that were not fitted."""
    errors = []
    for frequencies_P in (None, FREQUENCIES_P):
        x_BHTD = keys(30, 0)
        if frequencies_P is not None:
            x_BHTD = turned(x_BHTD, frequencies_P, 0, back=True)
        rows_NE = x_BHTD.transpose(1, 2).reshape(-1, ELEMENTS)
        weights_N = token_weights(torch.ones(len(rows_NE)))
        found = find_coordinates(rows_NE, weights_N, torch.eye(ELEMENTS))
        codec = fit_codec(found, rows_NE, weights_N, token_bytes=10, kv_heads=HEADS)
        if frequencies_P is not None:
            codec = RotaryFittedCodec.of(codec, frequencies_P)
        others = keys(3, 1)
        read = codec.decode(codec.encode(others), HEAD_DIM, torch.float32)
        errors.append(float((read - others).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_cache_in_chunks() -> None:
    """A cache that is fed in any chunks reads what it reads in one, behind a sink too."""
    plain = random_codec(HEADS, HEAD_DIM, [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)])
    codec = RotaryFittedCodec.of(plain, FREQUENCIES_P)
    x_BHTD = keys(1, 2)
    whole = codec.decode(codec.encode(x_BHTD), HEAD_DIM, torch.float32)
    for sink in (0, 3):
        layer = PackedLayer(LayerCodecs(codec, plain, sink_tokens=sink), "strict")
        for chunk in torch.split(x_BHTD, [2, 5, 100, 1, 192], dim=2):
            read, _ = layer.update(chunk, chunk)
        torch.testing.assert_close(read[:, :, sink:], whole[:, :, sink:])


def test_made_again_and_hostile() -> None:
    """From its parts; frequencies are checked as the others are."""
    plain = random_codec(HEADS, HEAD_DIM, [[0, 1], [2, 3]])
    codec = RotaryFittedCodec.of(plain, FREQUENCIES_P)
    options, tensors = dict(codec.options()), dict(codec.tensors())
    again = RotaryFittedCodec(**options, **tensors)
    assert torch.equal(again.encode(keys(1, 3)), codec.encode(keys(1, 3)))
    for wrong in (
        FREQUENCIES_P.double(),
        torch.zeros(9),
        torch.zeros(0),
        torch.zeros(2, 2),
        torch.full((2,), float("inf")),
    ):
        with pytest.raises(ValueError, match="frequencies"):
            RotaryFittedCodec(**options, **(tensors | {"frequencies": wrong}))
