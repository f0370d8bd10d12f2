"""Finds a folder's quantization config, in either dialect, and says where there is none or two."""

from __future__ import annotations

from typing import Any

from compressor.checkpoint.modelopt import CONFIG_NAME
from compressor.errors import CheckpointError
from compressor.report.words import short_name
from compressor.verify.structure.compressed import CompressedTensors
from compressor.verify.structure.contents import Contents, json_object
from compressor.verify.structure.findings import Findings
from compressor.verify.structure.layouts import CODE_DTYPES, MARKERS
from compressor.verify.structure.modelopt import Facts, ModelOpt, contradictions, from_config, from_file
from compressor.verify.structure.quant_config import QuantConfig, Unquantized, stated


class NotChecked(Exception):
    """The weights are stored in a way that is another program's; the message names it."""


def read_quant_config(stored: Contents, found: Findings) -> QuantConfig | None:
    """How the folder says that it is quantized; None, with the fault in ``found``, where that is unclear.

    Raises:
        NotChecked: a method that transformers knows and this program does not.
    """
    assert stored.config is not None, "a folder without config.json says nothing"
    try:
        entry = stated(stored.config)
        file = _file_facts(stored)
        method = str(entry.get("quant_method", "")) if entry else ""
        if entry is not None and not method.startswith("modelopt"):
            return _other(entry, method, file, found)
        return _modelopt(from_config(entry) if entry else None, file, stored, found)
    except CheckpointError as error:
        found.add(f"{error.what}: export the checkpoint again")
        return None


def _file_facts(stored: Contents) -> Facts | None:
    if not (stored.folder / CONFIG_NAME).exists():
        return None
    return from_file(json_object(stored.folder, CONFIG_NAME))


def _other(entry: dict[str, Any], method: str, file: Facts | None, found: Findings) -> QuantConfig:
    """The reading of an entry of config.json that is not ModelOpt's."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if method == "compressed-tensors":
        if file is not None:
            found.add(f"config.json says {method}, {CONFIG_NAME} ModelOpt {file.algo}: remove the wrong one")
        return CompressedTensors(entry)
    if method in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise NotChecked(f"quant_method {method!r}: only compressed-tensors and ModelOpt are checked")
    named = f"quant_method {short_name(method)!r}" if method else "quantization_config without quant_method"
    raise CheckpointError(f"{named}: no engine knows how to read that")


def _modelopt(
    config: Facts | None, file: Facts | None, stored: Contents, found: Findings
) -> QuantConfig | None:
    """ModelOpt's config from either file, or none where nothing is quantized."""
    if config is not None and file is not None:
        for sentence in contradictions(config, file):
            found.add(sentence)
    facts = config or file
    if facts is not None:
        return ModelOpt(facts)
    quantized = quantized_modules(stored)
    if not quantized:
        return Unquantized()
    found.add(
        "quantized, but config.json has no quantization_config: engines would load codes as weights; put the "
        "entry back or export again",
        *quantized,
    )
    return None


def quantized_modules(stored: Contents) -> dict[str, set[str]]:
    """Module -> local names of its tensors, for every module with codes or scales."""
    modules: dict[str, set[str]] = {}
    quantized = set()
    for name, header in stored.headers.items():
        module, _, local = name.rpartition(".")
        modules.setdefault(module, set()).add(local)
        if local in MARKERS or (local == "weight" and header.dtype in CODE_DTYPES):
            quantized.add(module)
    return {module: modules[module] for module in modules if module in quantized}
