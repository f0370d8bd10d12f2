"""Which tensors a checkpoint must hold, told by the model's own class in transformers (built without memory).

The class's parameters are renamed and split as ``save_pretrained`` of transformers 5.17 would write them
(``core_model_loading.revert_weight_conversion``); a checkpoint with older names is recognized by the renaming
that ``from_pretrained`` applies. Where transformers does not know the model, names must do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.model.architecture import model_class
from compressor.model.families import family_for
from compressor.model.families.naming import common_role
from compressor.report.words import short_name
from compressor.spec import LinearPart, TensorHeader
from compressor.verify.structure.layouts import MARKERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LINEAR = frozenset({"Linear"})
EXPERTS = re.compile(r"(?P<experts>(?:^|.*\.)experts)\.")
# Keys of a config.json by which a stranger could have code fetched or another dtype computed in.
_DROPPED = re.compile(r"(_implementation(_internal)?|^(torch_)?dtype|^quantization_config|^auto_map)$")
_COUNTS = re.compile(r"layers|depth|blocks|experts|heads|codebooks")
_LARGEST_COUNT = 4_096


@dataclass(frozen=True)
class Expected:
    """What the model needs.

    Attributes:
        model: the class, for messages; "" where only names were told apart.
        inferred: why names had to do; "" where the class was built.
        shapes: tensor -> shape, for every parameter and buffer as it is written.
        classes: module -> names of its class and bases, for linear layers and embeddings.
        aliases: module -> its name in transformers, where that differs; configs use either.
        fused: a 3-D tensor of experts -> its matrices as they may be written one by one, if known.
        tied: tensor -> the tensor that it is another name of.
        unneeded: names that transformers passes over when it loads the model.
        missing_ok: names that it makes itself where they are missing.
    """

    model: str = ""
    inferred: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[LinearPart, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    unneeded: re.Pattern[str] | None = None
    missing_ok: re.Pattern[str] | None = None


def expected_tensors(config: dict[str, Any], headers: Mapping[str, TensorHeader]) -> Expected:
    """What the model of a config.json needs; by names alone where transformers cannot tell."""
    from compressor.model.quiet import quiet

    reason = _unbuildable(config, len(headers))
    if not reason:
        try:
            with quiet():
                return _of_model(_build(_cleaned(config)), config, _weight_names(headers))
        except Exception as error:  # a stranger's values can break a model's constructor in any way
            told = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
            reason = f"transformers cannot build the model ({type(error).__name__}: {short_name(told)})"
    family = family_for(config)
    linear = (
        name.removesuffix(".weight")
        for name, header in headers.items()
        if name.endswith(".weight") and family.role(header, config).kind in ("linear", "lm_head")
    )
    return Expected(inferred=reason, classes=dict.fromkeys(linear, LINEAR))


def is_aside(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor lies in the tower of another modality or in a draft layer."""
    # A matrix in 16 bit is nothing else to every family alike, unless it is an embedding or a head.
    role = common_role(TensorHeader(f"{name.rpartition('.')[0]}.weight", "BF16", (1, 1)), config)
    return role is not None and role.kind == "other"


def _weight_names(headers: Iterable[str]) -> set[str]:
    """The tensors as they would be named unquantized: ``a.weight`` for ``a.weight_packed``, no scales."""
    names = (name.removesuffix("_packed") if name.endswith(".weight_packed") else name for name in headers)
    return {name for name in names if name.rpartition(".")[2] not in MARKERS}


