"""What a polish keeps on disk: its state while it runs, and the polished tensors in the walk's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.safetensors_file import read_header, read_tensor, safetensors_dtype
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.spec import TensorHeader
from compressor.stages.receipts import PartError, read_receipt, write_receipt
from compressor.stages.walked import REST_NAME, layer_name

if TYPE_CHECKING:
    import torch

_STATE = "polish-state.safetensors"
_VECTORS = ("exponents", "mean", "square", "best")
_NUMBERS = ("step", "first_kl", "best_kl", "seconds")


@dataclass
class State:
    """Where the optimizer is: everything that its next step depends on.

    Attributes:
        exponents: fp32 [n], all knobs' exponents now.
        mean: Adam's moving mean of the gradients.
        square: and of their squares.
        best: the exponents that were best on the held-out rows so far.
        first_kl: divergence there before the first step.
        best_kl: and with ``best``.
        step: steps done.
        seconds: that they took.
    """

    exponents: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    best: torch.Tensor
    first_kl: float
    best_kl: float
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def begin(cls, exponents: torch.Tensor, kl: float) -> State:
        """Before the first step, with a divergence of ``kl`` on the held-out rows."""
        exponents, mean, square, best = (exponents.new_zeros(exponents.shape) for _ in _VECTORS)
        return cls(exponents, mean, square, best, first_kl=kl, best_kl=kl)


def save_state(folder: Path, state: State) -> None:
    """Replaces the state in ``folder`` by one rename.

    Raises:
        UserError: the disk is full.
    """
    import torch

    size = state.exponents.numel()
    headers = [TensorHeader(name, "F32", (size,)) for name in _VECTORS]
    headers.append(TensorHeader("numbers", "F64", (len(_NUMBERS),)))
    with ShardWriter(folder / _STATE, headers) as writer:
        for name in _VECTORS:
            writer.write(name, getattr(state, name))
        numbers = [float(getattr(state, name)) for name in _NUMBERS]
        writer.write("numbers", torch.tensor(numbers, dtype=torch.float64))


def load_state(folder: Path, like: torch.Tensor) -> State | None:
    """The state in ``folder``, on the device of ``like``; None where there is none, or not of its size."""
    path = folder / _STATE
    if not path.is_file():
        return None
    file = read_header(path)
    tensors = {name: read_tensor(path, header, file.offsets[name]) for name, header in file.headers.items()}
    if tensors["exponents"].shape != like.shape:
        return None
    step, first_kl, best_kl, seconds = tensors["numbers"].tolist()
    vectors = {name: tensors[name].to(like.device) for name in _VECTORS}
    return State(**vectors, first_kl=first_kl, best_kl=best_kl, step=int(step), seconds=seconds)


def write_polished(
    walked: Path, folder: Path, changed: Mapping[str, torch.Tensor], blocks: Sequence[str]
) -> None:
    """Writes the walk's files with the tensors of ``changed`` in the place of theirs, or beside them.

    The receipts keep the errors that the walk measured. The state goes.

    Raises:
        UserError: the disk is full.
    """
    homes = {layer_name(index): f"{path}." for index, path in enumerate(blocks)}
    left = dict(changed)
    for name, prefix in homes.items():
        added = {inner: left.pop(inner) for inner in sorted(left) if inner.startswith(prefix)}
        _write(walked, folder, name, added)
    if left or (walked / REST_NAME).is_file():
        _write(walked, folder, REST_NAME, left)
    (folder / _STATE).unlink(missing_ok=True)


def _write(walked: Path, folder: Path, name: str, changed: Mapping[str, torch.Tensor]) -> None:
    path = walked / name
    errors: list[PartError] = []
    headers: dict[str, TensorHeader] = {}
    if path.is_file():
        file = read_header(path)
        headers = dict(file.headers)
        receipt = read_receipt(walked, name)
        assert receipt is not None, "the walk is finished"
        errors = [PartError(**error) for error in receipt["errors"]]
    outputs = headers | {
        inner: TensorHeader(inner, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        for inner, tensor in changed.items()
    }
    with ShardWriter(folder / name, list(outputs.values())) as writer:
        for inner in outputs:
            if inner in changed:
                writer.write(inner, changed[inner])
            else:
                writer.write(inner, read_tensor(path, headers[inner], file.offsets[inner]))
    write_receipt(folder, name, errors)
