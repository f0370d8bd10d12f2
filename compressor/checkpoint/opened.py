"""Any checkpoint opened for a look: a folder, a GGUF file, a Hub repository, shipped headers, an adapter.

Config and headers only, whatever the weights are stored as; no weights are read, and no torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compressor.checkpoint import gguf_config, gguf_file
from compressor.checkpoint.folder import small_file
from compressor.checkpoint.gguf import rope_factors
from compressor.checkpoint.hub import HubSource
from compressor.checkpoint.layout import load_config, parse_index, stated_quantization, weight_files
from compressor.checkpoint.modelopt import CONFIG_NAME, with_description
from compressor.checkpoint.safetensors_file import load_json, read_header
from compressor.checkpoint.safetensors_writer import INDEX_NAME
from compressor.checkpoint.shipped import TENSORS_NAME, ShippedHeaders
from compressor.checkpoint.sources import local_path
from compressor.checkpoint.stored import StoredTensors
from compressor.checkpoint.taken_apart import StoredTensor
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

Form = Literal["folder", "gguf", "hub", "headers", "adapter"]
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What AutoAWQ and AutoGPTQ wrote beside config.json before transformers read it from there.
_OLD_CONFIGS = (("quant_config.json", "awq"), ("quantize_config.json", "gptq"))
_PREFIX = {"token_embd.": "model.embed_tokens.", "output.": "lm_head.", "blk.": "model.layers."}
_MOST_FILES = 100_000


@dataclass(frozen=True)
class Opened:
    """A checkpoint's description and headers.

    Attributes:
        label: its path, Hub id and commit, or what shipped headers call it.
        form: what it is.
        config: contents of config.json with what older files beside it say of quantization; of GGUF as far
            as it can be rebuilt; empty for an adapter alone.
        tensors: every stored tensor, in file order; of GGUF under Hugging Face names where they are known.
        files: weight file -> bytes.
        names: the other files that it holds, ``/`` where they lie in a subfolder.
        read_small: contents of one of these; raises CheckpointError.
        folder: the local folder, or None where it lies elsewhere or is one file.
        facts: what a GGUF file calls itself, name -> text.
    """

    label: str
    form: Form
    config: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    files: Mapping[str, int]
    names: frozenset[str]
    read_small: Callable[[str], bytes]
    folder: Path | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def json_object(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file of the checkpoint; None where there is no such file.

        Raises:
            CheckpointError: it is not a JSON object, or cannot be read.
        """
        if name not in self.names:
            return None
        found = load_json(self.read_small(name), self.label, name)
        if not isinstance(found, dict):
            raise CheckpointError(f"{name} is not a JSON object", where=self.label)
        return found


def open_any(checkpoint: str, *, revision: str | None = None) -> Opened:
    """Opens what ``checkpoint`` names: a folder, a .gguf file, ``pkg:PACKAGE/FILE.gguf``, or a Hub id.

    Raises:
        CheckpointError: there is no such thing, or it cannot be read as a checkpoint.
        HubUnavailable: the Hub cannot be reached, or does not let us in.
    """
    try:
        path = local_path(checkpoint, None)
    except CheckpointError as error:
        if (
            checkpoint.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"))
            or ":" in checkpoint
        ):
            raise
        raise CheckpointError(
            "no such folder", where=checkpoint, fix="name a checkpoint's folder, a .gguf file, or a Hub id"
        ) from error
    if path is None:
        return _of_hub(HubSource(checkpoint, revision, quantized=True))
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(path, checkpoint)
    return open_folder(path, checkpoint)


def open_folder(folder: Path, label: str | None = None) -> Opened:
    """Opens a local folder: of a checkpoint, of shipped headers, or of an adapter alone.

    Raises:
        CheckpointError: none of these, or a file in it is broken.
    """
    label = label or str(folder)
    if not folder.is_dir():
        what = "a file, and no folder" if folder.is_file() else "no such folder"
        raise CheckpointError(what, where=label, fix="name a checkpoint's folder")
    resolved = folder.resolve()
    names = _files_of(resolved)

    def read_small(name: str) -> bytes:
        return small_file(resolved, name, label)

    if "config.json" not in names and ADAPTER_CONFIG in names and _ADAPTER_WEIGHTS in names:
        file = read_header(resolved / _ADAPTER_WEIGHTS)
        sizes = {_ADAPTER_WEIGHTS: file.file_bytes}
        return Opened(
            label, "adapter", {}, _stored(file.headers.values()), sizes, names, read_small, resolved
        )
    config = load_config(read_small("config.json"), f"{label}/config.json")
    config = _with_description(config, names, read_small, label)
    if TENSORS_NAME in names and not any(name.endswith(".safetensors") for name in names):
        headers = ShippedHeaders(resolved, quantized=True).headers
        return Opened(label, "headers", config, _stored(headers.values()), {}, names, read_small, resolved)
    tensors = StoredTensors(resolved)
    lead = weight_files(names, label)
    shards = sorted(set(parse_index(read_small(lead), label).values())) if lead == INDEX_NAME else [lead]
    sizes = {shard: (resolved / shard).stat().st_size for shard in shards}
    return Opened(
        label, "folder", config, _stored(tensors.headers.values()), sizes, names, read_small, resolved
    )


