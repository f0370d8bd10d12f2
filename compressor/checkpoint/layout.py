"""What every checkpoint in the Hugging Face layout has in common, whether in a folder or on the Hub.

Pure functions over file names and bytes: nothing here opens a file, and nothing that was read is trusted.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from compressor.checkpoint.safetensors_file import FileHeader, load_json
from compressor.checkpoint.safetensors_writer import INDEX_NAME
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

MAX_JSON_BYTES = 200_000_000
# Front matter stands at the top of a card.
_CARD_BYTES = 16384
SINGLE_NAME = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Everything beside weights and config.json that an engine or a reader of the result wants.
_SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v[0-9]*", "tekken.json"),
    *(
        "spiece.model",
        "sentencepiece.model",
        "sentencepiece.bpe.model",
        "*.tiktoken",
        "special_tokens_map.json",
    ),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json"),
    *("chat_template.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "image_processor_config.json", "feature_extractor_config.json"),
)
# Written in either case.
_LEGAL_FILES = ("license*", "licence*", "notice*", "copying*", "use_policy*")
# A folder of further templates, as transformers saves them (utils/hub.py CHAT_TEMPLATE_DIR).
TEMPLATES_FOLDER = "additional_chat_templates"
# What a killed writer leaves, here and in the workspace: never part of a checkpoint.
_TEMPORARY = "*.tmp-*"
# Beyond these a config.json is not a model's: floats hold such integers exactly, and nothing nests deeper.
MAX_INTEGER = 2**53
MAX_DEPTH = 32
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Not "I32" and wider: buffers such as position ids have those types in unquantized checkpoints.
PACKED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8"})


def is_side_file(name: str) -> bool:
    """Whether ``name`` (with ``/`` where it lies in a subfolder) is a tokenizer, template, processor,
    generation or licence file.
    """
    if not name.isprintable() or fnmatchcase(name, _TEMPORARY):
        return False
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES_FOLDER and fnmatchcase(file, "*.jinja")
    return any(fnmatchcase(file, pattern) for pattern in _SIDE_FILES) or any(
        fnmatchcase(file.lower(), pattern) for pattern in _LEGAL_FILES
    )


def weight_files(names: Collection[str], where: str) -> str:
    """The file that leads to the weights: the index, or the only safetensors file.

    Raises:
        CheckpointError: there is none (pickles are refused with the reason), or which is unclear.
    """
    if INDEX_NAME in names:
        return INDEX_NAME
    if SINGLE_NAME in names:
        return SINGLE_NAME
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{len(found)} safetensors files but no {INDEX_NAME}",
            where=where,
            fix="download the index too: it says which files belong to the model",
        )
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(
            f"weights only as pickle ({pickles[0]}): pickle files can run code when loaded",
            where=where,
            fix="convert to safetensors (on the Hub: the safetensors/convert space) and use that folder",
        )
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        raise CheckpointError("a folder of GGUF files", where=where, fix=f"name the file itself: {ggufs[0]}")
    raise CheckpointError(
        "no safetensors weights", where=where, fix="name the folder that holds the model's shards"
    )


def parse_config(raw: bytes, where: str, *, quantized: bool = False) -> dict[str, Any]:
    """The contents of the ``config.json`` of a source.

    Raises:
        CheckpointError: what ``load_config`` refuses, or, unless they may be ``quantized``, it says that the
            weights are.
    """
    config = load_config(raw, where)
    found = stated_quantization(config)
    if found and not quantized:
        method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
        named = _shown(method).strip("'")
        raise _already_quantized(f"config.json has a quantization_config ({named})", where)
    return config


def stated_quantization(config: Mapping[str, Any]) -> object:
    """What a config.json says of how the weights are quantized, unchecked; None where it says nothing."""
    for part in _quantization_holders(config):
        for key in _QUANTIZATION_KEYS:
            if part.get(key):
                return part[key]
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model in 16 bit."""
    plain = copy.deepcopy(dict(config))
    for part in _quantization_holders(plain):
        for key in _QUANTIZATION_KEYS:
            part.pop(key, None)
    return plain


def _quantization_holders(config: Mapping[str, Any]) -> list[Any]:
    """The parts of a config that a quantization is stated in."""
    text_config = config.get("text_config")
    return [config, *([text_config] if isinstance(text_config, dict) else [])]


