"""What else decides what a checkpoint means: config.json's numbers, generation_config.json, the vocabulary.

Both engines read the same files, so that they agree on wrong ones; only the source tells.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.layout import load_config
from compressor.checkpoint.stored import StoredTensors
from compressor.errors import CheckpointError
from compressor.model.load import load_tokenizer
from compressor.model.quiet import quiet
from compressor.verify.base import Check
from compressor.verify.inputs import own_folder
from compressor.verify.structure.contents import dumped, json_object
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
# Who wrote generation_config.json.
_WRITTEN_BY = frozenset({"transformers_version", "_from_model_config"})
_GENERATION = "generation_config.json"
_SHOWN = 3


def check_meaning(checkpoint: Path, source: Source, *, near: Path) -> Check:
    """``meaning``: both configs say of the model what the source's say, and the tokenizer has its ids.

    Token ids that begin and end a text are compared in generation_config.json, where the source has one:
    engines generate by it. Texts that are templates are not compared.

    Args:
        checkpoint: the folder.
        source: what it was made from.
        near: a folder for temporary files, made where it is missing; used for a GGUF source.

    Raises:
        CheckpointError: config.json has become unreadable.
    """
    config = load_config(StoredTensors(checkpoint).small_file("config.json"), "config.json")
    fault = _told("config.json", _differences(_read(config), _read(source.config), _BESIDES))
    fault = fault or _generation_fault(checkpoint, source, near)
    if fault:
        return Check("meaning", "failed", fault)
    theirs = _tokenizer(source)
    if not has_vocabulary(os.listdir(checkpoint)) or theirs is None:
        return Check("meaning", "passed", "the configs say what the source's do; no tokenizer to compare")
    try:
        ours = load_tokenizer(checkpoint)
    except CheckpointError as error:
        return Check("meaning", "failed", f"the tokenizer {error.what}")
    if ours.get_vocab() != theirs.get_vocab():
        return Check("meaning", "failed", "the tokenizer's vocabulary is not the source's")
    return Check("meaning", "passed", "configs and vocabulary say what the source's do")


def _generation_fault(checkpoint: Path, source: Source, near: Path) -> str:
    """How generation_config.json differs from the source's, or "": a source without one is no measure."""
    theirs = _source_generation(source, near)
    if theirs is None:
        return ""
    if not StoredTensors(checkpoint).has_file(_GENERATION):
        return f"{_GENERATION} is missing, the source has one: copy it from the source"
    try:
        ours = json_object(checkpoint.resolve(), _GENERATION)
    except CheckpointError as error:
        return f"{error.what}: copy it from the source"
    return _told(_GENERATION, _differences(ours, theirs, _WRITTEN_BY))


def _source_generation(source: Source, near: Path) -> dict[str, Any] | None:
    """The source's generation_config.json; None where it has none that can be read."""
    own = own_folder(source)
    try:
        if own is not None:
            return json_object(own.resolve(), _GENERATION)
        near.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="side-files.tmp-", dir=near) as folder:
            source.write_side_files(Path(folder))
            return json_object(Path(folder).resolve(), _GENERATION)
    except CheckpointError:
        return None


def _told(file: str, different: list[str]) -> str:
    """The first few differences of a file in one sentence, or ""."""
    if not different:
        return ""
    more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return f"{file} differs from the source's: {'; '.join(different[:_SHOWN])}{more}"


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


def _differences(ours: Any, theirs: Any, besides: frozenset[str], place: str = "") -> list[str]:
    """A sentence for every value that differs, with its dotted place; keys of ``besides`` do not count."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            sentence
            for key in sorted({*map(str, ours), *map(str, theirs)} - besides)
            for sentence in _differences(
                ours.get(key), theirs.get(key), besides, f"{place}.{key}" if place else key
            )
        ]
    return [] if ours == theirs else [f"{place} is {dumped(ours)} instead of {dumped(theirs)}"]
