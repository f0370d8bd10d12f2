"""Rounding that gradients pass, and inputs that several matrices share."""

from __future__ import annotations

import torch

from compressor.schemes import parse_scheme
from compressor.stages.training import RoundedOnce, rounding


def test_gradient_passes_the_rounding() -> None:
    """Values are the scheme's, the gradient is that of the inputs themselves."""
    scheme = parse_scheme("nvfp4")
    stored = {"input_global_scale": torch.tensor([64.0]), "weight_scale": torch.ones(1)}
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    expected = scheme.round_inputs(x.view(6, 32), stored).view(x.shape)
    rounded = rounding(scheme, stored)
    assert torch.equal(rounded(x), expected)
    assert not rounded(x).requires_grad
    moved = x.clone().requires_grad_()
    made = rounded(moved)
    assert torch.equal(made, expected)
    weight = torch.randn(x.shape)
    (made * weight).sum().backward()
    assert moved.grad is not None
    assert torch.equal(moved.grad, weight)


def test_same_input_is_rounded_once() -> None:
    """Until it changes in place, another one comes, or it is forgotten."""
    calls = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return 2 * x

    once = RoundedOnce(doubled)
    x = torch.ones(3)
    assert once(x) is once(x)
    assert len(calls) == 1
    x.add_(1)
    assert once(x).tolist() == [4, 4, 4]
    once(x.clone())
    once(x)
    assert len(calls) == 4
    once.forget()
    once(x)
    assert len(calls) == 5
