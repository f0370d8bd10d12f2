"""Models that transformers does not know, made by an installed package, in the dress of one that it knows.

Their forward takes token ids [B, T] and gives logits [B, T, vocabulary], alone, first in a tuple, or as an
attribute ``logits``. The repeated blocks are found as in any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from compressor.checkpoint.made_by import MODEL_TYPE, factory_arguments
from compressor.errors import CheckpointError
from compressor.model.skeleton import library_faults

_PREFIX = "module"
# Tokens of the pass that tells the vocabulary.
_TRIED = 8


class MadeConfig(PreTrainedConfig):  # type: ignore[misc]
    """Holds nothing: what a factory is told is in config.json."""

    model_type = MODEL_TYPE


class MadeModel(PreTrainedModel):  # type: ignore[misc]
    """A module with the methods of transformers' models that are used here."""

    config_class = MadeConfig
    base_model_prefix = _PREFIX

    def __init__(self, module: nn.Module) -> None:
        super().__init__(MadeConfig())
        self.module = module
        self.post_init()
        first: dict[int, str] = {}
        ties = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            known = first.setdefault(id(parameter), name)
            if known != name:
                ties[name] = known
        self.all_tied_weights_keys = ties

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: torch.Tensor | None = None,
        **_: object,
    ) -> CausalLMOutput:
        """Logits [B, T, vocabulary], at ``logits_to_keep`` only where that is given.

        ``inputs_embeds`` stand for so many tokens whose values do not count (``stubs.Recorder.finish``).
        """
        if input_ids is None:
            assert inputs_embeds is not None
            input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        made = self.module(input_ids)
        logits = made if isinstance(made, torch.Tensor) else getattr(made, "logits", None)
        if logits is None and isinstance(made, tuple) and made:
            logits = made[0]
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            raise TypeError(f"its forward gives {type(made).__name__}, not logits of every token")
        return CausalLMOutput(logits=logits if logits_to_keep is None else logits[:, logits_to_keep])

    def get_decoder(self, modality: object = None) -> nn.Module:
        """The module."""
        return self.module

    def get_input_embeddings(self) -> nn.Module:
        """One of a single number: which embedding is the input's cannot be told, nor need it be."""
        return nn.Embedding(1, 1)

    def get_output_embeddings(self) -> None:
        """None: see ``get_input_embeddings``."""


def make_skeleton(factory: str, config: Mapping[str, Any]) -> MadeModel:
    """The model of a config.json, parameters on the meta device, buffers with the values they are made with.

    Raises:
        CheckpointError: the factory cannot be imported or called, or makes no module.
    """
    with _meta_parameters():
        return MadeModel(_call(factory, config))


def make_model(factory: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> MadeModel:
    """The model with ``tensors`` for parameters and stored buffers, in float32 and in evaluation mode.

    Raises:
        CheckpointError: as ``make_skeleton``; a parameter has no tensor, or a tensor no place.
    """
    model = MadeModel(_call(factory, config))
    model.float().eval()
    with torch.no_grad():
        missing, unexpected = model.module.load_state_dict(dict(tensors), strict=False)
    tied = {name.removeprefix(f"{_PREFIX}.") for pair in model.all_tied_weights_keys.items() for name in pair}
    lacking = [name for name in missing if name not in tied or not tied.intersection(tensors)]
    if lacking or unexpected:
        what = f"has no tensor for {lacking[0]}" if lacking else f"has no place for {unexpected[0]}"
        raise CheckpointError(f"the model that {factory} makes does not fit: the checkpoint {what}")
    with torch.no_grad(), library_faults(factory, "its forward does not take token ids"):
        model.config.vocab_size = model(torch.zeros(1, _TRIED, dtype=torch.long)).logits.shape[-1]
    return model


def _call(factory: str, config: Mapping[str, Any]) -> nn.Module:
    path, _, name = factory.partition(":")
    try:
        found: Any = import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
        made = found(**factory_arguments(config))
    except Exception as error:  # the code is anybody's
        raise CheckpointError(
            f"{factory} does not make the model of config.json: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise CheckpointError(f"{factory} makes a {type(made).__name__}, not a torch module")
    return made


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Within it parameters lose their memory as soon as a module has them; buffers are left alone."""
    register: Callable[..., None] = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    with patch.object(nn.Module, "register_parameter", registered):
        yield
