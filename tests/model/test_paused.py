"""Passes that wait at a block's steps: what they hear and make is what passes that start anew do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor.model.listen import Ear, Ears, Heard, Layout, listen, rehearse
from compressor.model.paused import PausedPasses, most_waiting
from compressor.model.stubs import HIDDEN, Call

CALL = Call((HIDDEN,), {})
NAMES = {"a", "b", "c"}
Inputs = dict[str, torch.Tensor]


class _Block(nn.Module):
    """Two matrices read one input, one of them last of all."""

    def __init__(self, *, passes_by: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.passes_by = passes_by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.a(x)
        if not self.passes_by:
            made = self.c(made) + self.b(x)
        return made


def _layout() -> Layout:
    return rehearse(_Block(), CALL, torch.randn(2, 3, 4), NAMES, set())


def _batches() -> list[torch.Tensor]:
    return list(torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(2)))


@contextmanager
def _paused(block: _Block) -> Iterator[PausedPasses[Heard]]:
    batches, layout = _batches(), _layout()
    passes: PausedPasses[Heard] = PausedPasses(
        Ears(block, layout, {}),
        layout,
        lambda batch: block(batches[batch]),
        lambda hear: hear or (lambda *_: None),
    )
    with closing(passes):
        yield passes


def _into(told: Inputs) -> Callable[..., None]:
    def heard(ear: Ear, expert: int | None, x: torch.Tensor, tokens: torch.Tensor | None) -> None:
        told[ear.owners[0]] = x.clone()

    return heard


def _solve(block: _Block, step: int) -> None:
    """Other values for the matrices of a step, and inputs of the last matrix of the first step rounded."""
    for name in (("a", "b"), ("c",))[step]:
        block.get_submodule(name).weight = nn.Parameter(
            block.get_parameter(f"{name}.weight").detach().round()
        )
    if step == 0:
        for name in ("a", "b"):
            block.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0].round(),))


def test_as_passes_that_start_anew() -> None:
    """Inputs heard step by step, and the outputs, with matrices and rounded inputs that come between."""
    layout = _layout()
    assert layout.waits_well
    assert len(layout.steps) == 2
    one, other = _Block(), _Block()
    batches = _batches()
    with _paused(one) as passes:
        for step in (0, 1):
            for batch, x in enumerate(batches):
                ours: Inputs = {}
                theirs: Inputs = {}
                assert passes.go_on(batch, step, _into(ours)) is None
                with torch.no_grad():
                    listen(other, CALL, x, layout, _into(theirs), step, {})
                name = ("a", "c")[step]
                assert list(ours) == [name]
                assert torch.equal(ours[name], theirs[name])
            _solve(one, step)
            _solve(other, step)
        for batch, x in enumerate(batches):
            with torch.no_grad():
                assert torch.equal(_made(passes.go_on(batch)), other(x))
    assert not [thread for thread in threading.enumerate() if thread.name == "paused-pass"]


def _made(output: torch.Tensor | None) -> torch.Tensor:
    assert output is not None
    return output


def test_steps_may_be_left_out() -> None:
    """Where nothing of a step is to be heard."""
    told: Inputs = {}
    with _paused(_Block()) as passes:
        passes.go_on(0, 1, _into(told))
        assert set(told) == {"a", "c"}
        assert passes.go_on(0) is not None
        with torch.no_grad():
            assert torch.equal(_made(passes.go_on(1)), _Block()(_batches()[1]))


def test_the_block_is_left_as_it_was() -> None:
    """Also where passes still wait, or failed: no hooks, no threads."""
    block = _Block()

    def fails(*_: object) -> None:
        raise ValueError("listener")

    with _paused(block) as passes:
        passes.go_on(0, 0)
        with pytest.raises(ValueError, match="listener"):
            passes.go_on(1, 0, fails)
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not [thread for thread in threading.enumerate() if thread.name == "paused-pass"]


def test_a_layer_that_is_passed_by_is_a_fault() -> None:
    """As in a pass that does not wait."""
    with _paused(_Block(passes_by=True)) as passes:
        passes.go_on(0, 0)
        with pytest.raises(CheckpointError, match="c: the block passes this layer by"):
            passes.go_on(0, 1)


def test_where_a_pass_cannot_wait() -> None:
    """A matrix that is used several times has multiplied before all of its inputs were heard."""

    class Again(_Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.c(self.b(self.a(self.a(x))))
            return made

    assert not rehearse(Again(), CALL, torch.randn(2, 3, 4), NAMES, set()).waits_well


@pytest.mark.parametrize(("threads", "passes"), [(1, 64), (8, 64), (16, 32), (96, 5), (1024, 1)])
def test_how_many_may_wait(threads: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that their teams of threads are no more than 512 in all."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert most_waiting() == passes
