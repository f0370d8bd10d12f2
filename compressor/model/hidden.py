"""Hidden states that wait between two blocks, one tensor a batch: on the device, in host memory, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_KEY = "hidden_states"


class HiddenStates:
    """One tensor a batch.

    Args:
        device: where ``get`` gives them.
        keep: where they wait; None for ``device``. Ignored with a folder.
        folder: an existing folder where they wait as one safetensors file a batch; what lies there already
            is taken up, so that a killed walk goes on.

    Attributes:
        nbytes: bytes that are held now, wherever they wait.
    """

    def __init__(
        self, device: torch.device, *, keep: torch.device | None = None, folder: Path | None = None
    ) -> None:
        self._device = device
        self._keep = device if keep is None else keep
        self._folder = folder
        self._held: dict[int, torch.Tensor] = {}
        self._sizes: dict[int, int] = {}
        if folder is not None:
            self._sizes = {int(path.stem): path.stat().st_size for path in folder.glob("*.safetensors")}

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        return sum(self._sizes.values())

    def get(self, batch: int) -> torch.Tensor:
        """The batch's hidden states on the device; whoever changes them must copy them first.

        Raises:
            KeyError: none were put there.
        """
        if self._folder is None:
            return self._held[batch].to(self._device)
        if batch not in self._sizes:
            raise KeyError(batch)
        found: torch.Tensor = load_file(self._path(self._folder, batch), device=str(self._device))[_KEY]
        return found

    def put(self, batch: int, states: torch.Tensor) -> None:
        """Keeps a batch's hidden states in place of the former ones; the values are not rounded."""
        states = states.detach()
        if self._folder is None:
            self._held[batch] = states.to(self._keep)
            self._sizes[batch] = states.nbytes
            return
        path = self._path(self._folder, batch)
        # A killed run must leave the old file or the new one, never half of one.
        half = path.with_suffix(".half")
        save_file({_KEY: states.cpu().contiguous()}, half)
        half.replace(path)
        self._sizes[batch] = path.stat().st_size

    @staticmethod
    def _path(folder: Path, batch: int) -> Path:
        return folder / f"{batch:06d}.safetensors"
