"""Other positions for a loaded model: its rotary modules made anew from another config, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@contextmanager
def positions_of(model: PreTrainedModel, config: Mapping[str, Any], label: str) -> Iterator[None]:
    """Within it the model turns queries and keys as one that is built from ``config`` does.

    Its rotary modules are made by their own class from that config, so that layer types, parts of a head and
    multipliers are what transformers makes of it; the weights stay.

    Args:
        model: whose decoder has rotary modules that are made from its config.
        config: contents of a config.json that differs in its positions only.
        label: of the source, for faults.

    Raises:
        CheckpointError: no such module is found, or transformers takes no such config; or the model has
            latent attention, whose softmax YaRN scales too.
    """
    from transformers import AutoConfig

    found = rotary_modules(model)
    if not found:
        raise CheckpointError(
            "no rotary module that is made from its config: other factors cannot be tried",
            where=label,
            fix="use a method without a search, such as yarn",
        )
    try:
        text = AutoConfig.for_model(**config).get_text_config()
        made = [type(old)(config=text).to(model.device) for _, _, old in found]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"transformers cannot make these positions: {error}", where=label) from error
    kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    if kind == "yarn" and getattr(text, "qk_rope_head_dim", None):
        raise CheckpointError(
            "YaRN scales latent attention outside its rotary modules, too: load it with that config",
            where=label,
        )
    try:
        for (parent, name, _), new in zip(found, made, strict=True):
            setattr(parent, name, new)
        yield
    finally:
        for parent, name, old in found:
            setattr(parent, name, old)


def rotary_modules(model: PreTrainedModel) -> list[tuple[nn.Module, str, Any]]:
    """The rotary modules of the text decoder: the module that holds it, under which name, and itself."""
    of_text = type(model.config.get_text_config())
    found = []
    for parent in model.modules():
        for name, module in parent.named_children():
            buffers = [key for key, _ in module.named_buffers(recurse=False)]
            # Vision towers have rotary modules of their own, made from their own config or from numbers.
            if isinstance(getattr(module, "config", None), of_text) and any(
                key.endswith("inv_freq") for key in buffers
            ):
                found.append((parent, name, module))
    return found
