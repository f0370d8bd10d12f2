"""After the walk: a short distillation of scales, norms and biases against the source's logits.

The codes stay. Steps of Adam (arXiv:1412.6980) lower the Kullback-Leibler divergence from the source's
next-token distributions to the result's on the calibration rows; the last share of the rows is never trained
on and decides which step's values are kept, if any. State is saved as it goes: a killed run goes on with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.device import pick_device, synchronize
from compressor.progress import Progress, Silent
from compressor.stages.base import Claim
from compressor.stages.polish_files import State, load_state, save_state, write_polished
from compressor.stages.tokens import calibration_tokens
from compressor.stages.walked import WalkedTensors

if TYPE_CHECKING:
    import torch

    from compressor.model.whole import WholeModel
    from compressor.stages.polish_model import PolishedModel

# One row in so many is held out.
HELD_SHARE = 8
# Held-out rows are measured so many times along the way.
_MEASURES = 10
_WARM_UP = 0.05
_BETAS = (0.9, 0.95)
_EPSILON = 1e-12
# Logits that are turned into probabilities at a time, by device.
CHUNK_VALUES = {"cpu": 1 << 23, "cuda": 1 << 27}
# Between two times that the state is saved; so many times longer than the saving took, at least.
_SAVE_S = 60.0
_WORTH = 20.0


@dataclass(frozen=True)
class PolishSpec:
    """How a polish computes.

    Attributes:
        steps: of the optimizer.
        learning_rate: the highest; each step moves a value by about this fraction of itself.
        tokens: of one step, whole rows.
        seed: of the rows' order.
        batch_tokens: of one forward pass, at least one row.
        dtype: of the forward passes.
    """

    steps: int
    learning_rate: float
    tokens: int
    seed: int
    batch_tokens: int
    dtype: Literal["float32", "bfloat16"]


def held_out_rows(rows: int) -> int:
    """How many of the calibration rows are never trained on."""
    return max(1, rows // HELD_SHARE)


def polish_stage(
    source: Source,
    claims: Sequence[Claim],
    calibration: CalibrationSpec,
    spec: PolishSpec,
    walked: Path,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Polishes what the walk left in ``walked``; facts for the report: ``resumed``, and ``polish``.

    Raises:
        CheckpointError: as ``polish``.
        UserError: the disk is full.
    """
    # The walk has told of what was left out of them.
    shown = calibration_tokens(source, calibration, walked, Silent())
    return polish(source, claims, shown.ids_NT, spec, walked, folder, progress)


