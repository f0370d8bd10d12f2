"""Breaks a checkpoint folder in one well-defined way, as a faulty exporter or a careless edit would.

Weights are rewritten with the safetensors library, the index with them; manifest.json is removed, so that it
alone does not give the fault away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
Tensors = dict[str, torch.Tensor]


def corrupt(folder: Path, kind: str) -> None:
    """Breaks ``folder`` as ``kind`` says, one of ``KINDS``.

    Raises:
        ValueError: the folder has nothing that can be broken so (no KV scales, no packed codes).
    """
    (folder / "manifest.json").unlink(missing_ok=True)
    KINDS[kind](folder)


def drop_tensor(folder: Path) -> None:
    """The codes of one matrix are gone."""
    rewrite(folder, lambda tensors: _without(tensors, [_codes(tensors, _victim(tensors))]))


def drop_scale(folder: Path) -> None:
    """The scales of one matrix are gone."""
    rewrite(folder, lambda tensors: _without(tensors, [f"{_victim(tensors)}.weight_scale"]))


def drop_norm(folder: Path) -> None:
    """A tensor that was never quantized is gone."""
    rewrite(folder, lambda tensors: _without(tensors, [_first(tensors, "input_layernorm.weight")]))


def drop_k_scale(folder: Path) -> None:
    """One layer's scale of keys is gone."""
    rewrite(folder, lambda tensors: _without(tensors, [_first(tensors, ".k_scale")]))


def nan_scale(folder: Path) -> None:
    """One of a matrix's scales is no number."""

    def broken(tensors: Tensors) -> Tensors:
        name = f"{_victim(tensors)}.weight_scale"
        scale = tensors[name].clone()
        scale.view(-1)[0] = 255 if scale.dtype == torch.uint8 else torch.nan
        return tensors | {name: scale}

    rewrite(folder, broken)


def swap_nibbles(folder: Path) -> None:
    """The two 4-bit codes in each byte of one matrix have changed places."""

    def broken(tensors: Tensors) -> Tensors:
        name = _codes(tensors, _victim(tensors))
        if tensors[name].dtype not in (torch.uint8, torch.int32):
            raise ValueError(f"{name} is not packed")
        pairs = tensors[name].view(torch.uint8)
        return tensors | {name: (pairs >> 4 | pairs << 4).view(tensors[name].dtype)}

    rewrite(folder, broken)


def swap_scales(folder: Path) -> None:
    """Two matrices of one shape have each other's scales."""

    def broken(tensors: Tensors) -> Tensors:
        scales = [name for name in tensors if name.endswith(".weight_scale")]
        for one in scales:
            for other in scales:
                alike = tensors[one].shape == tensors[other].shape
                if one < other and alike and not torch.equal(_bytes(tensors[one]), _bytes(tensors[other])):
                    return tensors | {one: tensors[other], other: tensors[one]}
        raise ValueError("no two scales of one shape")

    rewrite(folder, broken)


def double_scale(folder: Path) -> None:
    """One matrix is decoded to twice its size."""

    def broken(tensors: Tensors) -> Tensors:
        module = _victim(tensors)
        # Block scales in E4M3 may stand at their largest value; the tensor's own scale always has room.
        for local, factor in (("weight_global_scale", 0.5), ("weight_scale_2", 2.0), ("weight_scale", 2.0)):
            name = f"{module}.{local}"
            if name in tensors:
                scale = tensors[name]
                doubled = scale + 1 if scale.dtype == torch.uint8 else (scale * factor).to(scale.dtype)
                return tensors | {name: doubled}
        raise ValueError("no scales")

    rewrite(folder, broken)


def ignore_quantized(folder: Path) -> None:
    """The config says of a quantized matrix that it is not."""
    victim = _victim(read_tensors(folder))
    _edit_ignore(folder, lambda entries: [*entries, victim])


def forget_ignored(folder: Path) -> None:
    """The config says of every linear layer that it is quantized."""
    _edit_ignore(folder, lambda entries: [])


def remove_quantization_config(folder: Path) -> None:
    """Nothing says that the checkpoint is quantized."""
    edit_config(folder, lambda config: config.pop("quantization_config"))
    (folder / HF_QUANT_CONFIG).unlink(missing_ok=True)


def truncate_file(folder: Path) -> None:
    """The last weight file lacks its end, as after a download that broke off."""
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


KINDS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        *(drop_tensor, drop_scale, drop_norm, drop_k_scale, nan_scale, swap_nibbles, swap_scales),
        *(double_scale, ignore_quantized, forget_ignored, remove_quantization_config, truncate_file),
    )
}


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of the folder."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Writes what ``change`` makes of all tensors; each stays in its file, new ones go to the first."""
    paths = sorted(folder.glob("*.safetensors"))
    homes = {name: path for path in paths for name in load_file(path)}
    changed = change(read_tensors(folder))
    for path in paths:
        mine = {name: tensor for name, tensor in changed.items() if homes.get(name, paths[0]) == path}
        path.unlink()  # a link to another checkpoint's file must not change that one
        save_file({name: tensor.contiguous() for name, tensor in mine.items()}, path, {"format": "pt"})
    index = folder / INDEX
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: homes.get(name, paths[0]).name for name in sorted(changed)}
        index.write_text(json.dumps(content))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
    """Lets ``change`` edit the JSON object in a file of the folder."""
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _edit_ignore(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Changes the list of modules left alone, in every file that has it."""

    def in_config(config: dict[str, Any]) -> None:
        entry = config["quantization_config"]
        entry["ignore"] = change(entry["ignore"])

    def in_file(config: dict[str, Any]) -> None:
        entry = config["quantization"]
        entry["exclude_modules"] = change(entry["exclude_modules"])

    edit_config(folder, in_config)
    if (folder / HF_QUANT_CONFIG).exists():
        edit_config(folder, in_file, HF_QUANT_CONFIG)


def _victim(tensors: Tensors) -> str:
    """A quantized matrix that engines fuse with no other, or the first one."""
    modules = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    if not modules:
        raise ValueError("nothing is quantized")
    return min(modules, key=lambda name: (not name.endswith(("down_proj", "o_proj")), name))


def _codes(tensors: Tensors, module: str) -> str:
    packed = f"{module}.weight_packed"
    return packed if packed in tensors else f"{module}.weight"


def _first(tensors: Tensors, end: str) -> str:
    names = sorted(name for name in tensors if name.endswith(end))
    if not names:
        raise ValueError(f"no tensor ends with {end}")
    return names[0]


def _without(tensors: Tensors, names: Iterable[str]) -> Tensors:
    dropped = set(names)
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
