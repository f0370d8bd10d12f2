"""A source with transforms of keys and values folded into its weights, for all who read it afterwards.

Legend: H sets of factors of a layer, D head_dim, N runs of D rows, K columns.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind, Source
from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.checkpoint.wrapping import Wrapping
from compressor.errors import CheckpointError
from compressor.model.kv_folding import Foldable, Spot, foldable
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

FOLD_NAME = "kv_fold.tensors"  # safetensors; some engines take every file of that suffix for weights
VERSION = 1
_VALUES = "values"
_KEYS = "keys."
_MOST_LAYERS = 10_000
# Fitted factors reach 16 (kv/fit_pairs.py); far beyond, 16-bit weights overflow, or become zero.
_MOST_FACTOR = 64.0


@dataclass(frozen=True)
class KvFold:
    """What is folded.

    Attributes:
        values: indices of the layers whose values are rotated.
        keys: index of a layer -> fp32 [H, D], the positive factors of its keys; H is the number of KV heads,
            or 1 where all heads share a norm.
    """

    values: tuple[int, ...] = ()
    keys: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.values) or bool(self.keys)

    def digest(self) -> str:
        """Hex sha256 of what is folded."""
        told = hashlib.sha256(f"{VERSION} {sorted(self.values)}".encode())
        for layer in sorted(self.keys):
            told.update(f" {layer} {tuple(self.keys[layer].shape)} ".encode())
            told.update(self.keys[layer].contiguous().numpy().tobytes())
        return told.hexdigest()

    def write(self, folder: Path) -> None:
        """Writes ``kv_fold.tensors`` into an existing folder.

        Raises:
            UserError: the disk is full.
        """
        import torch

        tensors = {f"{_KEYS}{layer}": factor_HD.contiguous() for layer, factor_HD in self.keys.items()}
        tensors[_VALUES] = torch.tensor(sorted(self.values), dtype=torch.int64)
        write_tensors(folder / FOLD_NAME, tensors)

    @classmethod
    def read(cls, folder: Path) -> KvFold:
        """What ``write`` left in a folder; whether it fits a model, ``FoldedSource`` tells.

        Raises:
            CheckpointError: unreadable, or not such a file.
        """
        path = folder / FOLD_NAME
        header = read_header(path)
        keys: dict[int, torch.Tensor] = {}
        values: tuple[int, ...] = ()
        if len(header.headers) > _MOST_LAYERS:
            raise _broken(path, "more layers than a model has")
        for name, described in header.headers.items():
            number = name.removeprefix(_KEYS)
            if name == _VALUES and described.dtype == "I64" and len(described.shape) == 1:
                found = read_tensor(path, described, header.offsets[name])
                values = tuple(int(layer) for layer in found.tolist())
                if len(set(values)) < len(values):
                    raise _broken(path, "a layer is listed twice: rotated twice it is as it was")
            elif name != number and number.isdecimal() and described.dtype == "F32":
                keys[int(number)] = read_tensor(path, described, header.offsets[name])
            else:
                raise _broken(path, f"tensor {name[:80]!r} is none of a fold")
        return cls(values, keys)


class FoldedSource(Wrapping):
    """A source as it computes the same with other keys and values.

    Attributes as ``Source`` describes them; tensors that a fold changes are rounded to the dtype that the
    source has them in.

    Args:
        inner: the source, in 16 bit or read as such.
        fold: what is folded.
        exact: give changed tensors in fp32, unrounded: for comparing what both compute.

    Raises:
        CheckpointError: the fold is none of this model's.
    """

    def __init__(self, inner: Source, fold: KvFold, *, exact: bool = False) -> None:
        self.inner = inner
        self.fold = fold
        self._exact = exact
        self._foldable = foldable(inner.headers, inner.config)
        self._spots = _spots(self._foldable, fold)
        self.label: str = inner.label
        # Loaded whole, its tensors are asked for: those in the folder are not its own.
        self.kind: Kind = "headers" if inner.kind == "headers" else "dequantized"
        self.revision: str | None = inner.revision
        self.license: str | None = inner.license
        self.headers: Mapping[str, TensorHeader] = inner.headers
        self.note: str = inner.note
        self.config: dict[str, Any] = inner.config
        told = f"{inner.fingerprint} {fold.digest()} {exact}"
        self.fingerprint: str = hashlib.sha256(told.encode()).hexdigest()

    @property
    def changed(self) -> Collection[str]:
        """Names of the tensors that differ from the inner source's."""
        return self._spots.keys()

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``."""
        spots = self._spots.get(name)
        tensor = self.inner.read(name, index)
        if spots is None:
            return tensor
        assert index is None, "attention has no experts"
        folded = tensor.float()
        for spot in spots:
            _apply(folded, spot, self.fold, self._foldable)
        return folded if self._exact else folded.to(tensor.dtype)

    def stored_names(self, name: str) -> Collection[str]:
        """The tensor itself."""
        return (name,)

    def gguf_file(self) -> str | None:
        """See ``Source.gguf_file``: the tokenizer lies there."""
        return self.inner.gguf_file()


def _spots(can: Foldable, fold: KvFold) -> dict[str, list[Spot]]:
    """Tensor -> what is changed in it.

    Raises:
        CheckpointError: a layer that cannot be folded, or factors that RoPE does not pass through.
    """
    found: dict[str, list[Spot]] = defaultdict(list)
    for layer in fold.values:
        if layer not in can.values:
            raise _unfit(f"values of layer {layer} cannot be rotated{_because(can.no_values)}")
        for spot in can.values[layer]:
            found[spot.tensor].append(spot)
    for layer, factor_HD in fold.keys.items():
        if layer not in can.keys:
            raise _unfit(f"keys of layer {layer} cannot be scaled{_because(can.no_keys)}")
        problem = factors_problem(factor_HD, can)
        if problem:
            raise _unfit(f"layer {layer}: {problem}")
        for spot in can.keys[layer]:
            found[spot.tensor].append(spot)
    return dict(found)


def factors_problem(factor_HD: torch.Tensor, can: Foldable) -> str:
    """What is wrong with the key factors of a layer; "" where they can be folded."""
    if factor_HD.shape != (can.key_heads, can.head_dim):
        return f"key factors are {list(factor_HD.shape)}, not {[can.key_heads, can.head_dim]}"
    if not bool(factor_HD.isfinite().all()) or not bool((factor_HD > 0).all()):
        return "key factors are not all positive and finite"
    if not bool(((factor_HD <= _MOST_FACTOR) & (factor_HD >= 1 / _MOST_FACTOR)).all()):
        return f"key factors are not all between 1 / {_MOST_FACTOR:g} and {_MOST_FACTOR:g}"
    half = can.rotary_dim // 2
    if not bool((factor_HD[:, :half] == factor_HD[:, half : 2 * half]).all()):
        return "the two coordinates that RoPE turns have different key factors"
    return ""


def _apply(tensor: torch.Tensor, spot: Spot, fold: KvFold, can: Foldable) -> None:
    """Changes the rows, or columns, of an fp32 tensor in place."""
    count = spot.heads * can.head_dim
    if spot.part == "output":
        columns_KN = tensor[:, spot.start : spot.start + count]
        rotated = _rotated(columns_KN.reshape(len(tensor), spot.heads, can.head_dim))
        columns_KN.copy_(rotated.flatten(1))
        return
    rows = tensor[spot.start : spot.start + count].view(spot.heads, can.head_dim, -1)
    if spot.part == "value":
        rows.copy_(_rotated(rows.transpose(1, 2).contiguous()).transpose(1, 2))
        return
    factor_HD = fold.keys[spot.layer]
    factor_ND = factor_HD.repeat_interleave(spot.heads // len(factor_HD), dim=0)[:, :, None]
    rows += spot.offset
    rows.copy_(rows * factor_ND if spot.part == "key" else rows / factor_ND)
    rows -= spot.offset


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """``x`` times the symmetric orthogonal Hadamard matrix, along the last dimension."""
    from compressor.numerics.hadamard import fast_hadamard

    return fast_hadamard(x).mul_(float(x.shape[-1]) ** -0.5)


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _unfit(what: str) -> CheckpointError:
    return CheckpointError(what, where=FOLD_NAME, fix="run the recipe again")


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(path), fix="run the recipe again")
