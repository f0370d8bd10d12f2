"""What is known of a source's decoder from its headers alone: blocks, their matrices, how they are called.

Nothing here reads a weight: the model is called once with parameters that are one number each and take no
memory, which shows whether it can be walked block by block at all.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError
from compressor.model.blocks import Place, find_places
from compressor.model.listen import Layout, rehearse
from compressor.model.outside import Outside
from compressor.model.quiet import quiet
from compressor.model.skeleton import build_skeleton, compute_buffers, find_blocks, library_faults
from compressor.model.stubs import Call, Recorder
from compressor.model.tensor_map import TensorMap

# Tokens of the rehearsal: two short sequences.
_SHAPE = (2, 8)
# The number that every parameter of the rehearsal is.
_VALUE = 0.01


@dataclass
class Decoder:
    """A skeleton taken apart into its blocks.

    Attributes:
        source: whose weights they are.
        blocks: module paths, in order.
        tensors: how parameters are filled.
        recorder: runs what lies outside the blocks.
        places: of each block, its matrices.
        layouts: of each block, the order in which they are used.
        unheard: source tensor -> why its matrices' input cannot be heard.
    """

    source: Source
    blocks: tuple[str, ...]
    tensors: TensorMap
    recorder: Recorder
    places: tuple[tuple[Place, ...], ...] = ()
    layouts: tuple[Layout, ...] = ()
    unheard: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source, *, images: bool = False) -> Decoder:
        """Takes the source's model apart, with ``images`` the one that takes these as well.

        Raises:
            CheckpointError: a parameter has no tensor, there are no blocks, or the model cannot be walked.
        """
        where = source.label
        model = build_skeleton(source, images=images)
        tensors = TensorMap.of(model, source.headers, where)
        with library_faults(where, "its buffers cannot be computed"):
            compute_buffers(model, tensors.filled)
        blocks = find_blocks(model, tensors.filled, where)
        _check_ties(tensors, blocks, where)
        missing = sorted({name for name, _ in model.named_parameters()} - tensors.filled)
        if missing:
            raise CheckpointError(
                f"{len(missing)} parameters have no tensor, the first is {missing[0]}", where=where
            )
        made = cls(source, blocks, tensors, Recorder(model, blocks, where))
        made._find_places()
        made._rehearse()
        return made

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The blocks themselves, on the meta device."""
        return self.recorder.modules

    def copy_of(self, index: int) -> nn.Module:
        """A block of one's own, parameters still on the meta device; configs are shared."""
        module = self.modules[index]
        configs = (getattr(inner, "config", None) for inner in module.modules())
        return copy.deepcopy(module, {id(config): config for config in configs if config is not None})

    def _find_places(self) -> None:
        places = []
        for path, module in zip(self.blocks, self.modules, strict=True):
            found, unheard = find_places(module, path, self.tensors, self.source.headers, self.source.config)
            places.append(tuple(found))
            self.unheard |= unheard
        self.places = tuple(places)

    def _rehearse(self) -> None:
        """Records a call of every block, twice to see that none depends on another; then the layouts."""
        outside = Outside(self.tensors.model, torch.device("cpu"))
        outside.open(lambda _, empty: _one_number(empty), head=False)
        try:
            ids_BT = torch.arange(_SHAPE[0] * _SHAPE[1]).reshape(_SHAPE) % 7
            calls, hidden = self.recorder.rehearse(ids_BT)
        finally:
            outside.close()
        kinds: dict[object, Layout] = {}
        layouts = []
        for index in range(len(self.blocks)):
            kind = self._kind(index)
            layout = kinds.get(kind) or self._layout(index, calls[index], hidden)
            layouts.append(layout)
            # Blocks of equal modules that leave some of them out may leave out others.
            if not layout.unused and not calls[index].has_mappings:
                kinds[kind] = layout
            for place in self.places[index]:
                if place.owner in layout.unused:
                    self.unheard[place.piece.tensor] = "its layer is never called"
                elif place.owner in layout.repeated:
                    self.unheard[place.piece.tensor] = "its layer is called several times in one pass"
        self.layouts = tuple(layouts)

    def _kind(self, index: int) -> object:
        """Equal for blocks of equal modules and matrices."""
        module = self.modules[index]
        return (
            tuple((name, type(inner)) for name, inner in module.named_modules()),
            tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters()),
            frozenset((place.owner, place.phase) for place in self.places[index]),
        )

    def _layout(self, index: int, call: Call, hidden: torch.Tensor) -> Layout:
        module = self.copy_of(index)
        for inner in module.modules():
            for name, parameter in inner.named_parameters(recurse=False):
                inner._parameters[name] = nn.Parameter(_one_number(parameter), requires_grad=False)
            for name, buffer in inner.named_buffers(recurse=False):
                inner._buffers[name] = _one_number(buffer) if buffer.is_meta else buffer
        linear = {place.owner for place in self.places[index] if not place.phase}
        experts = {place.owner for place in self.places[index] if place.phase}
        with library_faults(self.source.label, f"{self.blocks[index]} cannot be computed alone"), quiet():
            return rehearse(module, call, hidden, linear, experts)


def _one_number(empty: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape and dtype that takes the memory of one element; where it is 3-D, of one entry."""
    value = _VALUE if empty.is_floating_point() else 0
    if empty.dim() < 3:
        return torch.full((), value, dtype=empty.dtype).expand(empty.shape)
    # Grouped matrix products refuse matrices without strides.
    return torch.full(empty.shape[1:], value, dtype=empty.dtype).expand(empty.shape)


def _check_ties(tensors: TensorMap, blocks: tuple[str, ...], where: str) -> None:
    parent = blocks[0].rpartition(".")[0] + "."
    for name, other in tensors.model.all_tied_weights_keys.items():
        if name.startswith(parent) or other.startswith(parent):
            raise CheckpointError(f"blocks share weights ({name} is {other})", where=where)
