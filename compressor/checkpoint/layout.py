"""What every checkpoint in the Hugging Face layout has in common, whether in a folder or on the Hub.

Pure functions over file names and bytes: nothing here opens a file, and nothing that was read is trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
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
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "*.tiktoken", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json"),
    *("chat_template.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
# Not "I32" and wider: buffers such as position ids have those types in unquantized checkpoints.
_PACKED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8"})


def is_side_file(name: str) -> bool:
    """Whether ``name`` is a tokenizer, template, processor, generation or licence file."""
    return any(fnmatchcase(name, pattern) for pattern in _SIDE_FILES)


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
    raise CheckpointError("no safetensors weights", where=where)


def parse_config(raw: bytes, where: str) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        CheckpointError: it is not a JSON object, or says that the weights are already quantized.
    """
    config = load_json(raw, where, "config.json")
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not a JSON object", where=where)
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
            raise _already_quantized(f"config.json has a quantization_config ({str(method)[:40]})", where)
    return config


def card_license(raw: bytes) -> str | None:
    """The licence identifier in the front matter of a model card, or None where it states none."""
    found = re.match(rb"---\r?\n(?:.*\r?\n)*?license: *([A-Za-z0-9._-]{1,64}) *\r?\n", raw[:_CARD_BYTES])
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
    shards: Mapping[str, FileHeader], weight_map: Mapping[str, str], where: str
) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """All tensors over the shards, in file order, and the shard of each.

    Args:
        shards: shard name -> its checked header.
        weight_map: the index; empty for a single file.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a tensor lies in two shards or not where the index says, or is already quantized.
    """
    headers: dict[str, TensorHeader] = {}
    homes: dict[str, str] = {}
    for shard, file in shards.items():
        for name, header in file.headers.items():
            if name in headers:
                raise CheckpointError(f"tensor {name} lies in both {homes[name]} and {shard}", where=where)
            if header.dtype in _PACKED_DTYPES:
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
    sizes: Mapping[str, int],
    contents: Iterable[bytes],
) -> str:
    """Hex sha256 that names a source's contents.

    Args:
        config: contents of config.json.
        headers: every tensor.
        sizes: file name -> bytes.
        contents: what tells apart two sources of equal headers: the Hub commit, or samples of the files.
    """
    digest = hashlib.sha256(json.dumps([config, sizes], sort_keys=True).encode())
    for header in headers.values():
        digest.update(f"{header.name}\0{header.dtype}\0{header.shape}\n".encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _already_quantized(evidence: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"already quantized: {evidence}",
        where=where,
        fix="use the 16-bit original. GGUF sources are dequantized; quantized safetensors sources are not "
        "available in this version",
    )
