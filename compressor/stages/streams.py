"""The hidden states of the source and of the result, between two blocks of the walk."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compressor.checkpoint.safetensors_file import read_header, read_tensor, safetensors_dtype
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

    from compressor.model.hidden import HiddenStates

# States are kept for a rerun when the walk since took so many times as long as keeping them.
_WORTH = 20.0
# Before the first time they are taken to be written so fast.
_BYTES_PER_S = 5e8


class Streams:
    """Both streams of hidden states at the entrance of one block, one tensor a batch.

    Attributes:
        exact: of the source.
        fed: of the result, whose blocks so far are quantized; None where nobody needs it.
        device: where the walk computes.

    Args:
        folder: of the stage; states that are kept, or spilled, lie in it.
        place: where the states are while the walk runs.
        device: see above.
        feeding: whether the result's stream is needed.
    """

    def __init__(
        self, folder: Path, place: Literal["device", "host", "disk"], device: torch.device, *, feeding: bool
    ) -> None:
        self.device = device
        self._folder = folder
        self._spilled = folder / "spilled.tmp-states"
        shutil.rmtree(self._spilled, ignore_errors=True)
        self.exact = self._states(place, "exact")
        self.fed = self._states(place, "fed") if feeding else None
        self._by_name = {"exact": self.exact} | ({} if self.fed is None else {"fed": self.fed})
        self._batches = 0
        self._kept_at = time.monotonic()
        self._cost_s = 0.0

    def __len__(self) -> int:
        return self._batches

    def begin(self, batches: int, first_unfinished: int) -> int:
        """Takes both streams to the last block not after ``first_unfinished`` that they are known for.

        ``exact`` holds the entrance of block 0, which is where they start if nothing later was kept.
        Streams of no batches are wherever they should be.
        """
        self._batches = batches
        if not batches:
            return first_unfinished
        kept = {int(path.stem.split("-")[1]): path for path in self._folder.glob("kept-*.safetensors")}
        usable = [index for index in kept if index <= first_unfinished]
        if not usable:
            if self.fed is not None:
                for number in range(batches):
                    self.fed.put(number, self.exact.get(number))
            return 0
        path = kept[max(usable)]
        file = read_header(path)
        for name, header in file.headers.items():
            stream, _, batch = name.partition(".")
            self._by_name[stream].put(
                int(batch), read_tensor(path, header, file.offsets[name]).to(self.device)
            )
        return max(usable)

    def _states(self, place: Literal["device", "host", "disk"], name: str) -> HiddenStates:
        import torch

        from compressor.model.hidden import HiddenStates

        if place != "disk":
            return HiddenStates(self.device, keep=torch.device("cpu") if place == "host" else None)
        folder = self._spilled / name
        folder.mkdir(parents=True)
        return HiddenStates(self.device, folder=folder)

    def keep(self, index: int) -> None:
        """Keeps both streams at the entrance of block ``index`` for a rerun, where that is worth its time."""
        cost_s = self._cost_s or sum(states.nbytes for states in self._by_name.values()) / _BYTES_PER_S
        if time.monotonic() - self._kept_at < _WORTH * cost_s:
            return
        started = time.monotonic()
        path = self._folder / f"kept-{index:05d}.safetensors"
        named = {
            f"{stream}.{batch}": (states, batch)
            for stream, states in self._by_name.items()
            for batch in range(self._batches)
        }
        headers = [
            TensorHeader(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
            for name, (states, batch) in named.items()
            for tensor in (states.get(batch),)
        ]
        with ShardWriter(path, headers) as writer:
            for name, (states, batch) in named.items():
                writer.write(name, states.get(batch))
        for older in self._folder.glob("kept-*.safetensors"):
            if older != path:
                os.unlink(older)
        self._kept_at = time.monotonic()
        self._cost_s = self._kept_at - started

    def discard(self) -> None:
        """Removes everything from the disk; the states are of no use any more."""
        shutil.rmtree(self._spilled, ignore_errors=True)
        for path in self._folder.glob("kept-*.safetensors"):
            path.unlink()
