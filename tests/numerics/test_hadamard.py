"""Hadamard and random orthogonal matrices."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.hadamard import fast_hadamard, random_orthogonal, sylvester


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_sylvester_is_the_parity_of_common_bits(size: int) -> None:
    """Entry (i, j) is -1 to the number of bits that i and j share."""
    expected = [[(-1.0) ** (row & column).bit_count() for column in range(size)] for row in range(size)]
    assert torch.equal(sylvester(size), torch.tensor(expected))


@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_fast_is_the_product(size: int) -> None:
    """Whole numbers stay exact in fp32."""
    x = torch.randint(-50, 50, (3, 5, size), generator=torch.Generator().manual_seed(size)).float()
    assert torch.equal(fast_hadamard(x), x @ sylvester(size))


def test_rows_do_not_see_each_other() -> None:
    """The same bits alone, together, and from a view with strides."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    together = fast_hadamard(x)
    for row in range(7):
        assert torch.equal(fast_hadamard(x[row : row + 1])[0], together[row])
    assert torch.equal(fast_hadamard(x.T.contiguous().T), together)


@pytest.mark.parametrize("size", [0, 3, 96])
def test_other_sizes_are_refused(size: int) -> None:
    """There is no Sylvester matrix of these sizes."""
    with pytest.raises(AssertionError):
        sylvester(size)


@pytest.mark.parametrize("size", [3, 64, 96])
def test_random_orthogonal(size: int) -> None:
    """Orthogonal, the same for a seed, another for another; no entry is favoured."""
    matrix = random_orthogonal(size, 5)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-12)
    assert torch.equal(matrix, random_orthogonal(size, 5))
    assert not torch.equal(matrix, random_orthogonal(size, 6))


def test_random_orthogonal_has_no_preferred_signs() -> None:
    """Without mended signs the first entries of QR's factor would all be of one sign."""
    corners = torch.stack([random_orthogonal(4, seed)[0, 0] for seed in range(400)])
    # Mean 0, variance 1/4: the mean of 400 lies within 0.1 in all but one of ten thousand cases.
    assert abs(float(corners.mean())) < 0.1
    assert abs(float(corners.square().mean()) - 0.25) < 0.05
