"""Decodes a compressed-tensors folder tensor by tensor, into the layout that the source had.

For what ``transformers`` cannot load itself: experts that are written one by one, as engines want them, of
a model that keeps them in 3-D parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError
from compressor.model.names import insert
from compressor.spec import LinearPart

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

# A source tensor and the matrices that lie inside it, as a family's ``Role.parts`` says.
FusedTensor = tuple[str, Sequence[LinearPart]]

MARKER = "weight_scale"


def stored_names(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of ``folder`` that holds it."""
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where.update(dict.fromkeys(file.keys(), path))
    if not where:
        raise CheckpointError("no .safetensors file in this folder", where=str(folder))
    return where


def decoded_tensors(
    folder: Path, quantization_config: Mapping[str, Any], fused: Sequence[FusedTensor]
) -> dict[str, torch.Tensor]:
    """Every tensor of the source as the checkpoint now has it: quantized ones decoded, the rest as stored.

    Args:
        folder: a folder of safetensors files.
        quantization_config: that entry of its ``config.json``.
        fused: the source tensors that hold several matrices, and the module that each was written as.

    Raises:
        CheckpointError: a quantized module has no scheme, or a part of a fused tensor is missing.
    """
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for path in sorted(set(stored_names(folder).values())):
        stored.update(load_file(path))
    config = QuantizationConfig.model_validate(dict(quantization_config))
    modules = [name.removesuffix(f".{MARKER}") for name in stored if name.endswith(f".{MARKER}")]
    with torch.no_grad():
        for module in modules:
            stored[f"{module}.weight"] = _decode(stored, module, _scheme(config, module))
        for name, parts in fused:
            if any(f"{part.module}.weight" in stored for part in parts):
                stored[name] = _fuse(stored, name, parts)
    return stored


def _scheme(config: QuantizationConfig, module: str) -> QuantizationScheme:
    """The first group that targets the module by name or, as all linear layers, by class."""
    from compressed_tensors.utils.match import match_name

    if not any(match_name(module, ignored) for ignored in config.ignore or ()):
        for scheme in config.config_groups.values():
            if "Linear" in scheme.targets or any(match_name(module, target) for target in scheme.targets):
                return scheme
    raise CheckpointError("quantized, but no group of quantization_config claims it", where=module)


def _decode(stored: dict[str, torch.Tensor], module: str, scheme: QuantizationScheme) -> torch.Tensor:
    """Takes the module's tensors out of ``stored``; returns its weight [out_features, in_features]."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    layout = scheme.format or infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(str(layout))
    names = compressor.compression_param_names(scheme)
    try:
        local = {name: stored.pop(f"{module}.{name}") for name in names}
    except KeyError as error:
        raise CheckpointError(f"tensor {error.args[0]} is missing", where=module) from error
    weight: torch.Tensor = compressor.decompress(local, scheme)["weight"]
    return weight


def _fuse(stored: dict[str, torch.Tensor], name: str, parts: Sequence[LinearPart]) -> torch.Tensor:
    """Takes the parts' weights out of ``stored``; returns the source's tensor, [E, I, O] or [O, I]."""
    missing = [part.module for part in parts if f"{part.module}.weight" not in stored]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of its {len(parts)} parts are missing: {missing[0]}", where=name
        )
    first = parts[0]
    rows = max(part.row_start + part.out_features for part in parts)
    matrix = (first.in_features, rows) if first.transposed else (rows, first.in_features)
    experts = () if first.expert is None else (1 + max(part.expert or 0 for part in parts),)
    return insert([(part, stored.pop(f"{part.module}.weight")) for part in parts], (*experts, *matrix))
