"""Training a draft head on what the frozen, compressed target makes of rows of tokens.

The best of the states that were measured on held-out rows is what stays; training may end before its last
step where none has been better for long.

Legend: N rows, B rows at once, K steps that are unrolled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from compressor.drafts.base import Head, Rows, Unrolled
from compressor.progress import Progress
from compressor.stages.drafts_hidden import TargetStates
from compressor.stages.drafts_spec import TrainSpec
from compressor.stages.trainer import Schedule, Trainer
from compressor.stages.trainer_files import BEST_NAME, Progressed, load_best, save_best
from compressor.stages.training import row_order

_MOST_NORM = 0.5


@dataclass(frozen=True)
class Measured:
    """What a head foretells of held-out rows, each place a place to propose from.

    Attributes:
        loss: what is trained for, a place.
        losses: of each step, not weighted, nats.
        accepted: share of the places where the target's likeliest tokens are foretold up to each step: what
            greedy decoding would accept there, of a text that the target wrote greedily.
        places: how many.
    """

    loss: float
    losses: tuple[float, ...]
    accepted: tuple[float, ...]
    places: int

    @property
    def length(self) -> float:
        """Tokens that a pass of the target is expected to give: one of its own, and what is accepted."""
        return 1 + sum(self.accepted)


@dataclass(frozen=True)
class Trained:
    """How training went.

    Attributes:
        before: measured with the first values.
        after: measured with those that stay.
        steps: that were made.
        best_step: after which the values that stay were met; 0 for the first ones.
        curves: ``loss`` and ``length`` of each step; ``held_out_loss``, ``held_out_length`` and
            ``held_out_step`` of each measurement.
        seconds: of the steps.
        resumed: whether an earlier run had begun.
    """

    before: Measured
    after: Measured
    steps: int
    best_step: int
    curves: Mapping[str, list[float]]
    seconds: float
    resumed: bool


class HeadTrainer:
    """Trains one head.

    Args:
        head: is trained in place.
        spec: how.
        shown: rows to train on.
        held_out: rows to measure on.
        folder: keeps the state.
        progress: told of every step.
    """

    def __init__(
        self,
        head: Head,
        spec: TrainSpec,
        shown: TargetStates,
        held_out: TargetStates,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._head, self._spec, self._shown, self._held_out = head, spec, shown, held_out
        self._folder, self._progress = folder, progress
        schedule = Schedule(
            "draft", "drafts.train", spec.steps, spec.warmup_steps, spec.save_every, _MOST_NORM
        )
        self._trainer = Trainer(schedule, folder, progress)
        self._trainer.check_shared(spec.batch, "drafts.train.batch")
        # Of no step there is no order.
        self._order = row_order(len(shown), max(1, spec.steps * spec.batch), spec.seed)

    def run(self) -> Trained:
        """All steps, or as many as help; the head has the best values then.

        Raises:
            UserError: the loss is not finite, or the disk is full.
        """
        trained, spec = self._head.trained, self._spec
        before = self.measure()
        if not spec.steps:
            return Trained(before, before, 0, 0, {}, 0.0, False)
        self._shown.keep(self._progress)
        if self._trainer.writes and not (self._folder / BEST_NAME).is_file():
            save_best(self._folder, trained)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        optimizer = self._trainer.optimizer([([*trained.values()], spec.learning_rate)])
        done, resumed = self._trainer.run(
            trained, optimizer, self._backward, lambda told: self._judged(told, before)
        )
        self._trainer.wait()
        load_best(self._folder, trained)
        for parameter in trained.values():
            parameter.requires_grad_(False)
        best = _best(done, before)
        return Trained(before, self.measure(), done.step, best, done.curves, done.seconds, resumed)

    @torch.no_grad()
    def measure(self, numbers_N: torch.Tensor | None = None) -> Measured:
        """The head as it is, on all held-out rows or on some."""
        if numbers_N is None:
            numbers_N = torch.arange(len(self._held_out))
        total = _Sums()
        for rows in self._held_out.pieces(numbers_N):
            total.add(self._unrolled(rows))
        return total.measured()

    def _backward(self, step: int) -> dict[str, float]:
        """Leaves the gradient of the mean loss of the step's places; ``loss`` and ``length`` of them."""
        spec, trainer = self._spec, self._trainer
        first = step * spec.batch
        numbers = trainer.share(range(first, first + spec.batch))
        total = _Sums()
        for rows in self._shown.pieces(self._order[list(numbers)]):
            found = self._unrolled(rows)
            if found.loss.requires_grad:  # texts that ended at once have no place to propose from
                found.loss.backward()  # type: ignore[no-untyped-call]
            total.add(found)
        places = max(1.0, trainer.sum(torch.tensor(float(total.places), device=trainer.device)).item())
        for parameter in self._head.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = trainer.sum(parameter.grad) / places
        loss = trainer.sum(torch.tensor(total.loss, dtype=torch.float64, device=trainer.device)).item()
        accepted = trainer.sum(torch.tensor(total.accepted_sum, device=trainer.device)).item()
        return {"loss": loss / places, "length": 1 + accepted / places}

    def _unrolled(self, rows: Rows) -> Unrolled:
        """Matrix products are of the spec's dtype, whatever the parameters are."""
        kind, dtype = self._trainer.device.type, getattr(torch, self._spec.dtype)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return self._head.unroll(rows, self._spec.unroll)

    def _judged(self, done: Progressed, before: Measured) -> bool:
        """Measures, keeps the best, and says whether there is no hope of a better one."""
        found = self.measure()
        best = _best(done, before)
        lowest = before.loss if best == 0 else min(done.curves["held_out_loss"])
        done.tell(
            {"held_out_loss": found.loss, "held_out_length": found.length, "held_out_step": float(done.step)}
        )
        if isfinite(found.loss) and found.loss < lowest:
            if self._trainer.writes:
                save_best(self._folder, self._head.trained)
            return False
        since = sum(step > best for step in done.curves["held_out_step"])
        return self._spec.patience is not None and since >= self._spec.patience


def _best(done: Progressed, before: Measured) -> int:
    """The step after which held-out rows were foretold best; 0 where never better than before the first."""
    lowest, best = before.loss, 0
    losses, steps = done.curves.get("held_out_loss", []), done.curves.get("held_out_step", [])
    for loss, step in zip(losses, steps, strict=True):
        if loss < lowest:
            lowest, best = loss, int(step)
    return best


class _Sums:
    """Adds up what heads say of pieces."""

    def __init__(self) -> None:
        self.loss, self.places = 0.0, 0
        self._losses: Any = 0.0
        self._accepted: Any = 0.0

    def add(self, found: Unrolled) -> None:
        """Adds one piece's."""
        self.loss += float(found.loss.detach())
        self.places += found.places
        self._losses = self._losses + found.losses_K.detach().double().cpu()
        self._accepted = self._accepted + found.accepted_K.detach().double().cpu()

    @property
    def accepted_sum(self) -> float:
        """Accepted tokens of all steps."""
        return float(self._accepted.sum()) if torch.is_tensor(self._accepted) else 0.0

    def measured(self) -> Measured:
        """Means over the places."""
        places = max(1, self.places)
        losses = (self._losses / places).tolist() if torch.is_tensor(self._losses) else []
        accepted = (self._accepted / places).tolist() if torch.is_tensor(self._accepted) else []
        return Measured(self.loss / places, tuple(losses), tuple(accepted), self.places)
