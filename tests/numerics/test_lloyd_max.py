"""Codebooks against published tables, brute force and their own conditions."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.numerics.lloyd_max import (
    GAUSSIAN_FROM,
    gaussian_levels,
    level_values,
    midpoints,
    nearest_level,
    rotated_levels,
    sphere_levels,
)

# Max, "Quantizing for minimum distortion", 1960, table I: the largest level and the squared error.
MAX_1960 = {1: (0.7980, 0.3634), 2: (1.510, 0.1175), 3: (2.152, 0.03454), 4: (2.733, 0.009497)}


def _density(dimensions: int, points: int = 400_001) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and probabilities of sqrt(d) times a coordinate of a unit vector; 0 for the Gaussian."""
    end = 9.0 if dimensions == 0 else math.sqrt(dimensions)
    x = torch.linspace(-end, end, points, dtype=torch.float64)
    if dimensions == 0:
        weight = torch.exp(-x * x / 2)
    else:
        weight = (1 - x * x / dimensions).clamp(min=0) ** ((dimensions - 3) / 2)
    return x, weight / weight.sum()


def _error(levels: tuple[float, ...], dimensions: int) -> float:
    x, weight = _density(dimensions)
    table = torch.tensor(levels, dtype=torch.float64)
    read = table[torch.bucketize(x, midpoints(table), right=True)]
    return float(((x - read) ** 2 * weight).sum())


@pytest.mark.parametrize("bits", MAX_1960)
def test_gaussian_is_maxs_table(bits: int) -> None:
    """As printed there."""
    largest, error = MAX_1960[bits]
    levels = gaussian_levels(bits)
    assert levels[-1] == pytest.approx(largest, abs=6e-4)  # the table itself is rounded
    assert _error(levels, 0) == pytest.approx(error, rel=5e-4)  # so is this


@pytest.mark.parametrize("dimensions", [0, 4, 16, 32, 96])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_centroids(bits: int, dimensions: int) -> None:
    """Each level is the mean of what is nearest to it, by sums over 400,001 points."""
    levels = sphere_levels(bits, dimensions) if dimensions else gaussian_levels(bits)
    assert list(levels) == sorted(levels)
    assert all(low == -high for low, high in zip(levels, reversed(levels), strict=True))
    x, weight = _density(dimensions)
    table = torch.tensor(levels, dtype=torch.float64)
    codes = torch.bucketize(x, midpoints(table), right=True)
    mass = torch.zeros(len(table), dtype=torch.float64).index_add_(0, codes, weight)
    moment = torch.zeros(len(table), dtype=torch.float64).index_add_(0, codes, weight * x)
    # A point more or less at a boundary moves a mean by about 1e-4 of a step.
    torch.testing.assert_close(moment / mass, table, rtol=0, atol=2e-4)


def test_the_gaussian_serves_from_its_bound_on() -> None:
    """At the least width that uses the Gaussian's levels they cost less than 0.5 % more error."""
    for bits in (1, 2, 3, 4):
        best = _error(sphere_levels(bits, GAUSSIAN_FROM), GAUSSIAN_FROM)
        assert _error(gaussian_levels(bits), GAUSSIAN_FROM) < 1.005 * best
        assert rotated_levels(bits, GAUSSIAN_FROM) == gaussian_levels(bits)
        assert rotated_levels(bits, 32) == sphere_levels(bits, 32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_nearest_level_is_bucketize(bits: int) -> None:
    """Ties go up, as ``>=`` has it; NaN gets code 0."""
    levels = torch.tensor(gaussian_levels(bits))
    between = midpoints(levels)
    x = torch.cat((torch.randn(1000, generator=torch.Generator().manual_seed(1)), between, levels))
    codes = nearest_level(x, between)
    assert torch.equal(codes.long(), torch.bucketize(x, between, right=True))
    assert torch.equal(level_values(codes, levels), levels[codes.long()])
    assert nearest_level(torch.tensor([math.nan]), between).tolist() == [0]
