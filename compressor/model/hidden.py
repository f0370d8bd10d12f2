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

        # Copies to and from host memory beside what the device computes.
        self._side = None
        if device.type != "cpu" and folder is None and self._keep.type == "cpu":
            self._side = torch.Stream(device)
        # Batch -> its states on their way to the device, and what tells that they are there.
        self._coming: dict[int, tuple[torch.Tensor, torch.Event]] = {}
        # The states on their way to the host, which must not be freed before they are there.
        self._leaving: tuple[torch.Tensor, torch.Event] | None = None

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
        if self._side is not None:
            return self._arrived(self._side, batch)
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
            self._held[batch] = self._kept(batch, states)
            self._sizes[batch] = states.nbytes
            return
        path = self._path(self._folder, batch)
        # A killed run must leave the old file or the new one, never half of one.
        half = path.with_suffix(".half")
        save_file({_KEY: states.cpu().contiguous()}, half)
        half.replace(path)
        self._sizes[batch] = path.stat().st_size

    def _kept(self, batch: int, states: torch.Tensor) -> torch.Tensor:
        if self._side is None:
            return states.to(self._keep)
        # Pinned, so that the device copies on its own.
        kept = self._held.get(batch)
        if kept is None or kept.shape != states.shape or kept.dtype != states.dtype:
            kept = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        computing = torch.accelerator.current_stream(self._device)
        if self._leaving is not None:
            computing.wait_event(self._leaving[1])
        if batch in self._coming:
            computing.wait_event(self._coming.pop(batch)[1])
        self._side.wait_stream(computing)
        with self._side:
            kept.copy_(states, non_blocking=True)
        self._leaving = (states, self._side.record_event())
        return kept

    def _arrived(self, side: torch.Stream, batch: int) -> torch.Tensor:
        """The batch's states, once they are on the device; the next batch's set out meanwhile."""
        computing = torch.accelerator.current_stream(self._device)
        if batch not in self._coming:
            self._send(side, batch)
        found, _ = self._coming[batch]
        for _, event in self._coming.values():  # what is freed here must have come, too
            computing.wait_event(event)
        self._coming.clear()
        if batch + 1 in self._held:
            self._send(side, batch + 1)
        return found

    def _send(self, side: torch.Stream, batch: int) -> None:
        kept = self._held[batch]
        # of the computing stream's memory, which it may still be using for something else
        made = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        side.wait_stream(torch.accelerator.current_stream(self._device))
        with side:
            made.copy_(kept, non_blocking=True)
        self._coming[batch] = (made, side.record_event())

    @staticmethod
    def _path(folder: Path, batch: int) -> Path:
        return folder / f"{batch:06d}.safetensors"