def polish(
    source: Source,
    claims: Sequence[Claim],
    ids_NT: torch.Tensor,
    spec: PolishSpec,
    walked: Path,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Writes what the walk left, polished, in the same layout.

    Args:
        source: the checkpoint.
        claims: of all its tensors.
        ids_NT: int64, one full calibration sequence a row; two at least.
        spec: how to compute.
        walked: the walk's folder.
        folder: of the stage.
        progress: told of every step.

    Returns:
        ``resumed``; ``polish``: ``steps``, ``kept`` (whether the held-out rows are nearer to the source than
        before, else the walk's values stand), ``kl_before`` and ``kl_after`` there (nats a token),
        ``held_out_tokens``, ``scales`` (values that could move), ``changed_16bit`` (names of norms and
        biases that are others now), ``seconds``.

    Raises:
        CheckpointError: the model cannot be loaded, or is laid out in an unknown way.
        UserError: the disk is full.
    """
    import torch

    from compressor.model.whole import WholeModel
    from compressor.stages.polish_model import PolishedModel

    device = pick_device()
    dtype: torch.dtype = getattr(torch, spec.dtype)
    whole = WholeModel.load(source, dtype=dtype, device=device)
    result = PolishedModel(source, whole, claims, WalkedTensors(walked), dtype, device)
    work = _Polish(whole, result, ids_NT.to(device), spec, folder, progress)
    state, resumed = work.run()
    knobs = result.knobs
    knobs.put(state.best)
    kept = state.best_kl < state.first_kl
    if kept and not knobs.is_sane:
        progress.warn("the polish made values that no format stores: the walk's values stay")
        kept = False
    changed = knobs.changed() if kept else {}
    write_polished(walked, folder, changed, whole.blocks)
    facts = {
        "steps": spec.steps,
        "kept": kept,
        "kl_before": state.first_kl,
        "kl_after": state.best_kl if kept else state.first_kl,
        "held_out_tokens": work.held_NT.numel(),
        "scales": knobs.exponents.numel(),
        "changed_16bit": sorted(changed.keys() & result.vectors),
        "seconds": round(state.seconds, 1),
    }
    return {"resumed": resumed, "polish": facts}


class _Polish:
    """The optimizer's loop."""

    def __init__(
        self,
        whole: WholeModel,
        result: PolishedModel,
        ids_NT: torch.Tensor,
        spec: PolishSpec,
        folder: Path,
        progress: Progress,
    ) -> None:
        held = held_out_rows(len(ids_NT))
        self.held_NT, self._train_NT = ids_NT[-held:], ids_NT[:-held]
        self._whole, self._result, self._knobs = whole, result, result.knobs
        self._spec, self._folder, self._progress = spec, folder, progress
        self._rows = max(1, spec.tokens // ids_NT.shape[1])
        self._batch_rows = max(1, spec.batch_tokens // ids_NT.shape[1])

    def run(self) -> tuple[State, bool]:
        """All steps; the state after the last, and whether an earlier run had begun."""
        import torch

        from compressor.stages.training import row_order

        spec, knobs = self._spec, self._knobs
        started = time.monotonic()
        found = load_state(self._folder, knobs.exponents)
        state = found or State.begin(knobs.exponents, self._measure())
        knobs.put(state.exponents)
        order = row_order(len(self._train_NT), self._rows * spec.steps, spec.seed)
        self._progress.start("polish", spec.steps, "items", done=state.step)
        every = max(1, spec.steps // _MEASURES)
        saved, cost = time.monotonic(), 0.0
        while state.step < spec.steps:
            chosen = order[state.step * self._rows : (state.step + 1) * self._rows]
            self._backward(self._train_NT[chosen])
            with torch.no_grad():
                self._move(state)
            state.step += 1
            if state.step % every == 0 or state.step == spec.steps:
                self._compare(state)
            note = f"KL {state.first_kl:.4g} -> {state.best_kl:.4g}"
            self._progress.advance(1, note=note)
            now = time.monotonic()
            if now - saved > max(_SAVE_S, _WORTH * cost) and state.step < spec.steps:
                state.seconds += now - started
                started = now
                save_state(self._folder, state)
                saved = time.monotonic()
                cost = saved - now
        state.seconds += time.monotonic() - started
        save_state(self._folder, state)
        self._progress.finish(resumed=found is not None and found.step == spec.steps)
        return state, found is not None

    def _backward(self, ids_RT: torch.Tensor) -> None:
        """Leaves the gradient of the mean divergence over the rows with the knobs."""
        import torch

        self._knobs.clear_gradients()
        for ids_BT in torch.split(ids_RT, self._batch_rows):
            with torch.no_grad():
                wanted = self._source_logits(ids_BT)
            loss = divergence(self._result.logits(ids_BT), wanted) / ids_RT.numel()
            loss.backward()  # type: ignore[no-untyped-call]

    def _move(self, state: State) -> None:
        """One step of Adam."""
        gradients, step = self._knobs.gradients(), state.step + 1
        state.mean.lerp_(gradients, 1 - _BETAS[0])
        state.square.lerp_(gradients.square(), 1 - _BETAS[1])
        mean = state.mean / (1 - _BETAS[0] ** step)
        square = state.square / (1 - _BETAS[1] ** step)
        rate = learning_rate(state.step, self._spec.steps, self._spec.learning_rate)
        state.exponents.sub_(rate * mean / (square.sqrt() + _EPSILON))
        self._knobs.put(state.exponents)

    def _compare(self, state: State) -> None:
        kl = self._measure()
        if isfinite(kl) and kl < state.best_kl:
            state.best_kl = kl
            state.best.copy_(state.exponents)

    def _measure(self) -> float:
        """Mean divergence on the held-out rows, nats a token."""
        import torch

        with torch.no_grad():
            total: float = sum(
                float(divergence(self._result.logits(ids_BT), self._source_logits(ids_BT)))
                for ids_BT in torch.split(self.held_NT, self._batch_rows)
            )
        synchronize(self.held_NT.device)
        return total / self.held_NT.numel()

    def _source_logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._whole.model(input_ids=ids_BT, use_cache=False).logits
        return logits


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Of step 0, 1, ...: a short linear rise, then half a cosine down to zero."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return highest * (step + 1) / warm
    return highest * 0.5 * (1 + cos(pi * (step - warm + 1) / (steps - warm + 1)))


def divergence(logits_BTV: torch.Tensor, wanted_BTV: torch.Tensor) -> torch.Tensor:
    """fp32 scalar: KL(wanted || logits) summed over tokens, some tokens at a time in fp32."""
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from torch.utils.checkpoint import checkpoint

    def summed(logits_NV: torch.Tensor, wanted_NV: torch.Tensor) -> torch.Tensor:
        log_q, log_p = (log_softmax(found, -1, dtype=torch.float32) for found in (logits_NV, wanted_NV))
        return kl_div(log_q, log_p, reduction="sum", log_target=True)

    vocabulary = logits_BTV.shape[-1]
    tokens = max(1, CHUNK_VALUES[logits_BTV.device.type] // vocabulary)
    parts = zip(
        torch.split(logits_BTV.reshape(-1, vocabulary), tokens),
        torch.split(wanted_BTV.reshape(-1, vocabulary), tokens),
        strict=True,
    )
    if not torch.is_grad_enabled():
        return torch.stack([summed(*part) for part in parts]).sum()
    sums = [checkpoint(summed, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum()
