"""Adapters that are shipped apart, as peft writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.workspace import write_json

if TYPE_CHECKING:
    import torch

ADAPTER_FOLDER = "adapter"
# peft 0.21 utils/constants.py; vLLM 0.32 lora/lora_model.py reads the same.
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_PREFIX = "base_model.model."


def write_adapter(
    folder: Path, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: int, base: str
) -> None:
    """Writes adapters as peft does, for an engine that adds them to the result while it serves.

    Args:
        folder: gets a folder ``adapter``.
        layers: module path -> fp32 A [R, I] and B [O, R].
        alpha: their product is multiplied by ``alpha / R``.
        base: how the model that they belong to is called.

    Raises:
        UserError: the disk is full.
    """
    target = folder / ADAPTER_FOLDER
    target.mkdir(exist_ok=True)
    tensors = {}
    for path, (a_RI, b_OR) in layers.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a_RI
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b_OR
    write_tensors(target / _ADAPTER_FILES[0], tensors)
    leaves = sorted({path.rpartition(".")[2] for path in layers})
    rank = len(next(iter(layers.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": leaves,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    write_json(target / _ADAPTER_FILES[1], config)


def copy_adapter(trained: Path, folder: Path) -> None:
    """Copies the adapter that the finished stage left in ``trained``, if it left one, into a checkpoint."""
    if (trained / ADAPTER_FOLDER).is_dir():
        (folder / ADAPTER_FOLDER).mkdir(exist_ok=True)
        for name in _ADAPTER_FILES:
            copyfile(trained / ADAPTER_FOLDER / name, folder / ADAPTER_FOLDER / name)
