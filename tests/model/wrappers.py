"""A tiny random model of each wrapper of a language model and a vision tower, and an image prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_model, tokens_of_bytes

_TEXT: dict[str, Any] = {
    **tokens_of_bytes(),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# More blocks than the text has, all of them smaller.
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
}
# Qwen's three kinds of positions share the half of a head.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# Stands in the prompt for each feature vector of the image.
IMAGE_ID = 250
_QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}


def _llama4() -> Any:
    from transformers import Llama4Config

    # Four patches become one of four times the width.
    tower = {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32}
    tower |= {"vision_output_dim": 32}
    text = {"intermediate_size_mlp": 40, "num_local_experts": 4, "attention_chunk_size": 8}
    return Llama4Config(
        text_config=_TEXT | text,
        vision_config=_TOWER | tower,
        image_token_index=IMAGE_ID,
        tie_word_embeddings=False,
    )


def _gemma3() -> Any:
    from transformers import Gemma3Config

    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3Config(
        text_config=_TEXT | layers | {"tie_word_embeddings": True},
        vision_config=_TOWER | {"vision_use_head": False},
        image_token_index=IMAGE_ID,
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
    )


def _mistral3() -> Any:
    from transformers import Mistral3Config

    return Mistral3Config(
        text_config=_TEXT | {"model_type": "mistral"},
        vision_config=_TOWER | {"model_type": "pixtral", "head_dim": 8, "image_size": 56},
        image_token_index=IMAGE_ID,
        tie_word_embeddings=False,
    )


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": _MROPE},
        vision_config=_QWEN_TOWER,
        tie_word_embeddings=False,
        **_QWEN_IDS,
    )


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    tower = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return Qwen3VLConfig(
        text_config=_TEXT | {"rope_parameters": _MROPE | {"mrope_interleaved": True}},
        vision_config=_QWEN_TOWER | tower,
        tie_word_embeddings=False,
        **_QWEN_IDS,
    )


def _of(class_name: str, config: Callable[[], Any]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        import transformers

        with warnings.catch_warnings():
            # Llama 4's rotary table of the tower is complex, and not saved.
            warnings.simplefilter("ignore", UserWarning)
            return tiny_model(folder, getattr(transformers, class_name), config(), torch.float32)

    return build


WRAPPERS: Mapping[str, Callable[[Path], Path]] = {
    "llama4_with_tower": _of("Llama4ForConditionalGeneration", _llama4),
    "gemma3_with_tower": _of("Gemma3ForConditionalGeneration", _gemma3),
    "mistral3": _of("Mistral3ForConditionalGeneration", _mistral3),
    "qwen2_5_vl": _of("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    "qwen3_vl": _of("Qwen3VLForConditionalGeneration", _qwen3_vl),
}


def image_prompt(name: str) -> dict[str, torch.Tensor]:
    """What the wrapper's processor would make of a text with one random image of a few patches."""
    generator = torch.Generator().manual_seed(0)
    features = 1 if name == "llama4_with_tower" else 4
    ids_BT = torch.tensor([[7, 8, *[IMAGE_ID] * features, 9, 10, 11]])
    if name.startswith("qwen"):
        # Patches in rows: 2 frames of 14 x 14 (Qwen2.5-VL) or 16 x 16 pixels, in squares of 2 x 2.
        side = 14 if name == "qwen2_5_vl" else 16
        pixels = torch.randn(16, 3 * 2 * side * side, generator=generator)
        return {
            "input_ids": ids_BT,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids_BT == IMAGE_ID).long(),
        }
    side = 56 if name == "mistral3" else 28
    made = {"input_ids": ids_BT, "pixel_values": torch.randn(1, 3, side, side, generator=generator)}
    if name == "mistral3":
        made["image_sizes"] = torch.tensor([[side, side]])
    if name == "gemma3_with_tower":
        made["token_type_ids"] = (ids_BT == IMAGE_ID).long()
    return made
