"""The fallback for architectures without a family: cautious, and it says what it took for what."""

from __future__ import annotations

import re
from typing import Any

from compressor.model.families.naming import FOLDED, block_index, common_role, leaf, whole
from compressor.spec import Role, TensorHeader

# Why a 2-D weight inside a block is no projection to quantize: words of its name's components -> reason.
_EXCEPTIONS = (
    (re.compile(r"(^|_)(gate|router)$|^gate_weight$"), "router or gate"),
    (re.compile(r"norm|^ln(_|$)|^ln\d"), "norm"),
    (re.compile(r"emb|^wpe$|relative|position"), "embedding or position table"),
    (re.compile(r"conv"), "convolution"),
    (
        re.compile(r"bias|^A$|^A_log$|^D$|^dt($|_)|^x_proj$|^in_proj_(a|b|ba)$|lora"),
        "small state or gate weight",
    ),
)
# Modules that stay whole: vLLM 0.32 builds their layers without a quantization config, or in part.
_WHOLE_MODULES = (("mamba", "Mamba mixer"), ("indexer", "sparse-attention indexer"))
# transformers' Conv1D stores [in_features, out_features]; a 2-D weight is then not [out, in].
_CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt"})


class GenericFamily:
    """Takes every 2-D ``.weight`` inside a numbered block for a projection, unless its name says otherwise.

    Args:
        model_type: the unknown ``model_type``, for the plan's sentence; may be empty.
    """

    name = "generic"
    model_types: tuple[str, ...] = ()
    renamed = False

    def __init__(self, model_type: str) -> None:
        self.inferred = (
            f"model_type {model_type!r} has no family of its own: 2-D weights inside numbered blocks were "
            "taken for projections; routers, gates, norms, convolutions, embeddings, 3-D tensors and what "
            "lies outside of blocks stay as they are"
        )

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """The role as far as name and shape tell it; what cannot be told is ``other`` with the reason."""
        common = common_role(header, config)
        if common is not None:
            return common
        if len(header.shape) > 2:
            return Role("other", reason=_many_dimensions(header))
        if block_index(header.name) is None:
            return Role("other", reason="outside of the repeated blocks")
        if not header.name.endswith(".weight"):
            return Role("other", reason="a parameter that is not a layer's weight")
        if config.get("model_type") in _CONV1D_MODEL_TYPES:
            return Role("other", reason="stored transposed (Conv1D), which this version does not read")
        module = header.name.removesuffix(".weight")
        for component, reason in _WHOLE_MODULES:
            if component in module.split("."):
                return Role("other", reason=reason)
        for words, reason in _EXCEPTIONS:
            if words.search(leaf(module)):
                return Role("other", reason=reason)
        # Latent attention, of whatever architecture (DeepSeek-V3.2, GLM-4.7-Flash).
        return Role("linear", (whole(header, module),), FOLDED if leaf(module) == "kv_b_proj" else "")


def _many_dimensions(header: TensorHeader) -> str:
    """Why a tensor of three or more dimensions is copied."""
    if "conv" in header.name:
        return "convolution"
    if "expert" in header.name:
        return f"experts fused into one {len(header.shape)}-D tensor whose layout is not known"
    return f"a {len(header.shape)}-D tensor whose layout is not known"
