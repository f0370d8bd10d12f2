"""Scales of rotary pairs: logits stay, stored keys err less.

Legend: H KV heads, T tokens, D head_dim, P rotary pairs.
"""

from __future__ import annotations

import torch

from compressor.kv.fit_pairs import pair_scales
from compressor.kv.vllm_turboquant import VllmTurboKeyCodec

HEADS, TOKENS, HEAD_DIM, HIDDEN = 2, 256, 64, 48


def rotated(x_HTD: torch.Tensor) -> torch.Tensor:
    """Rotary positions as transformers computes them (``rotate_half``)."""
    inverse_P = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle_TD = (torch.arange(TOKENS)[:, None] * inverse_P).repeat(1, 2)
    low, high = x_HTD.chunk(2, dim=-1)
    return x_HTD * angle_TD.cos() + torch.cat([-high, low], -1) * angle_TD.sin()


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D], causal."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def random_heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys before positions whose pairs have very different sizes, and values; [H, T, D]."""
    made = torch.Generator().manual_seed(3)
    shape = (HEADS, TOKENS, HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=made) for _ in range(3))
    sizes = torch.randn(2, HEADS, 1, HEAD_DIM // 2, generator=made).exp().repeat(1, 1, 1, 2)
    return query * sizes[0] * 0.5, key * sizes[1] * 0.5, value


def test_less_error_at_the_output() -> None:
    """Through attention and an output projection, with vLLM's 3-bit keys: well below the plain error."""
    query, key, value = random_heads()
    read_q, read_k = rotated(query), rotated(key)
    scales_HP = pair_scales(read_q.mT @ read_q, read_k.mT @ read_k)
    scales_HD = scales_HP.repeat(1, 2)[:, None].float()
    output = torch.randn(HEADS * HEAD_DIM, HIDDEN, generator=torch.Generator().manual_seed(4))

    def through(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        heads = attention(q[None], k[None], value[None])
        return heads.transpose(1, 2).flatten(2) @ output

    codec = VllmTurboKeyCodec(bits=3)

    def stored(k: torch.Tensor) -> torch.Tensor:
        return codec.decode(codec.encode(k[None]), HEAD_DIM, torch.float32)[0]

    plain = through(read_q, read_k)
    # Folded before the rotation, as weights would have it.
    folded_q, folded_k = rotated(query / scales_HD), rotated(key * scales_HD)
    torch.testing.assert_close(through(folded_q, folded_k), plain, rtol=1e-4, atol=1e-4)
    without = (through(read_q, stored(read_k)) - plain).square().mean()
    scaled = (through(folded_q, stored(folded_k)) - plain).square().mean()
    assert scaled < 0.6 * without


def test_the_best_scales() -> None:
    """No other scales that were tried have a smaller expected error of logits; the mean is one."""
    query, key, _ = random_heads()
    moments = query.mT @ query, key.mT @ key
    scales_HP = pair_scales(*moments)
    torch.testing.assert_close(scales_HP.log().mean(-1), torch.zeros(HEADS, dtype=torch.float64))

    def expected(scales_HP: torch.Tensor) -> torch.Tensor:
        squares = scales_HP.square().repeat(1, 2)
        q, k = (x.double().diagonal(dim1=-2, dim2=-1) for x in moments)
        return (q / squares).sum(-1) * (k * squares).sum(-1)

    best = expected(scales_HP)
    made = torch.Generator().manual_seed(5)
    for spread in (0.01, 0.1, 1.0):
        other = scales_HP * (spread * torch.randn(scales_HP.shape, generator=made)).exp()
        assert (expected(other) >= best).all()


def test_dead_pairs() -> None:
    """Coordinates that are never used give finite scales."""
    zero = torch.zeros(1, 8, 8)
    assert torch.equal(pair_scales(zero, zero), torch.ones(1, 4, dtype=torch.float64))
    some = torch.diag_embed(torch.tensor([[1.0, 0, 2, 3, 1, 0, 2, 3]]))
    scales = pair_scales(some, zero + torch.eye(8))
    assert scales.isfinite().all()
    assert (scales > 0).all()
