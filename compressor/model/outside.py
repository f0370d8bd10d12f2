"""What lies outside the blocks (embedding, final norm, head), loaded where the model comes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parameter or stored buffer, by its name and its meta tensor -> the real one.
Make = Callable[[str, torch.Tensor], torch.Tensor]


class Outside:
    """The modules outside the blocks.

    Those of the decoder are made at once, since models look at their weights' device before they call them;
    others when they are first called, so that a vision tower is never loaded.

    Args:
        model: a skeleton whose blocks are stubs.
        device: where computed buffers go.
        towers: whether images will pass, so that their towers are made at once too: models ask their dtype.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, towers: bool = False) -> None:
        self._towers = towers
        self._modules = [(name, module) for name, module in model.named_modules() if _own(module)]
        self._input, self._output = model.get_input_embeddings(), model.get_output_embeddings()
        self._decoder = set(model.get_decoder().modules())
        self._handles: list[RemovableHandle] = []
        self._loaded: list[tuple[nn.Module, str, torch.Tensor]] = []
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def open(self, make: Make, *, head: bool) -> None:
        """Fills modules by ``make`` from now on; the output embedding with ``head``, else the input's."""
        assert not self._handles, "open already"
        unwanted = self._input if head else self._output
        for name, module in self._modules:
            fill = self._filler(name, make)
            at_once = module in self._decoder or module is self._output or (self._towers and not head)
            if at_once and module is not unwanted:
                fill(module, None)
            else:
                self._handles.append(module.register_forward_pre_hook(fill))

    def close(self) -> None:
        """Frees what was loaded."""
        for handle in self._handles:
            handle.remove()
        for module, name, empty in self._loaded:
            _set(module, name, empty)
        self._handles, self._loaded = [], []

    def _filler(self, path: str, make: Make) -> Callable[[nn.Module, object], None]:
        def fill(module: nn.Module, _: object) -> None:
            for name, tensor in _own(module).items():
                if tensor.is_meta:
                    self._loaded.append((module, name, tensor))
                    _set(module, name, make(f"{path}.{name}" if path else name, tensor))

        return fill


def as_parameter(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter as the ordinary loader makes it.

    Whether it requires a gradient decides, even where none is computed, how torch multiplies by it (ATen
    LinearAlgebra.cpp should_fold), and thereby the last bits.
    """
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers, those without a value only."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None and tensor.is_meta}


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        module._parameters[name] = as_parameter(tensor)
