"""A source's whole model in memory, with the places of its matrices: for work that no single block can do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError
from compressor.model.blocks import Place, find_places
from compressor.model.skeleton import build_skeleton, compute_buffers, find_blocks, library_faults
from compressor.model.tensor_map import TensorMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class WholeModel:
    """A model with all of its parameters, none of which asks for a gradient; in evaluation mode.

    Attributes:
        model: computes.
        blocks: module paths of its blocks, in order.
        tensors: which source tensors its parameters consist of.
        places: of each block, the matrices of source tensors whose layer can be told.
    """

    model: PreTrainedModel
    blocks: tuple[str, ...]
    tensors: TensorMap
    places: tuple[tuple[Place, ...], ...]

    @classmethod
    def load(cls, source: Source, *, dtype: torch.dtype, device: torch.device) -> WholeModel:
        """Reads the source, parameters into ``dtype``, buffers as they are; peak memory is one tensor more.

        Raises:
            CheckpointError: transformers cannot build it, a parameter has no tensor, or cannot be read.
        """
        where = source.label
        model = build_skeleton(source)
        tensors = TensorMap.of(model, source.headers, where)
        with library_faults(where, "its buffers cannot be computed"):
            compute_buffers(model, tensors.filled)
        blocks = find_blocks(model, tensors.filled, where)
        missing = sorted({name for name, _ in model.named_parameters()} - tensors.filled)
        if missing:
            raise CheckpointError(
                f"{len(missing)} parameters have no tensor, the first is {missing[0]}", where=where
            )
        places = []
        for path in blocks:
            found, _ = find_places(model.get_submodule(path), path, tensors, source.headers, source.config)
            places.append(tuple(found))
        _fill(model, tensors, source, dtype, device)
        model.config.dtype = dtype
        return cls(model, blocks, tensors, tuple(places))

    def twin(self) -> PreTrainedModel:
        """The model's modules once more, with the very same parameters and buffers."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [config for inner in self.model.modules() if (config := getattr(inner, "config", None))]
        return copy.deepcopy(self.model, {id(shared): shared for shared in kept})


def _fill(
    model: PreTrainedModel, tensors: TensorMap, source: Source, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives every parameter and buffer of a skeleton its values."""
    targets: dict[str, torch.Tensor] = {}
    # Tied parameters are one and stay one.
    made: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if not tensor.is_meta:
                module._buffers[leaf] = tensor.to(device)
                continue
            cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=dtype if cast else tensor.dtype, device=device)
                made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if cast else empty
            targets[f"{path}.{leaf}" if path else leaf] = made[id(tensor)]
            if leaf in module._buffers:
                module._buffers[leaf] = made[id(tensor)]
            else:
                module._parameters[leaf] = _parameter(made[id(tensor)])
    tensors.fill(source, targets)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
