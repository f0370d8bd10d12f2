"""What else decides what a checkpoint means: the architecture's numbers in config.json, and the vocabulary.

Both engines read the same config.json, so that they agree on a wrong one; only the source tells.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.layout import load_config
from compressor.checkpoint.stored import StoredTensors
from compressor.errors import CheckpointError
from compressor.model.load import load_tokenizer
from compressor.model.quiet import quiet
from compressor.verify.base import Check
from compressor.verify.structure.contents import dumped
from compressor.verify.structure.side_files import has_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How weights are stored, who wrote the file, and what only a training or generating program reads.
_BESIDES = frozenset(
    {
        *("quantization_config", "compression_config", "dtype", "torch_dtype", "transformers_version"),
        *("_name_or_path", "_attn_implementation", "_attn_implementation_internal", "auto_map", "use_cache"),
        *("initializer_range", "pretraining_tp", "output_router_logits", "router_aux_loss_coef"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states"),
        *("return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
    }
)
_SHOWN = 3


def check_meaning(checkpoint: Path, source: Source) -> Check:
    """``meaning``: config.json says of the model what the source's says, and the tokenizer has its ids.

    Token ids that end a text, and texts that are templates, are not compared.

    Raises:
        CheckpointError: config.json has become unreadable.
    """
    config = load_config(StoredTensors(checkpoint).small_file("config.json"), "config.json")
    different = _differences(_read(config), _read(source.config))
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        text = f"config.json differs from the source's: {'; '.join(different[:_SHOWN])}{more}"
        return Check("meaning", "failed", text)
    theirs = _tokenizer(source)
    if not has_vocabulary(os.listdir(checkpoint)) or theirs is None:
        return Check("meaning", "passed", "config.json says what the source's does; no tokenizer to compare")
    try:
        ours = load_tokenizer(checkpoint)
    except CheckpointError as error:
        return Check("meaning", "failed", f"the tokenizer {error.what}")
    if ours.get_vocab() != theirs.get_vocab():
        return Check("meaning", "failed", "the tokenizer's vocabulary is not the source's")
    return Check("meaning", "passed", "config.json and vocabulary say what the source's do")


def _tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(source)
    except CheckpointError:
        return None


def _read(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers completes it: spellings of a key, and defaults, come out alike."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return config
    plain = {key: value for key, value in config.items() if key not in _BESIDES}
    try:
        with quiet():
            read: dict[str, Any] = CONFIG_MAPPING[model_type].from_dict(plain).to_dict()
    except Exception:  # a stranger's values break a constructor in any way; the plain ones are compared
        return config
    return read


def _differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """A sentence for every value that differs, with its dotted place."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            sentence
            for key in sorted({*map(str, ours), *map(str, theirs)} - _BESIDES)
            for sentence in _differences(ours.get(key), theirs.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if ours == theirs else [f"{place} is {dumped(ours)} instead of {dumped(theirs)}"]
