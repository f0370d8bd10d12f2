"""What a stage that trains keeps on disk as it goes, so that a killed run goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import ShardWriter, write_tensors
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from torch import nn

STATE_NAME = "train-state.tensors"
BEST_NAME = "train-best.tensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progressed:
    """How far training is, beside its tensors.

    Attributes:
        step: steps done.
        curves: name -> what was told of each step that told it; ``loss`` of all.
        seconds: that they took.
        stopped: whether training ended before its last step, because it was asked to.
    """

    step: int = 0
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: bool = False

    def tell(self, told: Mapping[str, float]) -> None:
        """Adds to the curves."""
        for name, value in told.items():
            self.curves.setdefault(name, []).append(value)


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


def save_best(folder: Path, trained: Mapping[str, nn.Parameter]) -> None:
    """Replaces the best parameters in ``folder`` by one rename.

    Raises:
        UserError: the disk is full.
    """
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}
    write_tensors(folder / BEST_NAME, tensors)


def load_best(folder: Path, trained: Mapping[str, nn.Parameter]) -> None:
    """Puts the best parameters in ``folder`` into place; nothing where none were saved."""
    path = folder / BEST_NAME
    if not path.is_file():
        return
    file = read_header(path)
    for name, parameter in trained.items():
        parameter.data.copy_(read_tensor(path, file.headers[name], file.offsets[name]))


def forget_state(folder: Path) -> None:
    """Removes what training kept."""
    for name in (STATE_NAME, BEST_NAME):
        (folder / name).unlink(missing_ok=True)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
