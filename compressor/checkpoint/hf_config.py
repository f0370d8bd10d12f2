"""The result's config.json: the source's fields, and ``quantization_config`` as the library writes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from compressor.model.names import target_patterns

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme


class Described(Protocol):
    """A weight scheme, as far as the config is concerned."""

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """The library's description of it."""
        ...


S = TypeVar("S", bound=Described)


def quantization_config(
    by_scheme: Mapping[S, Sequence[str]],
    left_16bit: Sequence[str],
    ends: frozenset[str],
    *,
    exact: bool = False,
    ignored: Sequence[str] = (),
) -> dict[str, Any]:
    """The ``quantization_config`` dictionary, built and dumped by ``compressed_tensors`` itself.

    Args:
        by_scheme: scheme -> names of the modules stored so.
        left_16bit: names of the linear modules that are not quantized (the engine must leave them alone).
        ends: which of the quantized modules are embeddings or output heads: these must be named as targets,
            since engines do not take them for ``Linear``.
        exact: write plain names instead of regexes, which engines that rename a model's modules do not map.
        ignored: further entries of the ignore list, as they are.

    Returns:
        What ``save_pretrained`` of the library writes for such a model: one group targeting ``Linear`` and an
        ignore list where one scheme serves all linear modules, else one group a scheme with exact targets.
    """
    from compressed_tensors import __version__ as version
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    every = {name for names in by_scheme.values() for name in names} | set(left_16bit)
    uniform = len(by_scheme) == 1
    groups: dict[str, QuantizationScheme | list[str]] = {}
    formats = set()
    for index, (scheme, names) in enumerate(by_scheme.items()):
        targets = ["Linear", *sorted(ends)] if uniform else target_patterns(set(names), every, exact=exact)
        described = scheme.ct_scheme(targets)
        formats.add(described.format)
        groups[f"group_{index}"] = described
    config = QuantizationConfig(
        config_groups=groups,
        quantization_status=QuantizationStatus.COMPRESSED,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        ignore=[*target_patterns(set(left_16bit), every, exact=exact), *ignored],
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return {"version": version, "sparsity_config": {}, "transform_config": {}, **dumped}


def result_config(
    source_config: Mapping[str, Any], quantization: Mapping[str, Any], *, narrowed: bool
) -> dict[str, Any]:
    """The source's config with the quantization, if any; ``narrowed``: wide weights were stored in 16 bit."""
    config = copy.deepcopy(dict(source_config))
    if narrowed:
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
    if quantization:
        config["quantization_config"] = dict(quantization)
    return config
