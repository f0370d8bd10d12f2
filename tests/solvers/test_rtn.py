"""Round to nearest, with every scheme."""

from __future__ import annotations

import pytest
import torch

from compressor.errors import CheckpointError
from compressor.schemes.base import Scheme, Search
from compressor.schemes.nvfp4 import Nvfp4A16
from compressor.solvers.rtn import Rtn
from tests.schemes.cases import LABELS, SCHEMES, applicable, matrices


@pytest.mark.parametrize("search", ["full", "minmax"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_every_scheme(scheme: Scheme, search: Search) -> None:
    """Tensors are those of the scheme; the errors are exact sums in fp64."""
    weight = matrices()["mixed bf16"]
    before = weight.clone()
    solved = Rtn(search=search).solve([weight], scheme)
    assert len(solved) == 1
    assert torch.equal(weight, before)
    scales = scheme.fit([weight], search=search)[0]
    expected = scheme.encode(weight, scales)
    assert solved[0].tensors.keys() == expected.keys()
    for local, tensor in solved[0].tensors.items():
        assert torch.equal(tensor.view(torch.uint8), expected[local].view(torch.uint8))
    decoded = scheme.decode(expected, 136, 256)
    exact = ((decoded - weight).double() ** 2).sum().item()
    assert solved[0].squared_error == pytest.approx(exact, rel=1e-9)
    assert solved[0].squared_norm == pytest.approx((weight.double() ** 2).sum().item(), rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_every_kind_of_matrix(scheme: Scheme) -> None:
    """No matrix of any dtype or size makes a result that is not finite, or an error above the norm."""
    for name, weight in matrices().items():
        if not applicable(scheme, weight) or name == "largest":  # decodes to infinity where it rounds up
            continue
        solved = Rtn().solve([weight], scheme)[0]
        assert solved.squared_error <= solved.squared_norm * 1.001, name


def test_fp64_weights() -> None:
    """Wide weights are stored as their fp32 values would be."""
    weight = matrices()["fp32"]
    wide, narrow = (Rtn().solve([w], Nvfp4A16())[0] for w in (weight.double(), weight))
    assert torch.equal(wide.tensors["weight_packed"], narrow.tensors["weight_packed"])
    assert wide.squared_error == narrow.squared_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights(value: float, dtype: torch.dtype) -> None:
    """The fault counts the values; the caller knows the tensor's name."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[5, 7] = weight[60, 63] = value
    with pytest.raises(CheckpointError, match="the tensor has 2 non-finite values"):
        Rtn().solve([torch.ones(64, 64), weight], Nvfp4A16())


def test_a_group_shares_its_tensor_scale() -> None:
    """Matrices solved together get one tensor-level scale."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(32, 64, generator=generator) * size for size in (0.1, 1.0, 4.0)]
    together = Rtn().solve(weights, Nvfp4A16())
    shared = {solved.tensors["weight_global_scale"].item() for solved in together}
    assert len(shared) == 1
    assert shared != {Rtn().solve(weights[:1], Nvfp4A16())[0].tensors["weight_global_scale"].item()}
