"""Recorded calls: what is kept of them, and the models that cannot be recorded."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor.model.stubs import HIDDEN, Call, Recorder, Stub

IDS = torch.arange(12).reshape(2, 6)
Blocks = list[Callable[..., Any]]


class _Model(nn.Module):
    """Calls its blocks by ``flow``; embeds each token as its number."""

    def __init__(self, flow: Callable[[torch.Tensor, Blocks], torch.Tensor], count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.embedding = nn.Embedding(12, 4)
        self.flow = flow

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = True,
    ) -> Any:
        assert not use_cache
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embedding(input_ids)
        return SimpleNamespace(logits=2 * self.flow(inputs_embeds, list(self.layers)))


def _recorder(flow: Callable[[torch.Tensor, Blocks], torch.Tensor]) -> Recorder:
    model: Any = _Model(flow)
    return Recorder(model, ["layers.0", "layers.1", "layers.2"], "here")


def _plain(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    mask = torch.ones(x.shape[1])
    for number, block in enumerate(blocks):
        x = block(x, mask=mask, number=number, pair=(mask * 2, None))
    return x


def _tuples(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    for block in blocks:
        x = block(hidden_states=x, output_attentions=False)[0]
    return x


def test_calls_hold_arguments_once() -> None:
    """Equal tensors are one, over blocks and batches; hidden states are left out."""
    recorder = _recorder(_plain)
    recorder.rehearse(IDS)
    first, hidden = recorder.record(IDS)
    second, _ = recorder.record(IDS)
    assert torch.equal(hidden, recorder._model.get_input_embeddings()(IDS))
    assert [call.args for call in first] == [(HIDDEN,)] * 3
    assert [call.kwargs["number"] for call in first] == [0, 1, 2]
    masks = [call.kwargs["mask"] for call in (*first, *second)]
    pairs = [call.kwargs["pair"][0] for call in (*first, *second)]
    assert all(mask is masks[0] for mask in masks)
    assert all(pair is pairs[0] for pair in pairs)
    assert recorder.kept_bytes == 2 * 6 * 4


@pytest.mark.parametrize("flow", [_plain, _tuples])
def test_the_head_alone(flow: Callable[[torch.Tensor, Blocks], torch.Tensor]) -> None:
    """What the model does after its last block, whether blocks return tensors or tuples."""
    recorder = _recorder(flow)
    recorder.rehearse(IDS)
    recorder.record(IDS)
    final = torch.randn(2, 6, 4)
    assert torch.equal(recorder.finish(final), 2 * final)


def _between(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    for block in blocks:
        x = block(x) + 1
    return x


def _left_out(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    return blocks[1](blocks[0](x))


def _twice(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    return blocks[1](blocks[0](blocks[0](x)))


def _depending(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    for block in blocks:
        x = block(x, scale=x.mean())
    return x


def _list(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    for block in blocks:
        x = block(x, cache=[])
    return x


def _unpacked(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    for block in blocks:
        x, _, _ = block(x)
    return x


@pytest.mark.parametrize(
    ("flow", "why"),
    [
        (_between, "computes something between its blocks"),
        (_left_out, "2 of its 3 blocks are called"),
        (_twice, "not called once each, in order"),
        (_depending, "depends on the blocks before them"),
        (_list, "share a list, which they may change"),
        (_unpacked, "cannot be recorded: ValueError"),
    ],
)
def test_models_that_pass_more_from_block_to_block(
    flow: Callable[[torch.Tensor, Blocks], torch.Tensor], why: str
) -> None:
    """Each is refused with the reason, instead of being replayed wrongly."""
    with pytest.raises(CheckpointError, match=why):
        _recorder(flow).rehearse(IDS)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_block_must_not_leave_anything_for_later_blocks(kind: type[Any]) -> None:
    """A mapping is handed over as a copy; a block that changes it is refused, one that reads it is not."""

    class Reads(nn.Module):
        def forward(self, x: torch.Tensor, shared: Any) -> torch.Tensor:
            return x + len(shared)

    class Writes(nn.Module):
        def forward(self, x: torch.Tensor, shared: Any) -> torch.Tensor:
            shared["mine"] = x
            return x

    call = Call((HIDDEN, kind({"table": torch.ones(2)})), {})
    assert call.has_mappings
    assert torch.equal(call.replay(Reads(), torch.zeros(2)), torch.ones(2))
    with pytest.raises(CheckpointError, match="Writes leaves something"):
        call.replay(Writes(), torch.zeros(2))
    assert set(call.args[1]) == {"table"}


def test_a_stub_answers_for_its_block() -> None:
    """Models ask their blocks for attributes; the block's parameters are not the stub's."""
    block = nn.Linear(3, 5)
    stub = Stub(block, lambda x: x)
    assert stub.in_features == 3
    assert not list(stub.parameters())
    with pytest.raises(AttributeError):
        _ = stub.nothing
