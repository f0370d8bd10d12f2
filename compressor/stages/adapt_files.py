"""What the training of adapters keeps on disk: its state as it goes, and adapters that are shipped apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import ShardWriter, write_tensors
from compressor.spec import TensorHeader
from compressor.workspace import write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

STATE_NAME = "adapt-state.tensors"
ADAPTER_FOLDER = "adapter"
# peft 0.21 utils/constants.py; vLLM 0.32 lora/lora_model.py reads the same.
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_PREFIX = "base_model.model."
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progressed:
    """How far training is, beside its tensors.

    Attributes:
        step: steps done.
        losses: mean negative log-likelihood of each step's tokens, nats.
        answers: the same of the answers to hidden facts; None for a step that asks for none.
        seconds: that they took.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    answers: list[float | None] = field(default_factory=list)
    seconds: float = 0.0


def save_state(
    folder: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, done: Progressed
) -> None:
    """Replaces the state in ``folder`` by one rename: parameters, the optimizer's moments, and ``done``.

    Raises:
        UserError: the disk is full.
    """
    tensors = {}
    for name, parameter in trained.items():
        tensors[name] = parameter.detach()
        tensors |= {f"{name}.{moment}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    headers = [TensorHeader(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    told = asdict(done)
    with ShardWriter(folder / STATE_NAME, headers, {"told": json.dumps(told)}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def load_state(
    folder: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Progressed | None:
    """Puts the state in ``folder`` into parameters and optimizer; None, and nothing, where there is none."""
    import torch

    path = folder / STATE_NAME
    if not path.is_file():
        return None
    file = read_header(path)
    told = json.loads(file.metadata["told"])
    for name, parameter in trained.items():
        names = {"": name, **{moment: f"{name}.{moment}" for moment in _MOMENTS}}
        read = {key: read_tensor(path, file.headers[full], file.offsets[full]) for key, full in names.items()}
        parameter.data.copy_(read[""])
        optimizer.state[parameter] = {
            # As AdamW makes it: fused kernels want it beside the parameter.
            "step": torch.tensor(
                float(told["step"]), device=parameter.device if _fused(optimizer) else "cpu"
            ),
            **{moment: read[moment].to(parameter.device) for moment in _MOMENTS},
        }
    return Progressed(**told)


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


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
