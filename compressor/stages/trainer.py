"""The optimizer's loop that the stages which train share: AdamW in one process, or several of accelerate's.

AdamW (arXiv:1711.05101) with a linear warm-up, then a cosine. State is saved as it goes: a killed run goes on
with it, on the CPU to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import cos, isfinite, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import UserError
from compressor.progress import Progress
from compressor.stages.trainer_files import Progressed, load_state, save_state

if TYPE_CHECKING:
    import torch
    from torch import nn

# Steps whose mean loss stands for the beginning, the end, and the present.
ENDS = 10
_BETAS = (0.9, 0.95)
# The cosine ends at this share of the highest rate.
_LAST_RATE = 0.1


@dataclass(frozen=True)
class Schedule:
    """How long is trained, and how fast.

    Attributes:
        stage: what progress is called.
        where: the recipe's section, for faults.
        steps: of the optimizer.
        warmup_steps: until the highest rate is reached.
        save_every: steps after which the state is saved.
        most_norm: gradients are scaled down to this.
    """

    stage: str
    where: str
    steps: int
    warmup_steps: int
    save_every: int
    most_norm: float = 1.0


def rate_share(step: int, steps: int, warmup: int) -> float:
    """Share of the highest learning rate in step 0, 1, ...: a linear rise, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + cos(pi * passed))


class Trainer:
    """The loop, in one process or in several that accelerate has started.

    Args:
        schedule: how long, and how fast.
        folder: keeps the state.
        progress: told of every step.
    """

    def __init__(self, schedule: Schedule, folder: Path, progress: Progress) -> None:
        from accelerate import Accelerator

        self._schedule, self._folder, self._progress = schedule, folder, progress
        self._accelerator = Accelerator(mixed_precision="no")

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self._accelerator.device
        return device

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return bool(self._accelerator.is_main_process)

    @property
    def processes(self) -> int:
        """How many there are."""
        return int(self._accelerator.num_processes)

    def wait(self) -> None:
        """Until all processes have come here."""
        self._accelerator.wait_for_everyone()

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """This process's part of what a step consists of."""
        return items[self._accelerator.process_index :: self.processes]

    def check_shared(self, items: int, where: str) -> None:
        """Refuses steps of ``items`` sequences that processes cannot share alike.

        Raises:
            UserError: they cannot.
        """
        if items % self.processes:
            raise UserError(
                f"a step of {items} sequences cannot be shared among {self.processes} processes",
                where=where,
                fix="make it that many sequences, or a multiple",
            )

    def prepared(self, module: nn.Module) -> Any:
        """The module whose forward pass makes the loss, as several processes need it."""
        return self._accelerator.prepare_model(module)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the loss's gradient to the parameters'."""
        self._accelerator.backward(loss)

    def apart(self, prepared: Any) -> AbstractContextManager[Any]:
        """Within it, gradients are not yet averaged over processes."""
        found: AbstractContextManager[Any] = self._accelerator.no_sync(prepared)
        return found

    def mean(self, value: float) -> float:
        """Over all processes."""
        import torch

        if self.processes == 1:
            return value
        return float(self._accelerator.reduce(torch.tensor(float(value), device=self.device), "mean"))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes."""
        if self.processes == 1:
            return tensor
        found: torch.Tensor = self._accelerator.reduce(tensor, "sum")
        return found

    def optimizer(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]]) -> torch.optim.Optimizer:
        """AdamW over groups of (parameters, highest learning rate).

        Without weight decay: what is trained is small, or would be pulled to zero from where it was.
        """
        import torch

        told = [{"params": [*parameters], "highest": highest} for parameters, highest in groups]
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(told, lr=1.0, betas=_BETAS, weight_decay=0.0, fused=fused)

    def run(
        self,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        backward: Callable[[int], Mapping[str, float]],
        judge: Callable[[Progressed], bool] | None = None,
    ) -> tuple[Progressed, bool]:
        """All steps; how they went, and whether an earlier run had begun.

        Args:
            trained: what ``optimizer`` trains, by the names that the state keeps it under.
            optimizer: of ``optimizer()``.
            backward: leaves the gradient of a step with the parameters, and gives figures of it for the
                curves, with ``loss``.
            judge: called whenever the state is about to be saved; may add to the curves, and says whether
                training is to end here.

        Raises:
            UserError: the loss is not finite, or the disk is full.
        """
        schedule = self._schedule
        done = load_state(self._folder, trained, optimizer)
        resumed = done is not None
        done = done or Progressed()
        whole = done.stopped or done.step == schedule.steps
        self._progress.start(schedule.stage, schedule.steps, "items", done=done.step)
        before, started = done.seconds, time.monotonic()
        while done.step < schedule.steps and not done.stopped:
            self._step(trained, optimizer, backward, done)
            done.seconds = before + time.monotonic() - started
            recent = done.curves["loss"][-ENDS:]
            self._progress.advance(1, note=f"loss {sum(recent) / len(recent):.4f}")
            if done.step % schedule.save_every == 0 or done.step == schedule.steps:
                done.stopped = judge is not None and judge(done) and done.step < schedule.steps
                if self.writes:
                    save_state(self._folder, trained, optimizer, done)
        self._progress.finish(resumed=whole)
        return done, resumed

    def _step(
        self,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        backward: Callable[[int], Mapping[str, float]],
        done: Progressed,
    ) -> None:
        import torch

        schedule = self._schedule
        share = rate_share(done.step, schedule.steps, schedule.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * share
        told = backward(done.step)
        if not isfinite(told["loss"]):
            raise UserError(
                f"the loss is {told['loss']} in step {done.step + 1}",
                where=f"{schedule.where}.learning_rate",
                fix="lower it, or let more steps warm up",
            )
        for parameter in trained.values():
            if parameter.grad is None:
                # A layer that no token came through, such as an expert: its moments are saved, too.
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(trained.values(), schedule.most_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done.step += 1
        done.tell(told)
