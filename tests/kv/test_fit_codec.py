"""Fitted coordinates and centroids against what theory and plain codecs say.

Legend: N tokens, E elements, C coordinates.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from compressor.kv.fit_codec import (
    expected_errors,
    find_coordinates,
    fit_codec,
    share_out,
    token_weights,
)
from compressor.numerics.lloyd_max import gaussian_levels

HEADS, HEAD_DIM = 2, 16
ELEMENTS = HEADS * HEAD_DIM


def correlated(tokens: int, seed: int = 0) -> torch.Tensor:
    """[N, E] Gaussian vectors with a mean, whose heads have much in common."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(ELEMENTS, ELEMENTS, generator=torch.Generator().manual_seed(9))
    sizes = 0.8 ** torch.arange(ELEMENTS)
    return torch.randn(tokens, ELEMENTS, generator=made) * sizes @ mixing + 3.0


def random_metric() -> torch.Tensor:
    """[E, E], far from the identity."""
    root = torch.randn(ELEMENTS, ELEMENTS, generator=torch.Generator().manual_seed(7)).double()
    root = root * 3.0 ** torch.linspace(-2, 2, ELEMENTS)
    return root @ root.T


def error(codec_x: torch.Tensor, x_NE: torch.Tensor, metric_EE: torch.Tensor) -> float:
    """Mean over tokens of e M e."""
    e_NE = (codec_x - x_NE).double()
    return float(((e_NE @ metric_EE) * e_NE).sum(-1).mean())


def test_coordinates() -> None:
    """There and back is the same; coordinates are uncorrelated; squared distances are those of the metric."""
    x_NE, metric_EE = correlated(4000).double(), random_metric()
    found = find_coordinates(x_NE, torch.ones(4000), metric_EE)
    y_NC = (x_NE - found.mean_E) @ found.forward_EC
    torch.testing.assert_close(y_NC @ found.backward_CE + found.mean_E, x_NE)
    covariance_CC = y_NC.T @ y_NC / len(y_NC)
    scale = float(found.spread_C[0])
    torch.testing.assert_close(covariance_CC, found.spread_C.diag(), atol=1e-9 * scale, rtol=1e-6)
    assert (found.spread_C.diff() <= 0).all()
    # The metric, with the share of its mean that is added.
    ridged_EE = metric_EE + 0.05 * metric_EE.diagonal().mean() * torch.eye(ELEMENTS).double()
    torch.testing.assert_close(found.forward_EC @ found.forward_EC.T, ridged_EE)


def test_expected_errors_are_the_best_bits() -> None:
    """Greedy bits against every way to share them out."""
    spread_C = torch.tensor([4.0, 2.5, 0.3], dtype=torch.float64)
    table = [1.0] + [
        # Of N(0, 1): the variance less what the levels carry.
        float(_gaussian_error(bits))
        for bits in range(1, 6)
    ]
    best = min(
        sum(float(s) * table[b] for s, b in zip(spread_C, bits, strict=True))
        for bits in itertools.product(range(6), repeat=3)
        if sum(bits) == 8
    )
    found = expected_errors(spread_C, 2)
    assert float(found[0]) == pytest.approx(6.8)
    assert float(found[1]) == pytest.approx(best, rel=2e-3)  # the table has four digits
    assert found[2] < found[1]


def _gaussian_error(bits: int) -> torch.Tensor:
    levels = torch.tensor(gaussian_levels(bits), dtype=torch.float64)
    x_N = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    density_N = torch.exp(-(x_N**2) / 2) / (2 * torch.pi) ** 0.5
    nearest_N = levels[torch.bucketize(x_N, (levels[1:] + levels[:-1]) / 2)]
    return (density_N * (x_N - nearest_N) ** 2).sum() * (x_N[1] - x_N[0])


@pytest.mark.parametrize("token_bytes", [4, 10, 20])
def test_better_than_levels(token_bytes: int) -> None:
    """On tokens that were not fitted: below what Lloyd-Max levels for each coordinate could reach."""
    x_NE, metric_EE = correlated(20_000), random_metric()
    weights_N = token_weights(torch.ones(20_000))
    found = find_coordinates(x_NE, weights_N, metric_EE)
    codec = fit_codec(found, x_NE, weights_N, token_bytes=token_bytes, kv_heads=HEADS)
    assert codec.slot_bytes(HEAD_DIM) * HEADS == token_bytes
    others_NE = correlated(3000, seed=1)
    others_BHTD = others_NE.view(1, 3000, HEADS, HEAD_DIM).transpose(1, 2)
    stored = codec.decode(codec.encode(others_BHTD), HEAD_DIM, torch.float32)
    measured = error(stored.transpose(1, 2).flatten(2)[0], others_NE, metric_EE)
    expected = float(expected_errors(found.spread_C, token_bytes)[token_bytes])
    assert measured < 0.98 * expected


def test_counts_matter() -> None:
    """Tokens that count more are stored better."""
    x_NE = correlated(8000)
    counts_N = torch.ones(8000)
    counts_N[:400] = 400.0
    x_NE[:400] = 2 * x_NE[:400].flip(1)
    errors = []
    for counts in (torch.ones(8000), counts_N):
        weights_N = token_weights(counts)
        assert float(weights_N.mean()) == pytest.approx(1.0)
        found = find_coordinates(x_NE, weights_N, torch.eye(ELEMENTS))
        codec = fit_codec(found, x_NE, weights_N, token_bytes=8, kv_heads=HEADS)
        few_BHTD = x_NE[:400].view(1, 400, HEADS, HEAD_DIM).transpose(1, 2)
        stored = codec.decode(codec.encode(few_BHTD), HEAD_DIM, torch.float32)
        errors.append(float((stored - few_BHTD).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_shared_out() -> None:
    """Every byte has something; loads are even; coordinates of no use are left out."""
    spread_C = 4.0 ** -torch.arange(32, dtype=torch.float64)
    members = share_out(spread_C, 6)
    assert len(members) == 6
    assert all(members)
    flat = sorted(itertools.chain(*members))
    assert flat == list(range(len(flat)))
    assert len(flat) < 20  # 48 bits: 4^-k is out of reach from about k = 10 on
    assert share_out(torch.ones(4, dtype=torch.float64), 4) == [[0], [1], [2], [3]]


def test_constant_tokens() -> None:
    """Nothing varies, no gradient: stored exactly, and nothing is NaN."""
    x_NE = torch.full((300, ELEMENTS), 2.0)
    weights_N = token_weights(torch.zeros(300))
    found = find_coordinates(x_NE, weights_N, torch.zeros(ELEMENTS, ELEMENTS))
    codec = fit_codec(found, x_NE, weights_N, token_bytes=2, kv_heads=HEADS)
    x_BHTD = x_NE.view(1, 300, HEADS, HEAD_DIM).transpose(1, 2)
    torch.testing.assert_close(codec.decode(codec.encode(x_BHTD), HEAD_DIM, torch.float32), x_BHTD)