def _unbuildable(config: dict[str, Any], tensors: int) -> str:
    """Why the model is not to be built, or ""."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return f"transformers does not know model_type {short_name(str(model_type))!r}"
    level: list[tuple[str, Any]] = list(config.items())
    while level:
        key, value = level.pop()
        if isinstance(value, dict):
            level += value.items()
        elif type(value) is int and value > max(_LARGEST_COUNT, tensors) and _COUNTS.search(key):
            return f"{short_name(key)} {value:,} is more than a checkpoint of {tensors:,} tensors can have"
    return ""


def _cleaned(value: Any) -> Any:
    """The config without what would choose kernels, dtypes or code."""
    if isinstance(value, dict):
        return {key: _cleaned(inner) for key, inner in value.items() if not _DROPPED.search(key)}
    return [_cleaned(inner) for inner in value] if isinstance(value, list) else value


def _build(config: dict[str, Any]) -> PreTrainedModel:
    """The model of the architecture named, else of the model type's causal LM, on the meta device."""
    import torch
    import transformers
    from transformers import initialization

    # As from_pretrained reads the file: infinities have a spelling of their own in it.
    decoded = transformers.PreTrainedConfig._decode_special_floats(config)
    made: PreTrainedConfig = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(decoded)
    named = (config.get("architectures") or [None])[0]
    found = getattr(transformers, named, None) if isinstance(named, str) and named.isidentifier() else None
    fits = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    chosen = found if fits and isinstance(made, getattr(found, "config_class", None) or ()) else None
    if chosen is None:
        chosen, made = model_class(made)
    with (
        torch.device("meta"),
        initialization.no_init_weights(),
        initialization.meta_device_safe_creation_ops(),
    ):
        model: PreTrainedModel = chosen(made)
    return model


def _of_model(model: PreTrainedModel, config: dict[str, Any], names: set[str]) -> Expected:
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    written = revert_weight_conversion(model, state)
    # What is only renamed stays the same object; what is split or joined does not.
    keys = {id(tensor): key for key, tensor in state.items()}
    origin = {name: keys[id(tensor)] for name, tensor in written.items() if id(tensor) in keys}
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    _rename(model, shapes, origin, names)
    family = family_for(config)
    fused = {
        name: family.role(TensorHeader(name, "BF16", shape), config).parts
        for name, shape in shapes.items()
        if len(shape) == 3 and EXPERTS.match(name)
    }
    disk = {key: name for name, key in origin.items()}
    return Expected(
        model=type(model).__name__,
        shapes=shapes,
        classes=_classes(model, shapes, origin),
        aliases={
            name.removesuffix(".weight"): key.removesuffix(".weight")
            for name, key in origin.items()
            if name != key and name.endswith(".weight")
        },
        fused=fused,
        tied={
            disk[key]: disk[other]
            for key, other in (getattr(model, "all_tied_weights_keys", None) or {}).items()
            if key in disk and other in disk
        },
        unneeded=_any_of(
            {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"position_ids$"}
        ),
        missing_ok=_any_of(set(model._keys_to_ignore_on_load_missing or ())),
    )


def _rename(
    model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], origin: dict[str, str], names: set[str]
) -> None:
    """Gives parameters the names that they have in this checkpoint, where it uses older ones."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    strange = names - shapes.keys()
    absent = {origin[name]: name for name in shapes.keys() - names if name in origin}
    if not strange or not absent:
        return
    conversions, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    for name in strange:
        key, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key in absent:
            shapes[name] = shapes.pop(absent[key])
            origin[name] = origin.pop(absent.pop(key))


def _classes(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], origin: Mapping[str, str]
) -> dict[str, frozenset[str]]:
    """Linear layers and embeddings, and the experts, which engines take for linear layers."""
    import torch

    modules = dict(model.named_modules())
    classes = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2:
            continue
        if name not in origin:
            if EXPERTS.match(name):
                classes[module] = LINEAR
            continue
        owner = modules.get(origin[name].removesuffix(".weight"))
        if isinstance(owner, torch.nn.Linear | torch.nn.Embedding):
            classes[module] = frozenset(base.__name__ for base in type(owner).__mro__)
    return classes


def _any_of(patterns: set[str]) -> re.Pattern[str] | None:
    """One expression for all of the library's own patterns."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in sorted(patterns))) if patterns else None
