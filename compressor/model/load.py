"""Whole models for evaluation: the source, and a result as it lies on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.checkpoint.layout import load_config
from compressor.checkpoint.made_by import FACTORY_KEY, allowed_factory
from compressor.checkpoint.modelopt import CONFIG_NAME
from compressor.errors import CheckpointError
from compressor.model.architecture import auto_classes, model_class
from compressor.model.decode import FusedTensor, StoredWeights, as_compressed_tensors, decoded_tensors
from compressor.model.families.naming import EMBEDDINGS, leaf
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.checkpoint.base import Source

Via = Literal["transformers", "decoded", "factory"]

# Experts written one by one: transformers either lacks them (Llama 4) or merges them without every format's
# scales (transformers 5.17 integrations/compressed_tensors.py, DecompressExperts: no global scale).
EXPERT = re.compile(r"\.experts\.\d+\.")
QUANTIZED_KEY = re.compile(r"\.weight_(packed|scale|scale_2|global_scale|zero_point)$")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint read back from disk with its weights decoded.

    Attributes:
        model: in evaluation mode, on the CPU.
        via: ``transformers``: its own loader read the folder (ModelOpt's dialect: read its tensors as
            compressed-tensors would name them); ``decoded``: the weights were decoded tensor by tensor and
            given to transformers as if they were the source's (MoE with separate experts, and embeddings,
            which its loader decodes in linear layers only); ``factory``: given to the modules that an
            installed package makes.
        activations_simulated: whether the forward pass quantizes activations as the scheme says; None where
            the scheme leaves them alone.
    """

    model: PreTrainedModel
    via: Via
    activations_simulated: bool | None


def load_source_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The source as transformers loads it, with parameters of ``dtype``, on the CPU.

    A GGUF or otherwise quantized source is given to transformers tensor by tensor, as its compression reads
    it: dequantized to bfloat16. For GGUF, the bits of transformers' own loader in a third of the time.

    Raises:
        CheckpointError: there is no local model, transformers cannot load it, or a parameter is missing.
    """
    factory = allowed_factory(source)
    if factory is not None:
        return set_dtype(_made(factory, source), dtype)
    if source.kind in ("gguf", "dequantized"):
        model, info = _guarded(lambda: _from_source(source), source.label)
    else:
        folder = source.model_dir()
        if folder is None:
            raise CheckpointError("this source has no weights to evaluate", where=source.label)
        model, info = _guarded(lambda: _from_folder(folder, _read_config(folder)), source.label)
    _check_keys(info, source.label)
    return set_dtype(model, dtype)


def load_checkpoint_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    fused: Sequence[FusedTensor] = (),
    factory: str | None = None,
    cache_16bit: bool = False,
) -> LoadedCheckpoint:
    """A result folder with its weights decoded, parameters of ``dtype``, on the CPU.

    Weights are decoded by compressed-tensors from float32 scales; NVFP4 and MXFP4 weights come out rounded
    to bfloat16, as it defines them. A folder that is not quantized is loaded as it is.

    Args:
        folder: config.json and safetensors files, in either dialect.
        dtype: what the parameters are cast to after decoding.
        fused: for families whose experts were written one by one, the source tensors and their parts
            (``FusedTensor``); used where transformers cannot read the layout itself.
        factory: ``module:callable`` of an installed package that the user allowed to make the model.
        cache_16bit: leave keys and values as they are, where the folder's config rounds them to FP8 with
            static scales (``kv_cache_scheme``).

    Raises:
        CheckpointError: another kind of quantization, unreadable, or a parameter of the model is missing.
    """
    if factory is not None:
        return _made_checkpoint(folder, factory, dtype)
    config = _guarded(lambda: _read_config(folder), str(folder))
    quantization = getattr(config, "quantization_config", None)
    if quantization is None and not (folder / CONFIG_NAME).is_file():
        model, info = _guarded(lambda: _from_folder(folder, config), str(folder))
        _check_keys(info, str(folder))
        return LoadedCheckpoint(set_dtype(model, dtype), "transformers", None)
    weights = StoredWeights(folder)
    alone = any(EXPERT.search(module) or leaf(module) in EMBEDDINGS for module in weights.modules)
    via: Via = "decoded" if alone else "transformers"

    def load() -> Any:
        if via == "decoded":
            if quantization is not None:
                del config.quantization_config
            return _from_tensors(config, decoded_tensors(weights, fused))
        if weights.dialect == "modelopt":
            tensors, described = as_compressed_tensors(weights)
            config.quantization_config = described | {"dequantize": True}
            return _from_tensors(config, tensors)
        assert quantization is not None, "compressed-tensors is described in config.json only"
        quantization["dequantize"] = True
        if cache_16bit:
            quantization.pop("kv_cache_scheme", None)
        return _from_folder(folder, config)

    model, info = _guarded(load, str(folder))
    _check_keys(info, str(folder))
    _undispatched(model)
    rounded = any(weights.scheme(module).input_activations for module in weights.modules)
    return LoadedCheckpoint(set_dtype(model, dtype), via, via == "transformers" if rounded else None)


def _undispatched(model: PreTrainedModel) -> None:
    """Takes off what compressed-tensors puts on modules when it decodes them.

    It keeps weights where they were loaded, and each forward pass on another device would fetch them.
    """
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(model)


def check_known(source: Source) -> None:
    """Refuses a model that neither transformers nor an allowed factory makes, before it is compressed.

    Raises:
        CheckpointError: unknown ``model_type``: the result could not be loaded back.
        UserError: a factory that nobody allowed to be run.
    """
    if allowed_factory(source) is not None:
        return
    from transformers import CONFIG_MAPPING

    model_type = source.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers does not know model_type {model_type!r}, so the result could not be checked",
            where=source.label,
        )


def load_tokenizer(source: Source | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a source or of a folder.

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """
    if isinstance(source, Path):
        folder, gguf, label = source, None, str(source)
    else:
        found, gguf, label = source.model_dir(), source.gguf_file(), source.label
        if found is None:
            raise CheckpointError("this source has no tokenizer", where=label)
        folder = found

    def load() -> Any:
        from transformers import AutoTokenizer

        how = {"gguf_file": gguf} if gguf else {}
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **how)

    return _guarded(load, label)


