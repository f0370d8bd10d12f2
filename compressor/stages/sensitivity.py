"""What each way to store a group does to the loss: the stage before a choice of schemes.

The KL divergence of a changed model from the source is, to second order, half the change's square under the
Fisher information; labels drawn from the source's own predictions make the gradients of which that is the
covariance (Kunstner, Balles and Hennig 2019, arXiv:1905.12558, section 2). One pass forward keeps the states
before every block, one pass back brings the gradients to each block's output. There a group's cost under an
option is half the mean square of gradient times change, token by token: the change that the block's output
shows when only that group is stored so. Memory is that of two copies of a block; the states of all blocks
wait where the walk's would.

Legend: B sequences, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.device import collect_memory, pick_device
from compressor.errors import CheckpointError
from compressor.kv.formats import FORMATS
from compressor.progress import Progress
from compressor.spec import LinearPart
from compressor.stages.base import Claim
from compressor.stages.budget_spec import Group, SensitivityJob
from compressor.stages.budget_values import Values, is_solved, quantized, solve_values, values_name
from compressor.stages.input_scales import InputScales
from compressor.stages.tokens import calibration_tokens
from compressor.workspace import write_json

if TYPE_CHECKING:
    import torch

    from compressor.model.blocks import Block, Site
    from compressor.model.hidden import HiddenStates
    from compressor.model.tape import Tape

_PLAIN = "bf16"
COSTS_NAME = "costs.json"
_STATES = "states.tmp-sensitivity"


def sensitivity_stage(
    source: Source, job: SensitivityJob, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Solves every option of every group and measures it; facts: ``resumed`` and ``tokens_heard``.

    Leaves ``costs.json`` (group -> option -> nats a token, None where the group cannot be tried) and a file
    of solved values for each block. A finished block is not solved or tried again by a rerun.

    Raises:
        CheckpointError: the model cannot be walked, or a weight is not finite.
        UserError: a text cannot be read or is too short; the disk is full.
    """
    import torch

    shown = calibration_tokens(source, job.calibration, folder, progress)
    ids_NT = shown.ids_NT[: job.heard]
    with torch.no_grad():
        work = _Passes(source, job, ids_NT, folder, progress)
        try:
            resumed = work.forward()
            work.backward()
        finally:
            work.close()
    collect_memory()
    names = [group.name for group in job.groups]
    names += [name for name in work.costs if name not in names]
    costs = {name: work.costs.get(name) for name in names}
    write_json(folder / COSTS_NAME, costs)
    return {"resumed": resumed, "tokens_heard": ids_NT.numel()}


def measured_costs(folder: Path) -> dict[str, dict[str, float] | None]:
    """What the stage left: group -> option -> nats a token."""
    found: dict[str, dict[str, float] | None] = json.loads((folder / COSTS_NAME).read_text())
    return found


def cache_name(layer: int) -> str:
    """Under which costs of formats of one layer's KV cache are kept."""
    return f"kv_cache.{layer}"


