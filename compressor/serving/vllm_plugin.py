"""The entry point ``vllm.general_plugins``: layers with packed slots in vLLM 0.32, and in 0.26.

vLLM's hooks for a backend, ``register_backend`` and ``AttentionBackend.customize_spec``, are not told which
layer they serve, so that one backend cannot give layers different slots. ``Attention`` however takes a
backend for each layer, which models do not pass. ``register`` therefore wraps ``Attention.__init__``: layers
that the served model's plan packs are given one, all others pass unchanged.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any

from compressor.errors import UserError

if TYPE_CHECKING:
    from compressor.kv.plan import LayerPlan

_WRAPPED = "_compressor_kv"
_logger = logging.getLogger("vllm.compressor")


def register() -> None:
    """Makes vLLM follow ``kv_plan.json``; called by vLLM in each of its processes, more than once."""
    from vllm.model_executor.layers.attention.attention import Attention

    if hasattr(Attention, _WRAPPED):
        return
    setattr(Attention, _WRAPPED, True)
    Attention.__init__ = _with_plan(Attention.__init__)
    from vllm.v1.attention.backend import AttentionBackend

    if not hasattr(AttentionBackend, "customize_spec"):  # vLLM 0.26
        Attention.get_kv_cache_spec = _with_customized_spec(Attention.get_kv_cache_spec)


def _with_plan(init: Any) -> Any:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def planned(*args: Any, **kwargs: Any) -> None:
        asked = signature.bind(*args, **kwargs).arguments
        layer = _layer_plan(asked)
        if layer is None:
            init(*args, **kwargs)
            return
        from compressor.serving.paged import PagedCodecs
        from compressor.serving.vllm_backend import backend_of

        codecs = PagedCodecs.of(layer)
        packed = {"attn_backend": backend_of(codecs.slot_bytes), "codecs": codecs}
        init(*args, **(kwargs | packed))

    return planned


def _with_customized_spec(get_kv_cache_spec: Any) -> Any:
    @functools.wraps(get_kv_cache_spec)
    def customized(self: Any, vllm_config: Any) -> Any:
        from compressor.serving.vllm_backend import PackedBackend

        spec = get_kv_cache_spec(self, vllm_config)
        if issubclass(self.attn_backend, PackedBackend):
            return self.attn_backend.customize_spec(spec)
        return spec

    return customized


def _layer_plan(asked: dict[str, Any]) -> LayerPlan | None:
    """How the layer that ``Attention`` is asked to make is packed; None where it is vLLM's business.

    Raises:
        UserError: the plan packs a layer that the plug-in cannot pack.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.attention.backend import AttentionType

    from compressor.serving.served_plan import served_plan

    config = get_current_vllm_config()
    if config.model_config is None or asked.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER:
        return None
    plan = served_plan(config.model_config.model, config.cache_config.cache_dtype)
    if plan is None:
        return None
    count = config.model_config.hf_text_config.num_hidden_layers
    if max(plan.layers) >= count:
        raise UserError(f"the plan of the KV cache has layer {max(plan.layers)}, the model {count} layers")
    name = asked.get("kv_sharing_target_layer_name") or asked.get("prefix", "")
    layer = plan.layers.get(extract_layer_index(name))
    if layer is None or layer.keys is None:
        return None
    problem = _problem(asked, layer)
    if problem is not None:
        raise UserError(f"the plan of the KV cache packs {name}, but {problem}")
    _say_once(config.model_config.model, plan.bits, plan.token_bytes)
    return layer


def _problem(asked: dict[str, Any], layer: LayerPlan) -> str | None:
    """Why this layer cannot be packed, in words for the user."""
    heads = asked.get("num_kv_heads") or asked["num_heads"]
    head_dim, value_dim = asked["head_size"], asked.get("head_size_v")
    cache = asked.get("cache_config")
    window = asked.get("per_layer_sliding_window") or getattr(cache, "sliding_window", None)
    if (heads, head_dim) != (layer.kv_heads, layer.head_dim):
        return (
            f"it has {heads} KV heads of {head_dim} here, {layer.kv_heads} of {layer.head_dim} in the plan "
            "(tensor parallelism divides heads: it is not supported)"
        )
    if value_dim not in (None, head_dim):
        return "its values are not of the keys' size"
    if window is not None:
        return "it has a sliding window"
    if asked.get("attn_backend") is not None:
        return f"its model gives it a backend of its own, {asked['attn_backend'].__name__}"
    if asked.get("logits_soft_cap") or asked.get("alibi_slopes") or asked.get("use_alibi_sqrt"):
        return "it has soft caps or ALiBi, which the plug-in's attention does not compute"
    if asked.get("extra_impl_args"):
        return f"the plug-in's attention does not know {', '.join(sorted(asked['extra_impl_args']))}"
    return None


@functools.cache
def _say_once(model: str, bits: float, token_bytes: int) -> None:
    _logger.warning(
        "KV cache of %s is packed by its plan: %.3f bits an element, %d bytes a token. Attention over it is "
        "computed in plain torch: memory is saved, time is not.",
        model,
        bits,
        token_bytes,
    )
