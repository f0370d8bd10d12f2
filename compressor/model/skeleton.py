"""The source's module tree without its weights: parameters on the meta device, computed buffers for real.

It is built as transformers 5.17 builds a model before loading it (``modeling_utils.py`` from_pretrained), so
that classes, attention and experts implementations are those of an ordinarily loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.checkpoint.made_by import allowed_factory
from compressor.errors import CheckpointError
from compressor.model.architecture import model_class
from compressor.model.load import refuse_fetched_kernels
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_skeleton(source: Source, *, images: bool = False) -> PreTrainedModel:
    """The model of the source's config in evaluation mode, every parameter on the meta device.

    Its buffers are there too; see ``compute_buffers``. With ``images`` it is the class that takes images
    besides text, where there are two.

    Raises:
        CheckpointError: transformers does not know the architecture, or cannot build it; or the config asks
            for code from the Hub.
    """
    factory = allowed_factory(source)
    if factory is not None:
        from compressor.model.factory import make_skeleton

        with quiet(), torch.no_grad():
            return make_skeleton(factory, source.config).eval()
    refuse_fetched_kernels(source.config, source.label)
    with library_faults(source.label, "cannot be built"), quiet(), torch.no_grad():
        model = _on_meta(source.config, images)
        model.eval()
        return model


def compute_buffers(model: PreTrainedModel, stored: set[str]) -> None:
    """Computes buffers that are not ``stored`` in the checkpoint, on the CPU, as loading does: float32."""
    with quiet(), torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            # transformers initializes only what lacks this mark
            if name in stored or isinstance(tensor, nn.Parameter):
                tensor._is_hf_initialized = True
        for name, buffer in list(model.named_buffers()):
            module, _, leaf = name.rpartition(".")
            if name in stored:
                model.get_submodule(module)._buffers[leaf] = buffer.to("meta")
            elif buffer.is_meta:
                model.get_submodule(module)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        model.initialize_weights()


def find_blocks(model: PreTrainedModel, filled: set[str], where: str) -> tuple[str, ...]:
    """The module paths of the decoder's repeated blocks, in order.

    They are the outermost ``nn.ModuleList`` of the text decoder that holds the most parameters; all of these
    must be among ``filled``, the parameters that the checkpoint has tensors for.

    Raises:
        CheckpointError: there is no such list, or a parameter in it has no tensor.
    """
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = dict(_outermost_lists(decoder, prefix))
    sizes = {
        name: sum(parameter.numel() for parameter in modules.parameters()) for name, modules in lists.items()
    }
    if not any(sizes.values()):
        raise CheckpointError(
            f"{type(model).__name__} has no list of repeated blocks to walk through", where=where
        )
    path = max(sizes, key=lambda name: sizes[name])
    missing = [
        f"{path}.{name}" for name, _ in lists[path].named_parameters() if f"{path}.{name}" not in filled
    ]
    if missing:
        raise CheckpointError(
            f"{len(missing)} parameters of the blocks have no tensor, the first is {missing[0]}", where=where
        )
    return tuple(f"{path}.{index}" for index in range(len(lists[path])))


@contextmanager
def library_faults(where: str, what: str, *, fix: str = "") -> Iterator[None]:
    """Tells whatever a library raises inside as a fault of the checkpoint: one line, ``what`` and why."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the libraries raise anything from KeyError to their own classes
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise CheckpointError(f"{what}: {type(error).__name__}: {reason}", where=where, fix=fix) from error


def _on_meta(raw: dict[str, Any], images: bool) -> PreTrainedModel:
    from transformers import CONFIG_MAPPING
    from transformers.utils import ContextManagers

    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"transformers does not know model_type {model_type!r}")
    config_class = CONFIG_MAPPING[model_type]
    # config.json has infinity as an object.
    config = config_class.from_dict(config_class._decode_special_floats(deepcopy(raw)))
    chosen, config = model_class(config, images=images)
    # The evaluation's loader reads into float32 and casts the parameters afterwards (load.py).
    nested = (getattr(config, key, None) for key in config.sub_configs)
    for part in (config, *(found for found in nested if found is not None)):
        part.dtype = torch.float32
        # Collected from the blocks, which are not there, and nobody asks for them.
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False
    with ContextManagers(chosen.get_init_context(torch.float32, False, False, False)):
        model: PreTrainedModel = chosen(config)
    return model


def _outermost_lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every ``nn.ModuleList`` that lies in no other, by its path."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield inner, child
        else:
            yield from _outermost_lists(child, inner)
