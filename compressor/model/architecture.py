"""Which of transformers' classes a config.json is loaded as, and what they call the checkpoint's modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def auto_classes(config: Any) -> tuple[Any, ...]:
    """The auto classes that have a model for a parsed config, that for text before that for images and text.

    Some wrappers have a class of their own for text alone (Llama 4), some one class for both (Gemma 3), some
    none for text (Qwen3-VL).

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    found = tuple(
        auto
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText)
        if type(config) in auto._model_mapping
    )
    if not found:
        raise CheckpointError(
            f"transformers has no causal language model of model_type {config.model_type!r}"
        )
    return found


def model_class(config: Any, *, images: bool = False) -> tuple[type[PreTrainedModel], Any]:
    """The model's class and the config that it takes, which is that of the text where the class is.

    Args:
        config: a parsed config.json.
        images: the class that takes images besides, where there are two.

    Raises:
        CheckpointError: as ``auto_classes``.
    """
    from transformers.models.auto.auto_factory import _get_model_class

    found = auto_classes(config)
    chosen: type[PreTrainedModel] = _get_model_class(config, found[-1 if images else 0]._model_mapping)
    if chosen.config_class is config.sub_configs.get("text_config"):  # as the auto class does
        quantization = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantization is not None:
            config.quantization_config = quantization
    return chosen, config
