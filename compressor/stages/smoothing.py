"""Solver ``smooth``: scales moved from a block's matrices into what makes their inputs, before all else.

A fold (``model/foldings.py``) has one free scale a channel. They are made of the sizes of inputs and weights
with an exponent; that of least error of the readers' outputs is taken, on rows that the source model feeds
them, rounded as the scheme has engines round them. Norms are rounded to their stored dtype first, and the
readers multiplied by the exact ratio of old to new; where other tensors stay in 16 bit, scales are powers of
two, which round nothing but what F16 holds as subnormal numbers.

Legend: R sampled rows, O out_features, I in_features, K free scales of a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import safetensors_dtype, torch_dtype
from compressor.model.foldings import Fold, Spot, apply, find_folds
from compressor.schemes.base import Search
from compressor.spec import LinearPart, TensorHeader
from compressor.stages.base import Claim
from compressor.stages.importance import norm_importance
from compressor.stages.jobs import Job, scale_groups
from compressor.stages.receipts import PartError
from compressor.stages.smooth_check import sound
from compressor.stages.smooth_trial import HeardInput, Trial, hear, some_experts
from compressor.stages.walked import WalkedTensors, smoothing_name

if TYPE_CHECKING:
    from compressor.model.blocks import Block
    from compressor.model.hidden import HiddenStates
    from compressor.model.tape import Tape

# No scale is farther than this from the geometric mean of all.
LARGEST = 32.0
_TINY = 1e-12
# What scales are made of (``SmoothedInput.form``), and exponents in tenths.
_TRIED = (
    *(("inputs", tenths) for tenths in (2, 4, 6)),
    *(("both", tenths) for tenths in (2, 4)),
    *(("peaks", tenths) for tenths in (5, 8)),
)


@dataclass(frozen=True)
class SmoothedInput:
    """What was done about one input.

    Attributes:
        made_by: the source tensor of the norm or matrix that makes it.
        readers: the source tensors that read it.
        form: what the scales are made of: ``inputs``, ``both`` or ``peaks``; None where they stay one.
        ratio: the exponent.
        errors: quantized reader -> (relative squared error of its output with plain round to nearest before,
            and after), rows of outlying inputs weighted down; empty where nothing was tried.
        note: why it was left alone, or None.
    """

    made_by: str
    readers: tuple[str, ...]
    form: str | None = None
    ratio: float | None = None
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    note: str | None = None


class Smoother:
    """Smooths one block.

    Attributes:
        norms: name -> new stored weight of the norms that were changed.
        done: what was done about every input.

    Args:
        source: the checkpoint.
        tape: of the calibration tokens, with a small call.
        block: with the source's weights; its parameters are changed in place.
        fed: its twin, or None; what it holds in 16 bit becomes what is stored.
        claims: tensor name -> claim, of the whole checkpoint.
        solved: the modules of the matrices that this walk solves in the block.
    """

    def __init__(
        self,
        source: Source,
        tape: Tape,
        block: Block,
        fed: Block | None,
        claims: Mapping[str, Claim],
        solved: Mapping[str, tuple[Claim, LinearPart]],
    ) -> None:
        self._source, self._tape, self._block, self._fed = source, tape, block, fed
        self._claims, self._solved = claims, solved
        self.norms: dict[str, torch.Tensor] = {}
        self.done: list[SmoothedInput] = []
        self._scales: dict[str, torch.Tensor] = {}
        self._changed: dict[str, torch.Tensor] = {}
        self._rescaled: set[str] = set()
        # Where folding rounds: parameters before it, and module -> (where, factor) in order.
        self._before: dict[str, torch.Tensor] = {}
        self._factors: dict[str, list[tuple[Spot, torch.Tensor]]] = {}

    def run(self, states: HiddenStates, batches: int) -> None:
        """Chooses scales on the block's inputs and folds them in."""
        folds = []
        for fold in find_folds(self._tape, self._block):
            note = self._refusal(fold)
            if note is None:
                folds.append(fold)
            elif note:
                self.done.append(SmoothedInput(fold.name, _readers(fold), note=note))
        if not folds:
            return
        heard = hear(self._tape, self._block, folds, states, batches)
        tried = [(fold, self._choose(fold, x)) for fold, x in zip(folds, heard, strict=True)]
        del heard
        chosen = [(fold, scale_K) for fold, scale_K in tried if scale_K is not None]
        folded = sound(self._tape, self._block, states, batches, chosen)
        names = {fold.name for fold, _ in folded}
        self._leave({fold.name for fold, _ in chosen} - names)
        for fold, scale_K in folded:
            self._keep(fold, scale_K)
            self._fold(fold, scale_K)
        self._round()

    def again(self, walked: WalkedTensors) -> None:
        """Folds in what an interrupted run chose: the very same values."""
        found = [
            (fold, walked.changed(smoothing_name(fold.name))) for fold in find_folds(self._tape, self._block)
        ]
        for fold, scale_K in found:
            if scale_K is not None:
                self._fold(fold, scale_K)
        self._round()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What the block's file holds of it: changed 16-bit tensors by their names, and the scales."""
        scales = {smoothing_name(name): scale_K for name, scale_K in self._scales.items()}
        return self._changed | {name: scale_K.cpu() for name, scale_K in scales.items()}

    @property
    def headers(self) -> list[TensorHeader]:
        """Of ``tensors``."""
        return [
            TensorHeader(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """For the receipt: ``inputs`` (``SmoothedInput``), ``changed_16bit``."""
        return {"inputs": [asdict(found) for found in self.done], "changed_16bit": sorted(self._changed)}

    def weight(self, part: LinearPart) -> torch.Tensor:
        """[O, I]: a matrix to be solved, scaled in fp32: a 16-bit block rounds the product, and solvers
        would round that once more."""
        factors = self._factors.get(part.module)
        if factors is None:
            return self._block.weight(part)
        weight_OI = self._block.matrix_in(part, self._before[factors[0][0].parameter]).float()
        for spot, factor in factors:
            view = weight_OI.narrow(spot.dim, spot.start, spot.count)
            view.mul_(spot.along(factor, view))
        return weight_OI

    def told(self, error: PartError) -> PartError:
        """The errors of a solved matrix, with smoothing's part in its values; a solver that gave way is
        named as it is."""
        if error.module not in self._rescaled or error.note is not None:
            return error
        return replace(error, solver="smooth" if error.solver == "rtn" else f"smooth+{error.solver}")

    def _refusal(self, fold: Fold) -> str | None:
        """Why a fold is left alone; "" where nobody asked for it."""
        wanted = [claim for spot in fold.multiplied if (claim := self._claim(spot)).scheme is not None]
        asked = [claim for claim in wanted if claim.solver is not None and claim.solver.smoothing is not None]
        if not asked:
            return ""
        if len(asked) < len(wanted):
            return "another solver has a part of the matrices that read it"
        for spot in fold.spots:
            claim = self._claim(spot)
            if claim.scheme is not None:
                if spot.place is None or spot.place.part.module not in self._solved:
                    return f"{spot.tensor} is solved without calibration data"
            elif len(claim.tensor.shape) > 2:
                return f"{spot.tensor} stays in 16 bit"
            elif claim.outputs[0].dtype == "F16" and _overflows(self._source.read(spot.tensor)):
                return f"{spot.tensor} has values too large to be scaled in its dtype"
        return None

    def _claim(self, spot: Spot) -> Claim:
        return self._claims[spot.tensor]

    def _choose(self, fold: Fold, heard: HeardInput) -> torch.Tensor | None:
        """The scales of least error, fp32 [K]; None where none is better than ones."""
        jobs = self._jobs(fold)
        x_RI, weight_R = torch.cat(heard.x), torch.cat(heard.weight)
        solver = jobs[0][0][0].solver
        smooth = solver.smoothing if solver is not None else None
        assert smooth is not None, "only folds that were asked for are tried"
        importance_I = self._importance(jobs[0][0][0], fold)
        trial = Trial(fold, some_experts(jobs), self._block, x_RI, weight_R, importance_I)
        one_K = torch.ones(fold.scales, device=x_RI.device)
        form, ratio, scale_K = self._best(fold, trial, heard, smooth.search)
        del trial
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        for job in jobs:  # one by one: a trial keeps the outputs of its matrices
            check = Trial(fold, [job], self._block, x_RI, weight_R, importance_I)
            before |= check.errors(one_K, "full")
            after |= check.errors(scale_K, "full")
        found = SmoothedInput(fold.name, _readers(fold), form, ratio)
        kept = sum(after.values()) < sum(before.values())
        if not kept:
            after = before
            found = SmoothedInput(
                fold.name, found.readers, note="no scales lower the error of the matrices that read it"
            )
        errors = {module: (before[module], after[module]) for module in before}
        self.done.append(replace(found, errors=errors))
        return scale_K if kept else None

    def _leave(self, names: Set[str]) -> None:
        """Notes that inputs made by these are left as they were, since the block needs them so."""
        for index, found in enumerate(self.done):
            if found.made_by in names:
                errors = {module: (before, before) for module, (before, _) in found.errors.items()}
                self.done[index] = SmoothedInput(
                    found.made_by,
                    found.readers,
                    errors=errors,
                    note="the block computes something else with it",
                )

    def _best(
        self, fold: Fold, trial: Trial, heard: HeardInput, search: Search
    ) -> tuple[str, float, torch.Tensor]:
        """Form, exponent and scales of least error: of a few, then of the neighbours of the best."""
        make = self._maker(fold, trial, heard)
        tried: dict[tuple[str, int], tuple[float, torch.Tensor]] = {}

        def error(form: str, tenths: int) -> float:
            if (form, tenths) not in tried:
                scale_K = make(form, tenths / 10)
                tried[form, tenths] = sum(trial.errors(scale_K, search).values()), scale_K
            return tried[form, tenths][0]

        form, tenths = min(_TRIED, key=lambda candidate: error(*candidate))
        tenths = min((tenths, tenths - 1, tenths + 1), key=lambda near: error(form, near))
        return form, tenths / 10, tried[form, tenths][1]

    def _jobs(self, fold: Fold) -> list[Job]:
        """The readers that are quantized; those that share a tensor-level scale together."""
        return scale_groups(
            self._solved[spot.place.part.module]
            for spot in fold.multiplied
            if spot.place is not None and spot.place.part.module in self._solved
        )

    def _importance(self, claim: Claim, fold: Fold) -> torch.Tensor | None:
        importance_I = norm_importance(self._source, claim.role.input_norm, fold.channels)
        return None if importance_I is None else importance_I.to(self._tape.small_hidden.device)

    def _maker(self, fold: Fold, trial: Trial, heard: HeardInput) -> Callable[[str, float], torch.Tensor]:
        """(form, exponent) -> scales, fp32 [K], as they can be stored."""
        size_K = fold.gather(heard.size_I / heard.rows)
        peak_K = fold.gather(heard.peak_I.double())
        mean_K, largest_K = (fold.gather(found) for found in trial.weight_sizes())
        sizes = {
            "inputs": (size_K, torch.ones_like(size_K)),
            "both": (size_K, mean_K),
            "peaks": (peak_K, largest_K),
        }
        stays = any(self._claim(spot).scheme is None for spot in (*fold.divided, *fold.multiplied))

        def make(form: str, exponent: float) -> torch.Tensor:
            input_K, weight_K = sizes[form]
            raw_K = _power(input_K, exponent) / _power(weight_K, 1 - exponent)
            scale_K = (raw_K / raw_K.log().mean().exp()).clamp(1 / LARGEST, LARGEST)
            if stays:
                scale_K = scale_K.log2().round().exp2()
            return self._stored(fold, scale_K).float()

        return make

    def _stored(self, fold: Fold, scale_K: torch.Tensor) -> torch.Tensor:
        """The scales that the norm, rounded as it will be stored, stands for; fp64."""
        if fold.norm is None:
            return scale_K
        old_K = self._source.read(fold.norm.tensor).to(scale_K)
        new_K = self._new_norm(fold, scale_K).to(scale_K)
        ratio_K = (old_K + fold.offset) / (new_K + fold.offset)
        return torch.where(ratio_K.isfinite() & (ratio_K > 0), ratio_K, 1.0)

    def _new_norm(self, fold: Fold, scale_K: torch.Tensor) -> torch.Tensor:
        """The norm's weight in its stored dtype; a channel that would close or turn stays as it was."""
        assert fold.norm is not None
        dtype = torch_dtype(self._claim(fold.norm).outputs[0].dtype)
        old_K = self._source.read(fold.norm.tensor).to(scale_K.device, torch.float64)
        new_K = ((old_K + fold.offset) / scale_K.double() - fold.offset).to(dtype)
        kept_K = (old_K + fold.offset) * (new_K.double() + fold.offset) > 0
        return torch.where(kept_K, new_K, old_K.to(dtype))

    def _keep(self, fold: Fold, scale_K: torch.Tensor) -> None:
        """Keeps what ``weight`` is made of, where folding the scales in rounds."""
        device = self._tape.small_hidden.device
        scale_K = scale_K.to(device)
        for spots, factor in ((fold.multiplied, fold.expand(scale_K)), (fold.divided, 1 / scale_K.double())):
            for spot in spots:
                parameter = self._block.parameter(spot.parameter)
                if spot.place is None or self._claim(spot).scheme is None or parameter.dtype == torch.float32:
                    continue
                if spot.parameter not in self._before:
                    self._before[spot.parameter] = parameter.clone()
                self._factors.setdefault(spot.place.part.module, []).append((spot, factor))

    def _fold(self, fold: Fold, scale_K: torch.Tensor) -> None:
        """Folds scales into the block, and into what stays in 16 bit."""
        self._scales[fold.name] = scale_K
        self._rescaled |= {spot.place.part.module for spot in fold.multiplied if spot.place is not None}
        apply(self._block, fold, scale_K.to(self._tape.small_hidden.device))
        scale_I = fold.expand(scale_K.cpu().float())
        for spots, factor in ((fold.multiplied, scale_I), (fold.divided, 1 / scale_K.cpu().double())):
            for spot in spots:
                if self._claim(spot).scheme is None:
                    view = spot.of_tensor(self._wide(spot.tensor))
                    view.mul_(spot.along(factor, view))
        if fold.norm is not None:
            new_K = self._new_norm(fold, scale_K).cpu()
            self.norms[fold.norm.tensor] = self._changed[fold.norm.tensor] = new_K
            self._put(self._block, fold.norm.parameter, new_K)

    def _wide(self, tensor: str) -> torch.Tensor:
        """A tensor that stays in 16 bit, fp64, to be changed."""
        if tensor not in self._changed:
            self._changed[tensor] = self._source.read(tensor).double()
        return self._changed[tensor]

    def _round(self) -> None:
        """Rounds what stays in 16 bit to what is stored, and has the twin compute with that."""
        for name, value in self._changed.items():
            self._changed[name] = value.to(torch_dtype(self._claims[name].outputs[0].dtype)).contiguous()
        if self._fed is None:
            return
        for name, value in self._changed.items():
            for parameter in self._block.module.state_dict():
                if self._tape.tensor_of(f"{self._block.path}.{parameter}") == name:
                    self._put(self._fed, parameter, value, own=True)

    @staticmethod
    def _put(block: Block, parameter: str, value: torch.Tensor, *, own: bool = False) -> None:
        block.parameter(parameter, own=own).copy_(value)


def _readers(fold: Fold) -> tuple[str, ...]:
    return tuple(dict.fromkeys(spot.tensor for spot in fold.multiplied))


def _power(x_K: torch.Tensor, exponent: float) -> torch.Tensor:
    """x^exponent, with what is as good as zero lifted: every scale is positive."""
    return x_K.clamp(min=max(float(x_K.max()) * 1e-6, _TINY)) ** exponent


def _overflows(tensor: torch.Tensor) -> bool:
    """Whether scaled values might not be finite in F16."""
    if not tensor.is_floating_point():
        return False
    return float(tensor.abs().max()) * LARGEST > torch.finfo(torch.float16).max