def _files_of(folder: Path) -> frozenset[str]:
    """The files in a folder and, one level down, in its own folders."""
    found = []
    for name in sorted(os.listdir(folder))[:_MOST_FILES]:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            found += [f"{name}/{inner}" for inner in sorted(os.listdir(path))[:_MOST_FILES]]
        elif path.is_file():
            found.append(name)
    return frozenset(found)


def _with_description(
    config: dict[str, Any], names: frozenset[str], read_small: Callable[[str], bytes], label: str
) -> dict[str, Any]:
    """The config with what a file beside it says of the quantization, where it says nothing itself."""
    if stated_quantization(config):
        return config
    if CONFIG_NAME in names:
        return with_description(config, read_small(CONFIG_NAME), label)
    for name, method in _OLD_CONFIGS:
        found = load_json(read_small(name), label, name) if name in names else None
        if isinstance(found, dict):
            return {**config, "quantization_config": {"quant_method": method, **found}}
    return config


def _of_hub(source: HubSource) -> Opened:
    names = frozenset(source.files)
    config = _with_description(source.config, names, source.small_file, source.label)
    stored = _stored(source.headers.values())
    return Opened(source.label, "hub", config, stored, source.file_bytes, names, source.small_file)


def _of_gguf(path: Path, label: str) -> Opened:
    """One GGUF file; of architectures that are not read here only what needs no config."""
    header = gguf_file.read_gguf_header(path)
    named: dict[str, str] = {}
    try:
        architecture = gguf_config.architecture(header, label)
        config = gguf_config.build_config(header, rope_factors(path, header.tensors, label), label)
        # The metadata may claim any number of layers.
        if config["num_hidden_layers"] <= len(header.tensors):
            expected = gguf_config.expected_tensors(config, architecture)
            named = {name: entry.name for name, entry in expected.items()}
    except CheckpointError:
        config = {}
    config = config or _told_by(header.metadata)
    tensors = tuple(
        StoredTensor(named.get(found.name) or _renamed(found.name), found.kind, found.shape, found.nbytes)
        for found in header.tensors.values()
    )
    facts = {
        key.rpartition(".")[2]: str(header.metadata[key])[:100]
        for key in ("general.name", "general.architecture")
        if isinstance(header.metadata.get(key), str)
    }
    facts["part"] = f"{header.metadata.get('split.no', 0)} of {header.metadata.get('split.count', 1)}"
    if facts["part"] in ("0 of 1", "0 of 0"):
        del facts["part"]
    sizes = {path.name: header.file_bytes}
    return Opened(label, "gguf", config, tensors, sizes, frozenset(), lambda _: b"", None, facts)


def _told_by(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Of an architecture that is not read here: what every GGUF says, under the names of configs."""
    name = metadata.get("general.architecture")
    keys = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
    }
    stated = {key: metadata.get(f"{name}.{told}") for told, key in keys.items()}
    found: dict[str, Any] = {key: value for key, value in stated.items() if type(value) is int}
    return found | ({"model_type": f"gguf:{name[:40]}"} if isinstance(name, str) else {})


def _renamed(name: str) -> str:
    """A GGUF name that no table knows, its ends and blocks spelt as Hugging Face does."""
    prefix = next((prefix for prefix in _PREFIX if name.startswith(prefix)), None)
    found = name if prefix is None else _PREFIX[prefix] + name.removeprefix(prefix)
    return found.replace("_exps.", ".experts.")


def _stored(headers: Iterable[TensorHeader]) -> tuple[StoredTensor, ...]:
    return tuple(StoredTensor(one.name, one.dtype, one.shape, one.nbytes) for one in headers)
