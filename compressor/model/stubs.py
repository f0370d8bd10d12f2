"""Records how a model calls its blocks: stubs in their place, everything before them for real.

The model's own forward runs once for each batch; a stub notes the call and returns the hidden states as they
came. A call is replayed later with other hidden states, so nothing else in it may depend on what a block
computes: that is checked here, and a model that passes more from block to block is refused.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor.model.quiet import quiet
from compressor.model.skeleton import library_faults

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class _Hidden:
    """Stands for the hidden states in a recorded call."""


HIDDEN = _Hidden()


@dataclass(frozen=True)
class Call:
    """The arguments of one block for one batch, with ``HIDDEN`` in the place of the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def has_mappings(self) -> bool:
        """Whether a block could leave something for later blocks in an argument."""
        return any(isinstance(value, Mapping) for value in (*self.args, *self.kwargs.values()))

    def replay(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that ``module`` makes of ``hidden``.

        Raises:
            CheckpointError: the block changed a mapping that is meant for the blocks after it as well.
        """
        args = [self._given(value, hidden) for value in self.args]
        kwargs = {name: self._given(value, hidden) for name, value in self.kwargs.items()}
        made = module(*args, **kwargs)
        for given, recorded in zip(
            (*args, *kwargs.values()), (*self.args, *self.kwargs.values()), strict=True
        ):
            if isinstance(recorded, Mapping) and not _same_value(dict(given), dict(recorded)):
                kind = type(module).__name__
                raise CheckpointError(f"{kind} leaves something for later blocks: it cannot be run alone")
        result = made[0] if isinstance(made, tuple) else made
        assert isinstance(result, torch.Tensor)
        return result

    @staticmethod
    def _given(value: Any, hidden: torch.Tensor) -> Any:
        if value is HIDDEN:
            return hidden
        return copy.copy(value) if isinstance(value, Mapping) else value


class Stub(nn.Module):
    """Takes a block's place in the model; whatever the model asks of the block besides is the block's own."""

    def __init__(self, block: nn.Module, called: Callable[..., Any]) -> None:
        super().__init__()
        self._stands_for = [block]  # in a list, so that its parameters are not the stub's
        self._called = called

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Notes the call and returns what the recorder says."""
        return self._called(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)


class _Recorded(BaseException):
    """Leaves the model's forward after its last block; no library's handler may take it for a fault."""


class Recorder:
    """Runs a model whose blocks are stubs.

    Args:
        model: its blocks are replaced by stubs for good.
        blocks: their module paths.
        where: the checkpoint, for messages.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str], where: str) -> None:
        self._model = model
        self._where = where
        self._count = len(blocks)
        self._kept: list[torch.Tensor] = []
        self._returns_tuple = False
        self._final: torch.Tensor | None = None
        self._calls: list[Call] = []
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._added = 0.0
        self._first: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        parent, _, _ = blocks[0].rpartition(".")
        modules = model.get_submodule(parent)
        self.modules = tuple(modules.children())
        for index, module in enumerate(self.modules):
            setattr(modules, str(index), Stub(module, self._caller(index)))

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors that the recorded calls share."""
        return sum(tensor.nbytes for tensor in self._kept)

    def rehearse(self, ids_BT: torch.Tensor) -> tuple[list[Call], torch.Tensor]:
        """As ``record``, but keeps nothing, and checks that the calls do not depend on the blocks' outputs.

        Raises:
            CheckpointError: the model does not pass plain hidden states from block to block.
        """
        try:
            calls, hidden = self._run(ids_BT)
        except CheckpointError:
            # Some models take the hidden states out of a tuple; if this one does not, the first fault counts.
            self._returns_tuple = True
            try:
                calls, hidden = self._run(ids_BT)
            except CheckpointError:
                self._returns_tuple = False
                calls, hidden = self._run(ids_BT)
        self._added = 1.0
        others, _ = self._run(ids_BT)
        self._added = 0.0
        # Equal tensors are kept once, so that equal calls hold the same objects.
        if not all(_same(call, other) for call, other in zip(calls, others, strict=True)):
            raise self._refused("its blocks are called with more that depends on the blocks before them")
        self._kept = []
        return calls, hidden

    def record(
        self, ids_BT: torch.Tensor, others: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[list[Call], torch.Tensor]:
        """The call of every block and the hidden states that reach the first one.

        Tensors that calls share, within a batch and over batches, are kept once. ``others``: what the model
        takes beside token ids, of images.

        Raises:
            CheckpointError: as ``rehearse``, which comes first.
        """
        return self._run(ids_BT, others)

    def finish(self, hidden: torch.Tensor, *, gradients: bool = False) -> torch.Tensor:
        """The logits [B, T, vocabulary] that the model makes of its last block's output ``hidden``.

        ``gradients``: whether they lead back to ``hidden``.
        """
        self._final = hidden
        width = self._model.get_input_embeddings().weight.shape[1]
        # Only their shape counts: the stubs pass them by.
        embeds = torch.zeros(*hidden.shape[:2], width, dtype=hidden.dtype, device=hidden.device)
        try:
            told = library_faults(self._where, "the head cannot be run alone")
            with torch.set_grad_enabled(gradients), quiet(), told:
                logits = self._model(inputs_embeds=embeds, use_cache=False).logits
        finally:
            self._final = None
        assert isinstance(logits, torch.Tensor)
        return logits

    def _run(
        self, ids_BT: torch.Tensor, others: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[list[Call], torch.Tensor]:
        self._calls, self._seen, self._first, self._last = [], {}, None, None
        try:
            with torch.no_grad(), quiet(), library_faults(self._where, "its blocks cannot be recorded"):
                self._model(input_ids=ids_BT, use_cache=False, **(others or {}))
        except _Recorded:
            pass
        else:
            raise self._refused(f"{len(self._calls)} of its {self._count} blocks are called")
        finally:
            self._seen, self._last = {}, None
        first, self._first = self._first, None
        assert first is not None
        return self._calls, first

    def _caller(self, index: int) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            return self._note(index, args, kwargs)

        return called

    def _note(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            raise self._refused("its blocks are not called with hidden states")
        if self._final is not None:
            found = self._final if index == self._count - 1 else hidden
            return (found,) if self._returns_tuple else found
        if index != len(self._calls):
            raise self._refused("its blocks are not called once each, in order")
        if index and hidden is not self._last:
            raise self._refused("it computes something between its blocks")
        self._first = hidden if index == 0 else self._first
        self._last = hidden + self._added if self._added else hidden
        self._calls.append(
            Call(
                tuple(self._plain(value, hidden) for value in args),
                {name: self._plain(value, hidden) for name, value in kwargs.items()},
            )
        )
        if index == self._count - 1:
            raise _Recorded
        return (self._last,) if self._returns_tuple else self._last

    def _plain(self, value: Any, hidden: torch.Tensor) -> Any:
        if value is hidden:
            return HIDDEN
        if isinstance(value, torch.Tensor):
            return self._once(value)
        if isinstance(value, tuple):
            return tuple(self._plain(item, hidden) for item in value)
        if type(value) in (dict, UserDict):
            return type(value)({key: self._plain(item, hidden) for key, item in value.items()})
        if isinstance(value, _PLAIN):
            return value
        raise self._refused(f"its blocks share a {type(value).__name__}, which they may change")

    def _once(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or an equal one that is kept already."""
        if id(tensor) not in self._seen:
            equal = (
                kept
                for kept in self._kept
                if kept.shape == tensor.shape and kept.dtype == tensor.dtype and torch.equal(kept, tensor)
            )
            kept = next(equal, None)
            if kept is None:
                kept = tensor
                self._kept.append(kept)
            # The original is held as well: its id must not be given to another.
            self._seen[id(tensor)] = (tensor, kept)
        return self._seen[id(tensor)][1]

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{type(self._model).__name__} cannot be walked block by block: {why}", where=self._where
        )


def _same(one: Call, other: Call) -> bool:
    return _same_value(one.args, other.args) and _same_value(one.kwargs, other.kwargs)


def _same_value(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one is other
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same_value, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same_value(one[name], other[name]) for name in one)
    return bool(one == other)
