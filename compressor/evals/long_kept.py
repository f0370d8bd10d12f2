"""What a long evaluation has measured, kept document by document: one that was killed goes on there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.evals.long_record import RulerScore
from compressor.workspace import write_json

if TYPE_CHECKING:
    import torch

_NLL = "nll"


@dataclass(frozen=True)
class Kept:
    """Files in ``folder``, each published by one rename; it belongs to one model pair, spec and device."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def row(self, name: str, number: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Negative log-likelihoods [P] of document ``number``."""
        path = self.folder / f"long-{name}-{number:04d}.safetensors"
        if not path.is_file():
            write_tensors(path, {_NLL: compute()})
        header = read_header(path)
        return read_tensor(path, header.headers[_NLL], header.offsets[_NLL])

    def answer(self, name: str, number: int, compute: Callable[[], tuple[float, bool]]) -> tuple[float, bool]:
        """Log-probability of answer ``number``, and whether it was found."""
        logprob, found = self._json(f"{name}-{number:05d}", lambda: list(compute()))
        return float(logprob), bool(found)

    def score(self, name: str, compute: Callable[[], RulerScore]) -> RulerScore:
        """Of one RULER task."""
        return RulerScore(**self._json(name, lambda: dict(vars(compute()))))

    def _json(self, name: str, compute: Callable[[], Any]) -> Any:
        path = self.folder / f"long-{name}.json"
        if not path.is_file():
            write_json(path, compute())
        return json.loads(path.read_text(encoding="utf-8"))