def rows_at_once(ids_NT: torch.Tensor, most_tokens: int) -> Sequence[torch.Tensor]:
    """Batches of a few rows."""
    import torch

    return torch.split(ids_NT, max(1, most_tokens // ids_NT.shape[1]))


class _Passes:
    """Forward once, back once.

    Attributes:
        costs: group -> option -> nats a token, of the blocks that are done.
    """

    def __init__(
        self, source: Source, job: SensitivityJob, ids_NT: torch.Tensor, folder: Path, progress: Progress
    ) -> None:
        import torch

        from compressor.model.tape import Tape

        self._source, self._job, self._folder, self._progress = source, job, folder, progress
        self._device = pick_device()
        self._tokens = ids_NT.numel()
        batches = rows_at_once(ids_NT, job.walk.batch_tokens)
        self._batches = len(batches)
        self._spilled = folder / _STATES
        shutil.rmtree(self._spilled, ignore_errors=True)
        self._states: list[HiddenStates] = [self._waiting(0)]
        self._tape: Tape = Tape.record(
            source,
            batches,
            dtype=getattr(torch, job.walk.dtype),
            device=self._device,
            states=self._states[0],
        )
        self._blocks = range(len(self._tape.blocks))
        self._by_block = {
            index: [group for group in job.groups if group.block == index] for index in self._blocks
        }
        self.costs: dict[str, dict[str, float]] = {}

    def close(self) -> None:
        """Removes what lies on the disk for these passes only."""
        self._tape.close()
        shutil.rmtree(self._spilled, ignore_errors=True)

    def forward(self) -> bool:
        """Keeps the states before every block, and solves what is not solved; whether anything was."""
        sizes = [self._work_bytes(index) for index in self._blocks]
        done = [is_solved(self._folder / values_name(index)) for index in self._blocks]
        already = sum(size for size, finished in zip(sizes, done, strict=True) if finished)
        self._progress.start("sensitivity", sum(sizes), "work", done=already)
        for index in self._blocks:
            block = self._tape.place(self._tape.load(index))
            scales = self._pass(block)
            if not done[index] and self._by_block[index]:
                path = self._folder / values_name(index)
                groups = self._tried(block)
                solve_values(self._source, groups, self._job.solver, scales, path)
                self._progress.advance(sizes[index], note=self._tape.blocks[index])
        self._progress.finish(resumed=all(done))
        return any(done)

    def backward(self) -> None:
        """Brings gradients back from the loss, and tries every option where they pass."""
        names = [self._folder / f"costs-{index:05d}.json" for index in self._blocks]
        self._progress.start("options", len(names), "items", done=sum(path.is_file() for path in names))
        gradients = self._loss_gradients()
        for index in reversed(self._blocks):
            block = self._tape.place(self._tape.load(index))
            if not names[index].is_file():
                write_json(names[index], self._try(block, gradients))
                self._progress.advance(1, note=self._tape.blocks[index])
            self.costs |= json.loads(names[index].read_text())
            if index:
                for batch in range(self._batches):
                    back = self._tape.back(block, self._states[index], batch, gradients.get(batch))
                    gradients.put(batch, back)
        self._progress.finish()

    def _work_bytes(self, index: int) -> int:
        """What stands for the time that solving a block takes."""
        return sum(option.nbytes for group in self._by_block[index] for option in group.options)

    def _waiting(self, index: int | str) -> HiddenStates:
        """Where the states before a block wait."""
        import torch

        from compressor.model.hidden import HiddenStates

        if self._job.walk.states == "disk":
            folder = self._spilled / str(index)
            folder.mkdir(parents=True)
            return HiddenStates(self._device, folder=folder)
        return HiddenStates(self._device, keep=torch.device("cpu"))

    def _pass(self, block: Block) -> dict[str, InputScales]:
        """All batches through a block; what was heard of its inputs, for options that store it."""
        scales: dict[str, InputScales] = {}
        for group in self._by_block[block.index]:
            for option in group.options:
                if option.scheme is not None and option.scheme.static_inputs and option.name not in scales:
                    scales[option.name] = self._scales(block, option.name)
        after = self._waiting(block.index + 1)

        def hear(site: Site, x_NI: torch.Tensor, _: object) -> None:
            for found in scales.values():
                found.hear(site, x_NI)

        for batch in range(self._batches):
            output = self._tape.run(block, self._states[block.index], batch, hear=hear if scales else None)
            assert output is not None
            after.put(batch, output)
        self._states.append(after)
        for found in scales.values():
            found.finish()
        return scales

    def _scales(self, block: Block, name: str) -> InputScales:
        """Hears the ranges for one option, of all groups of a block that have it."""
        by_module: dict[str, tuple[Claim, LinearPart]] = {}
        for group in self._by_block[block.index]:
            for option in group.options:
                if option.name == name:
                    claims = quantized(group, option, self._job.solver)
                    by_module |= {part.module: (claim, part) for claim in claims for part in claim.role.parts}
        return InputScales(block, by_module, self._device)

    def _tried(self, block: Block) -> list[Group]:
        """The groups of a block whose matrices can be replaced in it."""
        known = {place.part.module for place in block.places}
        return [
            group
            for group in self._by_block[block.index]
            if all(part.module in known for claim in group.claims for part in claim.role.parts)
        ]

    def _loss_gradients(self) -> HiddenStates:
        """Of each batch, the gradient of the summed loss on drawn labels at the last block's output."""
        import torch

        last, gradients = self._states[-1], self._waiting("gradients")
        draw = torch.Generator().manual_seed(self._job.seed)
        for batch in range(self._batches):
            rows = []
            for hidden_1TH in torch.split(last.get(batch), 1):
                hidden_1TH = hidden_1TH.detach().requires_grad_()
                with torch.enable_grad():
                    logits_TV = self._tape.finish(hidden_1TH, gradients=True)[0].float()
                    if not bool(logits_TV.isfinite().all()):
                        raise CheckpointError(
                            "the source's logits are NaN or infinite on the calibration text",
                            where=self._source.label,
                            fix="its weights are broken, or it needs a wider dtype",
                        )
                    chances_TV = logits_TV.detach().softmax(-1).cpu()
                    label_T = torch.multinomial(chances_TV, 1, generator=draw)[:, 0].to(logits_TV.device)
                    loss = torch.nn.functional.cross_entropy(logits_TV, label_T, reduction="sum")
                    (gradient_1TH,) = torch.autograd.grad(loss, hidden_1TH)
                rows.append(gradient_1TH)
            gradients.put(batch, torch.cat(rows))
        self._tape.close()
        return gradients

    def _try(self, block: Block, gradients: HiddenStates) -> dict[str, dict[str, float]]:
        """Group -> option -> nats a token, with that group alone stored so."""
        costs: dict[str, dict[str, float]] = {}
        if self._job.caches:
            found = {name: self._cache_cost(block, gradients, name) for name in self._job.caches}
            costs[cache_name(block.index)] = found
        groups = self._tried(block)
        if not groups:
            return costs
        values = Values(self._folder / values_name(block.index))
        for group in groups:
            costs[group.name] = {}
            for option in group.options:
                cost = 0.0
                if option.scheme is not None:
                    twin = block.twin()
                    values.put(twin, group, option)
                    cost = self._cost(block.index, twin, gradients)
                costs[group.name][option.name] = cost
        return costs

    def _cache_cost(self, block: Block, gradients: HiddenStates, name: str) -> float:
        """Nats a token of storing the block's keys and values in a format of the KV cache."""
        from compressor.model.attention_heard import HeardAttention, heard_attention
        from compressor.stages.kv_gather import through

        make = FORMATS[name].make
        assert make is not None, "fitted formats are not tried"
        if name == _PLAIN:
            return 0.0
        keys, values = make()

        def stored(call: HeardAttention) -> tuple[torch.Tensor, torch.Tensor]:
            return through(keys, call.key_BHTD), through(values, call.value_BHTD)

        with heard_attention(block.module, stored):
            return self._cost(block.index, block, gradients)

    def _cost(self, index: int, changed: Block, gradients: HiddenStates) -> float:
        """Nats a token of the change that a block's output shows."""
        total = 0.0
        for batch in range(self._batches):
            output_BTH = self._tape.run(changed, self._states[index], batch)
            assert output_BTH is not None
            change_BTH = output_BTH.float() - self._states[index + 1].get(batch).float()
            moved_BT = (change_BTH * gradients.get(batch).float()).sum(-1)
            total += float(moved_BT.double().square().sum())
        return 0.5 * total / self._tokens