def load_config(raw: bytes, where: str) -> dict[str, Any]:
    """The contents of a ``config.json``, quantized or not, with the fields in it that code relies on checked.

    Every ``model_type`` is text or null, every ``architectures`` a list of texts or null, every integer is
    below ``MAX_INTEGER``, nothing is nested deeper than ``MAX_DEPTH``. Other fields may hold anything.

    Raises:
        CheckpointError: one of these is not so, or it is not a JSON object.
    """
    config = load_json(raw, where, "config.json")
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not a JSON object", where=where)
    level: list[tuple[str, Any]] = [("", config)]
    for _ in range(MAX_DEPTH):
        inner: list[tuple[str, Any]] = []
        for key, value in level:
            _check_field(key, value, where)
            if isinstance(value, dict):
                inner += value.items()
            elif isinstance(value, list):
                inner += ((f"{key}[]", item) for item in value)
        level = inner
    if level:
        raise CheckpointError(f"config.json is nested more than {MAX_DEPTH} deep", where=where)
    return config


def _check_field(key: str, value: object, where: str) -> None:
    """Refuses one field of a config.json, at any depth, that no model has."""
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        raise CheckpointError(f"config.json: {_shown(key)} has {_shown(value)}, beyond 2^53", where=where)
    if key == "model_type" and not isinstance(value, str | None):
        raise CheckpointError(f"config.json: model_type is {_shown(value)}, not a name", where=where)
    if key == "architectures" and not _is_names(value):
        raise CheckpointError(
            f"config.json: architectures is {_shown(value)}, not a list of names", where=where
        )


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _shown(value: object) -> str:
    """A few characters of a value for a message; escapes what cannot be printed."""
    return repr(value)[:40]


def card_license(raw: bytes) -> str | None:
    """The licence identifier in the front matter of a model card, or None where it states none."""
    found = re.match(
        rb"---\r?\n(?:[^\r\n]*\r?\n)*?license: *([A-Za-z0-9._-]{1,64}) *\r?\n", raw[:_CARD_BYTES]
    )
    return found[1].decode() if found else None


def parse_index(raw: bytes, where: str) -> dict[str, str]:
    """``weight_map`` of the index: tensor name -> shard, each shard a plain path below the folder.

    Raises:
        CheckpointError: it is not an index, or names a file outside the folder.
    """
    index = load_json(raw, where, INDEX_NAME)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME} has no weight_map", where=where)
    for shard in dict.fromkeys(str(shard) for shard in weight_map.values()):
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard or not shard.isprintable():
            raise CheckpointError(
                f"{INDEX_NAME} names a file outside the folder: {shard[:80]!r}", where=where
            )
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{INDEX_NAME} names {shard[:80]!r}, not a safetensors file", where=where)
    return {name: str(shard) for name, shard in weight_map.items()}


def merge_headers(
    shards: Mapping[str, FileHeader], weight_map: Mapping[str, str], where: str, *, quantized: bool = False
) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """All tensors over the shards, in file order, and the shard of each.

    Args:
        shards: shard name -> its checked header.
        weight_map: the index; empty for a single file.
        where: the checkpoint, for messages.
        quantized: whether packed dtypes may be among them; sources that are read as they lie must have none.

    Raises:
        CheckpointError: a tensor lies in two shards or not where the index says, or is already quantized.
    """
    headers: dict[str, TensorHeader] = {}
    homes: dict[str, str] = {}
    for shard, file in shards.items():
        for name, header in file.headers.items():
            if name in headers:
                raise CheckpointError(f"tensor {name} lies in both {homes[name]} and {shard}", where=where)
            if header.dtype in PACKED_DTYPES and not quantized:
                raise _already_quantized(f"tensor {name} is {header.dtype}", where)
            headers[name] = header
            homes[name] = shard
    for name, shard in weight_map.items():
        if homes.get(name) != shard:
            raise CheckpointError(
                f"{INDEX_NAME} says that tensor {name[:80]!r} is in {shard}: it is not", where=where
            )
    return headers, homes


def fingerprint(
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    files: Mapping[str, Sequence[int]],
    contents: Iterable[bytes],
) -> str:
    """Hex sha256 that names a source's contents.

    Args:
        config: contents of config.json.
        headers: every tensor.
        files: weight file -> its bytes and, for local files, its time of modification in ns.
        contents: what tells apart two sources of equal headers: the Hub commit, or samples of the weights
            and the side files.
    """
    digest = hashlib.sha256(json.dumps([config, files], sort_keys=True).encode())
    for header in headers.values():
        digest.update(f"{header.name}\0{header.dtype}\0{header.shape}\n".encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _already_quantized(evidence: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"already quantized: {evidence}",
        where=where,
        fix="use the 16-bit original, or read it as bfloat16: `model.from: dequantize` in the recipe, "
        "`--from dequantize` on the command line. GGUF sources are dequantized without being asked",
    )
