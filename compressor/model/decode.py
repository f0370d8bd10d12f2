"""Decodes a quantized folder tensor by tensor, in either dialect, into the layout that the source had."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.checkpoint import modelopt
from compressor.checkpoint.base import Source
from compressor.checkpoint.hf_config import quantization_config
from compressor.checkpoint.layout import load_config
from compressor.checkpoint.stored import StoredTensors
from compressor.errors import CheckpointError
from compressor.model.families import family_for
from compressor.model.names import insert, module_of
from compressor.spec import LinearPart

if TYPE_CHECKING:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

# A source tensor and the matrices that lie inside it, as a family's ``Role.parts`` says.
FusedTensor = tuple[str, Sequence[LinearPart]]

# Every quantized module has a tensor of this name, in both dialects and all formats.
MARKER = ".weight_scale"
# Formats that older configs state once for all groups.
_OF_ALL_GROUPS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
)


class QuantizedWeights:
    """The quantized modules of a checkpoint, decoded one by one.

    Attributes:
        dialect: whose layout it is.
        modules: the quantized modules, sorted.
        names: every tensor's name.

    Args:
        description: ``quantization_config``.
        method: its ``quant_method``.
        names: every tensor's name.
        read: gives a tensor by its name, as it lies; raises CheckpointError.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: another method, or experts quantized in one tensor.
    """

    dialect: Literal["compressed-tensors", "modelopt"]

    def __init__(
        self,
        description: Mapping[str, Any],
        method: str,
        names: Iterable[str],
        read: Callable[[str], torch.Tensor],
        where: str,
    ) -> None:
        self._config, self._read, self._where = description, read, where
        if method == "compressed-tensors":
            self.dialect = "compressed-tensors"
        elif method.startswith("modelopt"):  # engines tell its variants apart by what follows
            self.dialect = "modelopt"
        else:
            raise CheckpointError(
                f"quantized with {method[:40]!r}; only compressed-tensors and modelopt are read",
                where=self._where,
            )
        self.names = frozenset(names)
        fused = sorted(name for name in self.names if name.endswith("_weight_scale"))
        if fused:  # as ModelOpt writes Llama 4
            raise CheckpointError(
                f"experts quantized in one tensor are not read: {fused[0]}", where=self._where
            )
        self.modules = tuple(
            sorted(name.removesuffix(MARKER) for name in self.names if name.endswith(MARKER))
        )

    def scheme(self, module: str) -> QuantizationScheme:
        """How a quantized module is stored, as compressed-tensors describes it.

        In that dialect it is the first group that targets the module by name or, as all linear layers, by
        class.

        Raises:
            CheckpointError: the config does not claim the module, or names a format that is not read here.
        """
        if self.dialect == "modelopt":
            return self.algorithm(module).ct_scheme(["Linear"])
        from compressed_tensors.utils.match import match_name

        config = self._compressed_tensors
        if not any(match_name(module, ignored) for ignored in config.ignore or ()):
            for scheme in config.config_groups.values():
                if "Linear" in scheme.targets or any(match_name(module, name) for name in scheme.targets):
                    return scheme
        raise CheckpointError("quantized, but no group of quantization_config claims it", where=module)

    def weight(self, module: str) -> torch.Tensor:
        """A quantized module's weight, fp32 [out_features, in_features], as compressed-tensors decodes it.

        From scales in fp32, whatever they are stored in; NVFP4 and MXFP4 weights come out rounded to
        bfloat16, as the library defines them.

        Raises:
            CheckpointError: as ``scheme``; a tensor of the module is missing; or they do not fit together.
        """
        return self.decode(module, self.local(module))

    def decode(self, module: str, local: dict[str, torch.Tensor]) -> torch.Tensor:
        """``weight`` from the module's tensors as ``local`` gives them, or from some rows of each."""
        import torch

        scheme, local = self.scheme(module), dict(local)
        if local["weight_scale"].dtype in (torch.float16, torch.bfloat16):
            local["weight_scale"] = local["weight_scale"].float()
        compressor = _compressor(scheme, module)
        with _fitting(module), torch.no_grad():
            weight: torch.Tensor = compressor.decompress(local, scheme)["weight"]
        return weight.float()

    def stored(self, name: str) -> torch.Tensor:
        """Any tensor as it lies on disk.

        Raises:
            CheckpointError: there is none of this name.
        """
        return self._read(name)

    def local(self, module: str) -> dict[str, torch.Tensor]:
        """Local name -> tensor of a quantized module in compressed-tensors' layout, whatever the folder's is.

        Raises:
            CheckpointError: as ``weight``.
        """
        found = {name.removeprefix(f"{module}."): self.stored(name) for name in self.parts(module)}
        return self.respelled(module, found)

    def respelled(self, module: str, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``local`` from the module's tensors as the checkpoint names and shapes them."""
        if self.dialect == "compressed-tensors":
            args = self.scheme(module).weights
            if args is not None and args.strategy == "channel":
                # Without its second dimension the library would take it for a scale of each column.
                return found | {"weight_scale": found["weight_scale"].reshape(-1, 1)}
            return found
        with _fitting(module):
            return modelopt.to_compressed_tensors(self.algorithm(module), found)

    def parts(self, module: str) -> tuple[str, ...]:
        """The full names of the tensors that make up a quantized module, scales of its inputs included.

        Raises:
            CheckpointError: as ``scheme``.
        """
        if self.dialect == "modelopt":
            local = modelopt.local_names(self.algorithm(module))
        else:
            scheme = self.scheme(module)
            weight = tuple(_compressor(scheme, module).compression_param_names(scheme))
            local = (*weight, *static_input_names(scheme.input_activations))
        return tuple(f"{module}.{name}" for name in local)

    def algorithm(self, module: str) -> modelopt.Algorithm:
        """How a quantized module of a ModelOpt folder is stored.

        Raises:
            CheckpointError: as ``scheme``.
        """
        assert self.dialect == "modelopt", "compressed-tensors has schemes"
        return self._modelopt.algorithm(module)

    @cached_property
    def _modelopt(self) -> modelopt.Description:
        return modelopt.Description(self._config, self._where)

    @cached_property
    def _compressed_tensors(self) -> QuantizationConfig:
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import QuantizationConfig

        try:
            config = QuantizationConfig.model_validate(dict(self._config))
            targets = [name for group in config.config_groups.values() for name in group.targets]
            for name in (*(config.ignore or ()), *targets):
                if name.startswith("re:"):
                    re.compile(name.removeprefix("re:"))
        # Its validators stumble over what they do not expect.
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"quantization_config is not compressed-tensors': {reason}", where=self._where
            ) from error
        if config.format in _OF_ALL_GROUPS:
            for group in config.config_groups.values():
                group.format = group.format or CompressionFormat(config.format)
        return config


