"""First values of an EAGLE-3 head: the target's own last layer, as far as it fits.

Legend: D hidden size, O outputs, E dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compressor.drafts.eagle3 import Eagle3Head

_LAYER = "layers.0."
# Of the head's layer -> where a target's layer may have it: dense, and the expert that all tokens pass
# (transformers 5.17, Llama4TextDecoderLayer).
_SAME = {
    "self_attn.o_proj.weight": ("self_attn.o_proj.weight",),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
    "hidden_norm.weight": ("input_layernorm.weight",),
    **{
        f"mlp.{name}_proj.weight": (
            f"mlp.{name}_proj.weight",
            f"feed_forward.{name}_proj.weight",
            f"feed_forward.shared_expert.{name}_proj.weight",
        )
        for name in ("gate", "up", "down")
    },
}
_READERS = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def warm_start(head: Eagle3Head, model: PreTrainedModel) -> tuple[str, ...]:
    """Fills a head from the target's last layer and last norm; names of the tensors that were filled.

    Queries, keys and values read the hidden state as the last layer does, and the embedding not at all;
    ``fc`` hands the last of the hidden states through. What has another shape stays as it was: a layer that
    norms its queries and keys (Llama 4) gives no projections of these.

    Args:
        head: changed in place.
        model: the target, its weights decoded.
    """
    decoder = model.get_decoder()
    # transformers 5.17: Llama4ForCausalLM names itself.
    decoder = decoder.model if decoder is model else decoder
    last = decoder.layers[-1]
    found: dict[str, torch.Tensor] = {"norm.weight": decoder.norm.weight}
    theirs = dict(last.named_parameters())
    for name, places in _SAME.items():
        for place in places:
            if place in theirs:
                found[_LAYER + name] = theirs[place]
                break
    for leaf in _readers(last):
        weight_OD = theirs.get(f"self_attn.{leaf}.weight")
        if weight_OD is not None:
            if _turns_neighbours(last) and leaf != "v_proj":
                weight_OD = _halves(weight_OD, head.shape.head_dim)
            found[f"{_LAYER}self_attn.{leaf}.weight"] = torch.cat(
                [torch.zeros_like(weight_OD), weight_OD], dim=1
            )
    return _filled(head, found)


def _filled(head: Eagle3Head, found: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    done = []
    for name, parameter in head.named_parameters():
        if name == "fc.weight":
            parameter.zero_()
            parameter[:, -len(parameter) :].fill_diagonal_(1)
            done.append(name)
        elif name in found and found[name].shape == parameter.shape:
            parameter.copy_(found[name])
            done.append(name)
    return tuple(done)


def _readers(last: nn.Module) -> tuple[str, ...]:
    return _READERS[2:] if hasattr(last.get_submodule("self_attn"), "qk_norm") else _READERS


def _turns_neighbours(last: nn.Module) -> bool:
    """Whether pairs of neighbouring dimensions are turned (Llama 4), not those of two halves."""
    return bool(getattr(last.get_submodule("self_attn"), "use_rope", False))


def _halves(weight_OD: torch.Tensor, dims: int) -> torch.Tensor:
    """Rows of each head: pairs of neighbours -> the first of all pairs, then the second."""
    pairs = weight_OD.reshape(-1, dims // 2, 2, weight_OD.shape[1])
    return pairs.transpose(1, 2).reshape(weight_OD.shape)
