"""A source's model with the weights that its compressed checkpoint decodes to, put together here."""

from __future__ import annotations

from typing import Any

import torch

from compressor.model.decode import StoredWeights
from compressor.model.load import set_dtype


def reference(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], weights: StoredWeights) -> Any:
    """The source's tensors as the checkpoint has them: decoded where quantized, experts put together."""
    tensors = {key: after.get(key, tensor).float() for key, tensor in before.items()}
    for module in weights.modules:
        weight_OI = weights.weight(module)
        if f"{module}.weight" in before:
            tensors[f"{module}.weight"] = weight_OI
            continue
        owner, _, rest = module.partition(".experts.")
        number, leaf = rest.split(".")
        fused_EIO = tensors[f"{owner}.experts.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"]
        start = weight_OI.shape[0] if leaf == "up_proj" else 0
        fused_EIO[int(number), :, start : start + weight_OI.shape[0]] = weight_OI.T
    return tensors


@torch.no_grad()
def logits(model: Any, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """What it makes of a prompt, with parameters rounded to bfloat16, as compressed-tensors decodes some."""
    set_dtype(set_dtype(model, torch.bfloat16), torch.float32)
    found: torch.Tensor = model(**prompt, use_cache=False).logits
    return found