def static_input_names(activations: QuantizationArgs | None) -> tuple[str, ...]:
    """The scales of activations that a module must hold, by compressed-tensors' local names."""
    if activations is None or activations.dynamic is True:
        return ()
    return ("input_global_scale",) if activations.strategy == "tensor_group" else ("input_scale",)


def format_of(scheme: QuantizationScheme) -> str:
    """compressed-tensors' name of how a module so described is stored: stated, or as the library infers."""
    import torch
    from compressed_tensors.compressors.format import infer_module_format

    stated = scheme.format or infer_module_format(torch.nn.Linear, scheme)
    return str(getattr(stated, "value", stated))


class StoredWeights(QuantizedWeights):
    """A quantized folder, read tensor by tensor; opening it reads its configs and headers.

    Raises:
        CheckpointError: neither config.json nor hf_quant_config.json describes a quantization that is read
            here, or a file is broken.
    """

    def __init__(self, folder: Path) -> None:
        tensors = StoredTensors(folder)
        method, description = _described(tensors, str(folder))
        super().__init__(description, method, tensors.headers, tensors.read, str(folder))


def fused_tensors(source: Source | None) -> list[FusedTensor]:
    """The source's tensors that hold several experts, with their parts; none where there is no source."""
    if source is None:
        return []
    family = family_for(source.config)
    roles = {header.name: family.role(header, source.config) for header in source.headers.values()}
    return [
        (name, role.parts)
        for name, role in roles.items()
        if any(part.expert is not None for part in role.parts)
    ]


