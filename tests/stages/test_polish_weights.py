"""Matrices computed many at a time: the values of ``decode``, and the gradients of plain autograd."""

from __future__ import annotations

import pytest
import torch

from compressor.schemes import parse_scheme
from compressor.schemes.base import FreeScales
from compressor.stages import polish_weights
from compressor.stages.polish_scales import Knob, Knobs
from compressor.stages.polish_weights import Free, Stack, stacked

CPU = torch.device("cpu")
SHAPES = [(48, 128), (16, 128), (130, 128), (64, 256)]
KINDS: list[object] = [
    "nvfp4a16",
    "fp8_dynamic",
    "fp8_block",
    {"kind": "int4", "group_size": 32, "symmetric": False},
]


def _matrices(kind: object) -> tuple[list[FreeScales], list[Free], list[torch.Tensor]]:
    """Matrices taken apart, also with their knobs, and decoded."""
    scheme, generator = parse_scheme(kind), torch.Generator().manual_seed(0)
    taken, free, decoded = [], [], []
    for index, shape in enumerate(SHAPES):
        weight_OI = torch.randn(shape, generator=generator) * 0.02 * (index + 1)
        tensors = scheme.encode(weight_OI, scheme.fit([weight_OI], search="minmax")[0])
        apart = scheme.free_scales(tensors, *shape)
        assert apart is not None
        taken.append(apart)
        free.append(Free(apart, Knob(f"m{index}.weight_scale", apart.scale_BC, 0.0, CPU), CPU))
        decoded.append(scheme.decode(tensors, *shape))
    return taken, free, decoded


def _slow(free: FreeScales, scale_BC: torch.Tensor) -> torch.Tensor:
    """[O, I], group by group."""
    rows, columns = free.group
    weight_OI = free.units_OI.clone()
    for b in range(scale_BC.shape[0]):
        for c in range(scale_BC.shape[1]):
            scale = scale_BC[b, c] if free.divisor is None else scale_BC[b, c] / free.divisor[0]
            group = slice(b * rows, (b + 1) * rows), slice(c * columns, (c + 1) * columns)
            weight_OI[group] = free.units_OI[group] * scale
    return weight_OI


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_and_gradients(kind: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """In stacks of whatever size; gradients up to the order of fp32 sums."""
    taken, free, decoded = _matrices(kind)
    monkeypatch.setattr(polish_weights, "_LARGEST", 10_000)
    stacks = stacked(list(enumerate(free)))
    assert sorted(number for numbers, _ in stacks for number in numbers) == [0, 1, 2, 3]
    knobs = Knobs([matrix.knob for _, members in stacks for matrix in members], CPU)
    generator = torch.Generator().manual_seed(1)
    for numbers, members in stacks:
        made = Stack(members, knobs).weights(torch.float32)
        for number, matrix, weight_OI in zip(numbers, members, made, strict=True):
            assert torch.equal(weight_OI, decoded[number])
            scale_BC = matrix.knob.start.clone().requires_grad_()
            slow_OI = _slow(taken[number], scale_BC)
            assert torch.equal(slow_OI, weight_OI)
            direction = torch.randn(slow_OI.shape, generator=generator)
            (slow_OI * direction).sum().backward()  # type: ignore[no-untyped-call]
            before = matrix.knob.value.grad.clone()
            (weight_OI * direction).sum().backward(retain_graph=True)
            assert torch.allclose(matrix.knob.value.grad - before, scale_BC.grad, rtol=1e-4, atol=1e-5)


def test_small_matrices_go_together() -> None:
    """One stack where groups are alike, but blocks of rows stay alone."""
    assert len(stacked(list(enumerate(_matrices("nvfp4a16")[1])))) == 1
    assert [numbers for numbers, _ in stacked(list(enumerate(_matrices("fp8_dynamic")[1])))] == [
        [0, 1, 2],
        [3],
    ]
    assert len(stacked(list(enumerate(_matrices("fp8_block")[1])))) == 4


def test_knobs_move() -> None:
    """Nothing at zero; then values as stored, of all dtypes, and gradients by the chain rule."""
    scales = Knob("a", torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn), 0.0, CPU)
    norm = Knob("b", torch.tensor([0.25, -1.0, 0.0], dtype=torch.bfloat16), 1.0, CPU)
    knobs = Knobs([norm, scales], CPU)
    assert knobs.changed() == {}
    knobs.put(torch.zeros(5))
    assert knobs.changed() == {}
    names = ["b", "b", "b", "a", "a"] if str(norm.dtype) < str(scales.dtype) else ["a", "a", "b", "b", "b"]
    knobs.put(torch.tensor([0.1 if name == "b" else 0.3 for name in names]))
    # 0.5 exp(0.3) = 0.675, 2 exp(0.3) = 2.70: neighbours in E4M3 are 0.625, 0.6875; 2.5, 2.75
    assert scales.value.tolist() == [0.6875, 2.75]
    expected = (torch.tensor([1.25, 0.0, 1.0]) * torch.tensor(0.1).exp() - 1).bfloat16().float()
    assert torch.equal(norm.value.detach(), expected)
    assert knobs.changed().keys() == {"a", "b"}
    assert knobs.changed()["a"].dtype == torch.float8_e4m3fn
    (norm.value.sum() + 3 * scales.value.sum()).backward()
    found = dict(
        zip(
            ("b0", "b1", "b2", "a0", "a1") if names[0] == "b" else ("a0", "a1", "b0", "b1", "b2"),
            knobs.gradients().tolist(),
            strict=True,
        )
    )
    assert found["b0"] == pytest.approx(1.25 * 1.10517, rel=1e-4)
    assert found["b1"] == 0
    assert found["a1"] == pytest.approx(3 * 2 * 1.34986, rel=1e-4)
    assert knobs.is_sane
    knobs.clear_gradients()
    assert not knobs.gradients().any()
    knobs.put(torch.full((5,), float("nan")))
    assert not knobs.is_sane
