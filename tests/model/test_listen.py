"""The order in which a block uses its matrices, what shares an input, and when a pass may stop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor.model.listen import Ear, Layout, listen, rehearse
from compressor.model.stubs import HIDDEN, Call

CALL = Call((HIDDEN,), {})
Flow = Callable[["_Block", torch.Tensor], torch.Tensor]


class _Block(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.a, self.b, self.c, self.unused = (nn.Linear(4, 4) for _ in range(4))
        self.flow = flow
        self.passed: list[str] = []
        for name in "abc":
            self.get_submodule(name).register_forward_hook(lambda *_, name=name: self.passed.append(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flow(self, x)


def _layout(flow: Flow) -> Layout:
    return rehearse(_Block(flow), CALL, torch.randn(2, 3, 4), {"a", "b", "c", "unused"}, set())


def _names(layout: Layout) -> list[list[tuple[str, ...]]]:
    return [[ear.owners for ear in step] for step in layout.steps]


def _parallel(block: _Block, x: torch.Tensor) -> torch.Tensor:
    return block.c(block.a(x) + block.b(x.view(-1, 4)).view_as(x))


def _later(block: _Block, x: torch.Tensor) -> torch.Tensor:
    return block.c(block.a(x)) + block.b(x)


def _overwritten(block: _Block, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    made = block.a(x)
    x.mul_(2)
    return block.c(made) + block.b(x)


def _half(block: _Block, x: torch.Tensor) -> torch.Tensor:
    both = torch.cat([x, x], dim=0)
    return block.c(block.a(both)[:2]) + block.b(both[:2])


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        (_parallel, [[("a", "b")], [("c",)]]),
        (_later, [[("a", "b")], [("c",)]]),
        (_overwritten, [[("a",)], [("c",)], [("b",)]]),
        (_half, [[("a",)], [("c",)], [("b",)]]),
    ],
)
def test_only_the_same_rows_are_one_input(flow: Flow, expected: list[list[tuple[str, ...]]]) -> None:
    """Also under another shape or called later; not once they were overwritten, nor a part of them."""
    layout = _layout(flow)
    assert _names(layout) == expected
    assert layout.unused == {"unused"}


def _repeated(block: _Block, x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x = block.b(block.a(x))
    return block.c(x)


def _run(
    flow: Flow, until: int | None
) -> tuple[list[tuple[str, torch.Tensor]], list[str], torch.Tensor | None]:
    block, told = _Block(flow), []

    def heard(ear: Ear, expert: int | None, x: torch.Tensor, tokens: torch.Tensor | None) -> None:
        assert expert is None
        assert tokens is None
        told.append((ear.owners[0], x))

    with torch.no_grad():
        made = listen(block, CALL, torch.randn(2, 3, 4), _layout(flow), heard, until, {})
    return told, block.passed, made


def test_a_pass_stops_before_the_product_that_nobody_needs() -> None:
    """Once the last ear of the step was told, nothing is computed."""
    told, passed, made = _run(_parallel, 0)
    assert [name for name, _ in told] == ["a"]
    assert told[0][1].shape == (6, 4)
    assert passed == []
    assert made is None
    told, passed, made = _run(_parallel, 1)
    assert [name for name, _ in told] == ["a", "c"]
    assert passed == ["a", "b"]
    assert made is None
    told, passed, made = _run(_parallel, None)
    assert passed == ["a", "b", "c"]
    assert made is not None


def test_a_layer_that_is_called_again_is_heard_each_time() -> None:
    """The pass goes on until a later step begins."""
    told, passed, _ = _run(_repeated, 0)
    assert [name for name, _ in told] == ["a", "b", "a", "b"]
    assert passed == ["a", "b", "a", "b"]


def test_a_layer_that_is_passed_by_is_a_fault() -> None:
    """A block that computes otherwise than in the rehearsal must not end with statistics of nothing."""
    layout = _layout(_parallel)
    block = _Block(lambda block, x: block.a(x))
    with pytest.raises(CheckpointError, match="c: the block passes this layer by"):
        listen(block, CALL, torch.randn(2, 3, 4), layout, lambda *_: None, None, {})


def test_hooks_are_gone_afterwards() -> None:
    """Also after a pass that stopped or failed."""
    block = _Block(_parallel)
    before = [len(module._forward_pre_hooks) for module in block.modules()]
    layout = rehearse(block, CALL, torch.randn(2, 3, 4), {"a", "b", "c"}, set())

    def fails(*_: object) -> None:
        raise ValueError("listener")

    listen(block, CALL, torch.randn(2, 3, 4), layout, lambda *_: None, 0, {})
    with pytest.raises(ValueError, match="listener"):
        listen(block, CALL, torch.randn(2, 3, 4), layout, fails, None, {})
    assert [len(module._forward_pre_hooks) for module in block.modules()] == before