def decoded_tensors(weights: StoredWeights, fused: Sequence[FusedTensor]) -> dict[str, torch.Tensor]:
    """Every tensor of the source as the checkpoint now has it: quantized ones decoded, the rest as stored.

    Args:
        weights: a quantized folder.
        fused: the source tensors that hold several matrices, and the module that each was written as.

    Raises:
        CheckpointError: a quantized module has no scheme, or a part of a fused tensor is missing.
    """
    tensors = {f"{module}.weight": weights.weight(module) for module in weights.modules}
    tensors |= _unquantized(weights)
    for name, parts in fused:
        if any(f"{part.module}.weight" in tensors for part in parts):
            tensors[name] = _fuse(tensors, name, parts)
    return tensors


def as_compressed_tensors(weights: StoredWeights) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of a ModelOpt folder in compressed-tensors' layout, and the ``quantization_config`` of it.

    So that transformers, which does not read ModelOpt's dialect, loads it and rounds activations as well.

    Raises:
        CheckpointError: as ``StoredWeights.weight``.
    """
    tensors = {
        f"{module}.{name}": tensor
        for module in weights.modules
        for name, tensor in weights.local(module).items()
    }
    by_algorithm: dict[modelopt.Algorithm, list[str]] = {}
    for module in weights.modules:
        by_algorithm.setdefault(weights.algorithm(module), []).append(module)
    others = _unquantized(weights)
    left = {module_of(name) for name in others if name.endswith(".weight")}
    # A head that is tied to the embedding has no tensor, but is a linear layer all the same.
    left |= {"lm_head"} - set(weights.modules)
    return tensors | others, quantization_config(by_algorithm, sorted(left), frozenset())


def _unquantized(weights: StoredWeights) -> dict[str, torch.Tensor]:
    packed = {name for module in weights.modules for name in weights.parts(module)}
    return {name: weights.stored(name) for name in sorted(weights.names - packed)}


def _described(tensors: StoredTensors, where: str) -> tuple[str, Mapping[str, Any]]:
    """The method and ``quantization_config`` of config.json, else what hf_quant_config.json says."""
    for file, key in (("config.json", "quantization_config"), (modelopt.CONFIG_NAME, "quantization")):
        if tensors.has_file(file):
            read = load_config(tensors.small_file(file), f"{where}/{file}")
            found = read.get(key)
            if isinstance(found, Mapping) and found:
                default = "" if file == "config.json" else "modelopt"
                return str(found.get("quant_method", default)), found
    raise CheckpointError(
        f"neither config.json nor {modelopt.CONFIG_NAME} describes a quantization", where=where
    )


@contextmanager
def _fitting(module: str) -> Iterator[None]:
    """Tells a shape or value that torch or the library stumbles over as a fault of the checkpoint."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"its tensors do not fit together: {reason}", where=module) from error


def _compressor(scheme: QuantizationScheme, module: str) -> type[BaseCompressor]:
    """The library's reader of what the scheme describes.

    Raises:
        CheckpointError: it has none.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat

    layout = format_of(scheme)
    try:
        found: type[BaseCompressor] = BaseCompressor.get_value_from_registry(CompressionFormat(layout).value)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"format {str(layout)[:40]!r} is not read here", where=module) from error
    return found


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
