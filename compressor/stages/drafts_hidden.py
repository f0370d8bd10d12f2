"""What the frozen target computes of rows: when they are shown, or once, kept on the disk within a budget.

Legend: N rows, B rows at once, T tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.drafts.base import LAST, Rows
from compressor.progress import Progress
from compressor.stages.drafts_rows import DraftRows
from compressor.stages.drafts_spec import PIECE_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOLDER = "hidden"


class TargetStates:
    """Gives rows with the target's hidden states.

    On the CPU each row is computed by itself: with others its last bits would be others, and what is kept
    must change nothing.

    Args:
        model: the target, in evaluation mode on its device.
        layers: whose states are asked for; ``LAST`` is always given.
        rows: all that may be asked for.
        folder: keeps states.
        most_bytes: that may be kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int],
        rows: DraftRows,
        folder: Path,
        most_bytes: int = 0,
    ) -> None:
        self._model, self._rows, self._folder = model, rows, folder / _FOLDER
        self._layers = tuple(sorted({*layers, LAST}))
        self._length = rows.ids_NT.shape[1]
        self.kept = min(len(rows), most_bytes // self.row_bytes)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's states."""
        width = int(self._model.config.get_text_config().hidden_size)
        numbers = len(self._layers) * self._length * width
        return numbers * int(self._model.dtype.itemsize)

    def keep(self, progress: Progress) -> None:
        """Computes the rows that are kept, as far as they are not there.

        Raises:
            UserError: the disk is full.
        """
        if not self.kept:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        left = [number for number in range(self.kept) if not self._path(number).is_file()]
        done = self.kept - len(left)
        progress.start("hidden states", self.kept, "items", done=done)
        for number in left:
            hidden = self._computed(self._rows.ids_NT[number : number + 1])
            write_tensors(self._path(number), {str(n): states[0] for n, states in hidden.items()})
            progress.advance(1)
        progress.finish(resumed=not left)

    def pieces(self, numbers: torch.Tensor) -> Iterator[Rows]:
        """The rows of these numbers, as many at once as the device takes; of those kept what was kept."""
        at_once = max(1, PIECE_TOKENS[self._model.device.type] // self._length)
        for which_B in torch.split(numbers, at_once):
            ids_BT = self._rows.ids_NT[which_B]
            device = self._model.device
            yield Rows(
                ids_BT.to(device), self._hidden(which_B, ids_BT), self._rows.counted(which_B).to(device)
            )

    def _hidden(self, which_B: torch.Tensor, ids_BT: torch.Tensor) -> dict[int, torch.Tensor]:
        """[B, T, D] by layer."""
        kept_B = which_B < self.kept
        if not bool(kept_B.any()):
            return self._computed(ids_BT)
        made: dict[int, dict[int, torch.Tensor]] = {}
        others_O = torch.nonzero(~kept_B)[:, 0]
        if len(others_O):
            computed = self._computed(ids_BT[others_O])
            for place, row in enumerate(others_O.tolist()):
                made[row] = {n: states[place] for n, states in computed.items()}
        for row in torch.nonzero(kept_B)[:, 0].tolist():
            made[row] = self._read(int(which_B[row]))
        return {n: torch.stack([made[row][n] for row in range(len(which_B))]) for n in self._layers}

    def _computed(self, ids_BT: torch.Tensor) -> dict[int, torch.Tensor]:
        """[B, T, D] by layer."""
        if self._model.device.type != "cpu":
            return self._passed(ids_BT)
        each = [self._passed(ids_1T) for ids_1T in torch.split(ids_BT, 1)]
        return {n: torch.cat([found[n] for found in each]) for n in self._layers}

    @torch.no_grad()
    def _passed(self, ids_BT: torch.Tensor) -> dict[int, torch.Tensor]:
        # As the decoding loop reads them: the last ones are those that enter the head.
        found = self._model(
            ids_BT.to(self._model.device), use_cache=False, output_hidden_states=True, logits_to_keep=1
        )
        return {n: found.hidden_states[n] for n in self._layers}

    def _read(self, number: int) -> dict[int, torch.Tensor]:
        path = self._path(number)
        file = read_header(path)
        return {
            n: read_tensor(path, file.headers[str(n)], file.offsets[str(n)]).to(self._model.device)
            for n in self._layers
        }

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.tensors"
