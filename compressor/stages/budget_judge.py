"""Measures mixes on calibration text: the source's model with every group stored as a mix says.

Nothing is solved here: the values of every option lie in the files of the stage ``sensitivity``.

Legend: P scored positions of a row, V vocabulary, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.device import pick_device
from compressor.evals.windows import Window, summary
from compressor.progress import Progress
from compressor.stages.budget_spec import Group, Stored
from compressor.stages.budget_values import Values, values_name
from compressor.stages.sensitivity import rows_at_once
from compressor.stages.walk import WalkSpec

if TYPE_CHECKING:
    import torch

    from compressor.model.hidden import HiddenStates

_LOGIT_POSITIONS = 256


@dataclass(frozen=True)
class Judged:
    """What a mix loses on the judging rows.

    Attributes:
        kl: nats a token, from the source.
        increase: relative, of the perplexity.
        increase_ci95: its 95% interval, rows resampled; None where they are too few or too alike.
    """

    kl: float
    increase: float
    increase_ci95: tuple[float, float] | None

    @property
    def upper(self) -> float:
        """The increase that a quality goal is held against: its interval's upper end, infinite without."""
        return inf if self.increase_ci95 is None else self.increase_ci95[1]


class Judge:
    """Runs mixes over the same rows.

    Args:
        source: the checkpoint.
        ids_NT: rows, none of which sensitivities were measured on.
        groups: all that are chosen for.
        walk: how passes compute.
        seed: of the intervals.
        values: folder of the stage ``sensitivity``.
        progress: told each block.
    """

    def __init__(
        self,
        source: Source,
        ids_NT: torch.Tensor,
        groups: Sequence[Group],
        walk: WalkSpec,
        seed: int,
        values: Path,
        progress: Progress,
    ) -> None:
        import torch

        from compressor.model.tape import Tape

        self._ids_NT, self._seed, self._values, self._progress = ids_NT, seed, values, progress
        self._device = pick_device()
        batches = rows_at_once(ids_NT, walk.batch_tokens)
        self._batches = len(batches)
        self._start = self._states()
        self._tape = Tape.record(
            source, batches, dtype=getattr(torch, walk.dtype), device=self._device, states=self._start
        )
        self._by_block: dict[int, list[Group]] = {}
        for group in groups:
            if group.block is not None:
                self._by_block.setdefault(group.block, []).append(group)
        self._source_last: HiddenStates | None = None
        self._opened: dict[int, Values] = {}

    def measure(self, chosen: Mapping[str, Stored], note: str) -> Judged:
        """What is lost with each group stored as ``chosen`` says; ``note`` names the mix for people.

        Raises:
            CheckpointError: solved values changed since they were written.
        """
        import torch

        with torch.no_grad():
            if self._source_last is None:
                self._source_last = self._last({}, "source")
            last = self._last(chosen, note)
            windows: list[Window] = []
            for batch in range(self._batches):
                for source_TH, mixed_TH in zip(self._source_last.get(batch), last.get(batch), strict=True):
                    windows.append(self._window(len(windows), source_TH, mixed_TH))
            self._tape.close()
        rows, length = self._ids_NT.shape
        found = summary(windows, tokens=rows * length, context=length, seed=self._seed)
        return Judged(found.kl_mean, found.increase, found.increase_ci95)

    def _states(self) -> HiddenStates:
        import torch

        from compressor.model.hidden import HiddenStates

        return HiddenStates(self._device, keep=torch.device("cpu"))

    def _last(self, chosen: Mapping[str, Stored], note: str) -> HiddenStates:
        """The last block's outputs."""
        blocks = len(self._tape.blocks)
        self._progress.start(f"judge {note}", blocks, "items")
        states = self._start
        for index in range(blocks):
            block = self._tape.load(index)
            changed = [
                (group, chosen[group.name])
                for group in self._by_block.get(index, ())
                if group.name in chosen and chosen[group.name].scheme is not None
            ]
            if changed:
                values = self._values_of(index)
                for group, option in changed:
                    values.put(block, group, option)
            block = self._tape.place(block)
            after = self._states()
            for batch in range(self._batches):
                output = self._tape.run(block, states, batch)
                assert output is not None
                after.put(batch, output)
            states = after
            self._progress.advance(1)
        self._progress.finish()
        return states

    def _values_of(self, index: int) -> Values:
        """A block's solved values, whose file is hashed once."""
        if index not in self._opened:
            self._opened[index] = Values(self._values / values_name(index))
        return self._opened[index]

    def _window(self, row: int, source_TH: torch.Tensor, mixed_TH: torch.Tensor) -> Window:
        """One row, scored a few positions at a time."""
        import torch

        window, ids_T = Window(), self._ids_NT[row]
        first = 0
        for target_P in torch.split(ids_T[1:], _LOGIT_POSITIONS):
            positions = slice(first, first + len(target_P))
            source_PV = self._log_chances(source_TH[positions])
            window.add(source_PV, self._log_chances(mixed_TH[positions]), target_P)
            first = positions.stop
        return window

    def _log_chances(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        log_PV: torch.Tensor = self._tape.finish(hidden_PH[None])[0].float().log_softmax(-1)
        return log_PV
