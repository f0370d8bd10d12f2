"""The compressed-tensors quant: ``quantization_config`` as that library (0.19) reads and matches it."""

from __future__ import annotations

import copy
from collections.abc import Set
from typing import TYPE_CHECKING, Any, Literal

from compressor.errors import CheckpointError
from compressor.model.decode import static_input_names
from compressor.report.words import short_name
from compressor.verify.structure.layouts import E4M3, E8M0, FLOATS, Layout
from compressor.verify.structure.quant_config import KvCache, Names

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

_FP4 = {"nvfp4-pack-quantized": E4M3, "mxfp4-pack-quantized": E8M0}
_WHOLE = ("naive-quantized", "int-quantized", "float-quantized")


class CompressedTensors:
    """One ``quantization_config`` of compressed-tensors.

    Raises:
        CheckpointError: the library refuses it, or it has what engines do not load.
    """

    def __init__(self, found: dict[str, Any]) -> None:
        config = _validated(found)
        self._groups = [
            (Names(scheme.targets, f"targets of {short_name(name)}", is_pattern=_is_regex), layout)
            for name, scheme in config.config_groups.items()
            if (layout := _layout(scheme, config.format)) is not None
        ]
        self._ignore = Names(config.ignore or [], "ignore", is_pattern=_is_regex)
        self.kv: KvCache | None = _kv_cache(config.kv_cache_scheme)
        self.extras = bool(found.get("transform_config"))
        formats = ", ".join(dict.fromkeys(layout.label for _, layout in self._groups))
        self.label = f"compressed-tensors ({formats or 'no quantized weights'})"

    def layout(self, module: str, classes: Set[str]) -> Layout | None:
        """See ``QuantConfig.layout``: not ignored, and targeted by name before by class."""
        if self.ignored(module, classes) is not None:
            return None
        for names, layout in self._groups:
            if names.by_name(module) is not None:
                return layout
        for names, layout in self._groups:
            if names.by_class(classes) is not None:
                return layout
        return None

    def ignored(self, module: str, classes: Set[str]) -> str | None:
        """See ``QuantConfig.ignored``."""
        return self._ignore.by_name(module) or self._ignore.by_class(classes)


def _is_regex(entry: str) -> bool:
    return entry.startswith("re:")


def _validated(found: dict[str, Any]) -> QuantizationConfig:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    from compressor.model.quiet import quiet

    try:
        with quiet():
            return QuantizationConfig.model_validate(copy.deepcopy(found))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Its validators are part of the place, in brackets.
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        reason = f"{place}: {first['msg']}"
    except Exception as error:  # its validators raise TypeError, KeyError and NotImplementedError as well
        reason = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        f"compressed-tensors refuses quantization_config: {short_name(reason.splitlines()[0])}"
    )


def _layout(scheme: QuantizationScheme, stated: str) -> Layout | None:
    """How the modules of one group are stored; None where their weights are not quantized."""
    weights = scheme.weights
    if weights is None:
        return None
    form = _format(scheme, stated)
    if form == "dense":
        return None
    rows, columns = _shared(weights)
    group = f", group_size {columns}" if rows == 1 and columns is not None else ""
    codes, dtype, scales = _stored_as(form, weights)
    return Layout(
        label=f"{form} {weights.type}{weights.num_bits}{group}",
        codes=codes,
        code_dtype=dtype,
        bits=weights.num_bits,
        rows=rows,
        columns=columns,
        scale_dtypes=scales,
        tensor_scale="weight_global_scale" if form == "nvfp4-pack-quantized" else None,
        zero_point=_zero_point(form, weights),
        weight_shape=form == "pack-quantized",
        inputs=static_input_names(scheme.input_activations),
    )


def _stored_as(form: str, weights: QuantizationArgs) -> tuple[str, str, frozenset[str]]:
    """The tensor that holds the codes, its dtype, and what the scales may be stored as."""
    if form == "pack-quantized":
        return "weight_packed", "I32", FLOATS
    if form in _FP4:
        return "weight_packed", "U8", _FP4[form]
    if form == "mxfp8-quantized":
        return "weight", "F8_E4M3", E8M0
    if form in _WHOLE:
        return "weight", "F8_E4M3" if weights.type == "float" else "I8", FLOATS
    raise CheckpointError(f"format {form!r} is not one that engines still load")


def _zero_point(form: str, weights: QuantizationArgs) -> Literal["packed", "plain"] | None:
    """How zero points are stored; only integers have them."""
    if weights.symmetric or weights.type != "int":
        return None
    return "packed" if form == "pack-quantized" and weights.strategy in ("group", "channel") else "plain"


def _format(scheme: QuantizationScheme, stated: str) -> str:
    """The group's format, or the config's, or what the library infers where neither names one."""
    import torch
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.config import CompressionFormat

    known = {one.value for one in CompressionFormat}
    if scheme.format is not None:
        return str(CompressionFormat(scheme.format).value)
    if stated not in known | {"fakequant"}:
        raise CheckpointError(
            f"format {short_name(stated)!r} is not known; known: {', '.join(sorted(known))}"
        )
    if stated in ("mixed-precision", "fakequant"):
        return str(infer_module_format(torch.nn.Linear, scheme).value)
    return stated


def _shared(weights: QuantizationArgs) -> tuple[int | None, int | None]:
    """How many rows and columns share a scale; None: all."""
    if weights.strategy == "tensor":
        return None, None
    if weights.strategy == "channel":
        return 1, None
    if weights.strategy in ("group", "tensor_group"):
        return 1, weights.group_size
    if weights.strategy == "block":
        return weights.block_structure[0], weights.block_structure[1]
    raise CheckpointError(f"weights quantized by {weights.strategy!r} cannot be stored")


def _kv_cache(scheme: QuantizationArgs | None) -> KvCache | None:
    """The KV cache, once it is one that engines load (vLLM 0.32 ``validate_kv_cache_scheme``)."""
    if scheme is None:
        return None
    if (scheme.type, scheme.num_bits, scheme.symmetric) != ("float", 8, True):
        raise CheckpointError(
            f"kv_cache_scheme is {scheme.type}{scheme.num_bits}, symmetric: {scheme.symmetric}; "
            "engines load symmetric 8-bit floating point only"
        )
    if scheme.strategy not in ("tensor", "attn_head"):
        raise CheckpointError(
            f"kv_cache_scheme has strategy {scheme.strategy!r}; engines load 'tensor' and 'attn_head'"
        )
    return KvCache("FP8", static=scheme.dynamic is False, per_head=scheme.strategy == "attn_head")