def load_processor(folder: Path, label: str) -> Any:
    """The processor of images and texts whose files lie in a folder, beside config.json.

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """

    def load() -> Any:
        from transformers import AutoProcessor

        found = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(found, "image_processor", None) is None:
            raise CheckpointError("the source's processor takes no images", where=label)
        return found

    return _guarded(load, label)


def set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Casts the floating parameters in place and returns the model.

    Buffers keep their dtype, unlike with ``model.to``: rotary frequencies rounded to bfloat16 would turn
    positions by radians.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def refuse_fetched_kernels(config: Any, label: str) -> None:
    """Refuses a config whose attention or experts are code from the Hub: transformers would fetch and run it.

    ``attn_implementation: org/repo`` at any depth (transformers 5.17 integrations/hub_kernels.py, is_kernel).

    Raises:
        CheckpointError: there is one.
    """
    level: list[tuple[str, Any]] = [("", config)]
    while level:
        key, value = level.pop()
        if isinstance(value, Mapping):
            # Such an entry may name one for each part of the model.
            chosen = key if "_implementation" in key else ""
            level += ((f"{chosen}{inner}", item) for inner, item in value.items())
        elif isinstance(value, list):
            level += ((key, item) for item in value)
        elif isinstance(value, str) and "_implementation" in key and "/" in value:
            raise CheckpointError(
                f"config.json: {key[:40]} is {value[:80]!r}: code from the Hub is never run",
                where=label,
                fix="remove the entry",
            )


def _made(factory: str, source: Source) -> PreTrainedModel:
    from compressor.model.factory import make_model

    with quiet():
        return make_model(factory, source.config, {name: source.read(name) for name in source.headers})


def _made_checkpoint(folder: Path, factory: str, dtype: torch.dtype) -> LoadedCheckpoint:
    from compressor.model.factory import make_model

    weights = StoredWeights(folder)
    config = load_config((folder / "config.json").read_bytes(), str(folder))
    with quiet():
        model = make_model(factory, config, decoded_tensors(weights, ()))
    rounded = any(weights.scheme(module).input_activations for module in weights.modules)
    return LoadedCheckpoint(set_dtype(model, dtype), "factory", False if rounded else None)


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    # What AutoConfig reads; the entries are gone from what it returns.
    raw, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    refuse_fetched_kernels(raw, str(folder))
    if FACTORY_KEY in raw:
        raise CheckpointError(
            f"its model is made by {str(raw[FACTORY_KEY])[:80]!r}, code of a package that is not run here",
            where=str(folder),
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _from_folder(folder: Path, config: Any) -> Any:
    """Model and loading info by transformers' own loader; float32 keeps the scales exact."""
    import torch

    return auto_classes(config)[0].from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )


def _from_source(source: Source) -> Any:
    """Model and loading info from the source's own tensors."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**source.config)
    return _from_tensors(config, {name: source.read(name) for name in source.headers})


def _from_tensors(config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    import torch

    # The auto class wants a path even where the weights are given.
    chosen, config = model_class(config)
    return chosen.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )


def _guarded(load: Callable[[], Any], label: str) -> Any:
    """What ``load`` returns, with every failure of the libraries told in one line."""
    try:
        with quiet():
            return load()
    except CheckpointError:
        raise
    except Exception as error:  # the libraries raise anything from KeyError to their own classes
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        short = isinstance(error, MemoryError) or "memory" in reason
        raise CheckpointError(
            f"cannot be loaded: {type(error).__name__}: {reason}",
            where=label,
            fix="loading takes 4 bytes a parameter; use a machine with more memory" if short else "",
        ) from error


def _check_keys(info: dict[str, Any], label: str) -> None:
    """Refuses a model with parameters that no tensor of the checkpoint filled, or scales that none used."""
    for kind, names in (
        ("has no tensor for", info["missing_keys"]),
        ("has another shape for", [key[0] for key in info["mismatched_keys"]]),
        ("holds quantized tensors that the model has no place for:", _quantized(info["unexpected_keys"])),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"the checkpoint {kind} {some}{more}", where=label)


def _quantized(names: Sequence[str]) -> list[str]:
    return [name for name in names if QUANTIZED_KEY.search(name)]
