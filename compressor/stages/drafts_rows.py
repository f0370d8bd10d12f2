"""Rows of tokens for a draft head: stretches of texts, and what the compressed model writes after them.

A head need only foretell what its target will say, so the target's own words teach it most
(FastMTP, arXiv:2509.18362, section 4.1).

Legend: N rows, T tokens of a row, P of a prompt, B rows at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.errors import UserError
from compressor.evals.decode_compare import loops
from compressor.model.reader import Reader
from compressor.progress import Progress
from compressor.stages.drafts_spec import RowsSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOLDER = "rows"
_NAME = "ids"
# Of a generator's seed for each batch of rows, so that no two runs' batches meet.
_STRIDE = 1_000_003


@dataclass(frozen=True, eq=False)
class DraftRows:
    """What a head is trained or measured on.

    Attributes:
        ids_NT: int64.
        lengths_N: tokens of each up to the first end of text that the target wrote; what follows counts for
            nothing.
        datasets_N: which dataset each is of.
    """

    ids_NT: torch.Tensor
    lengths_N: torch.Tensor
    datasets_N: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids_NT)

    def counted(self, which: torch.Tensor) -> torch.Tensor:
        """bool [B, T]: which tokens of these rows are before an end."""
        places_T = torch.arange(self.ids_NT.shape[1])
        return places_T[None] < self.lengths_N[which, None]


@dataclass(frozen=True, eq=False)
class RowSets:
    """All rows.

    Attributes:
        trained: to train on.
        held_out: to measure on, of other stretches of the texts.
        looping: rows that were written and left out, because they run in circles.
        written: tokens that the target wrote for those that are left.
    """

    trained: DraftRows
    held_out: DraftRows
    looping: int
    written: int


def row_sets(
    texts_NP: torch.Tensor,
    spec: RowsSpec,
    model: PreTrainedModel,
    ends: Sequence[int],
    folder: Path,
    progress: Progress,
) -> RowSets:
    """The rows; those that are written are kept in ``folder`` as they come, so that a killed run goes on.

    Args:
        texts_NP: the calibration's rows.
        spec: how many, and how they are written.
        model: the target, in evaluation mode on its device.
        ends: ids that end a text.
        folder: see above.
        progress: told of the tokens.

    Raises:
        UserError: no row to train or to measure on is left; the disk is full.
    """
    datasets_N = torch.tensor(spec.calibration.order())
    chosen_N = _chosen(len(texts_NP), spec)
    ids_NT = texts_NP[chosen_N]
    if spec.new_tokens:
        ids_NT = _written(model, ids_NT, spec, folder, progress)
    lengths_N = _lengths(ids_NT, spec, ends)
    # What follows an end is no part of the text, so a circle there is none of its.
    written = [row[: int(length)] for row, length in zip(ids_NT.tolist(), lengths_N, strict=True)]
    loops_N = torch.tensor([loops(row[spec.calibration.sequence_length :]) for row in written])
    held_N = torch.arange(len(ids_NT)) < spec.held_out
    sets = []
    for wanted_N in (~held_N, held_N):
        kept_N = wanted_N & ~loops_N
        if not bool(kept_N.any()):
            raise UserError(
                f"all of the {int(wanted_N.sum())} texts that the compressed model wrote run in circles",
                where="drafts.train.temperature",
                fix="raise it, or set drafts.train.data to text",
            )
        sets.append(DraftRows(ids_NT[kept_N], lengths_N[kept_N], datasets_N[chosen_N[kept_N]]))
    made = int((lengths_N - spec.calibration.sequence_length)[~loops_N].sum())
    trained, held_out = sets
    return RowSets(trained, held_out, int(loops_N.sum()), made)


def _chosen(texts: int, spec: RowsSpec) -> torch.Tensor:
    """int64 [N]: the text of each row; first the held-out ones, then the others in turn."""
    own = texts - spec.held_out
    return torch.cat([torch.arange(spec.held_out), spec.held_out + torch.arange(spec.rows) % own])


def _lengths(ids_NT: torch.Tensor, spec: RowsSpec, ends: Sequence[int]) -> torch.Tensor:
    """int64 [N]: tokens up to and with the first end among those that were written."""
    prompt, length = spec.calibration.sequence_length, ids_NT.shape[1]
    if not spec.new_tokens or not ends:
        return torch.full((len(ids_NT),), length)
    ended_NT = torch.isin(ids_NT[:, prompt:], torch.tensor([*ends]))
    until_N = (ended_NT.int().cumsum(dim=1) == 0).sum(dim=1)
    return (prompt + until_N + 1).clamp(max=length)


def _written(
    model: PreTrainedModel, prompts_NP: torch.Tensor, spec: RowsSpec, folder: Path, progress: Progress
) -> torch.Tensor:
    """int64 [N, T]: the prompts and what the model writes after each, batch by batch."""
    kept = folder / _FOLDER
    kept.mkdir(parents=True, exist_ok=True)
    batches = torch.split(prompts_NP, spec.at_once)
    paths = [kept / f"{number:06d}.tensors" for number in range(len(batches))]
    done = sum(len(batch) for batch, path in zip(batches, paths, strict=True) if path.is_file())
    total = len(prompts_NP) * spec.new_tokens
    progress.start("draft texts", total, "tokens", done=done * spec.new_tokens)
    found = []
    for number, (batch_BP, path) in enumerate(zip(batches, paths, strict=True)):
        if not path.is_file():
            ids_BT = write_on(model, batch_BP, spec, spec.seed * _STRIDE + number)
            write_tensors(path, {_NAME: ids_BT.to(torch.int32)})
            progress.advance(len(batch_BP) * spec.new_tokens)
        file = read_header(path)
        found.append(read_tensor(path, file.headers[_NAME], file.offsets[_NAME]).long())
    progress.finish(resumed=done == len(prompts_NP))
    return torch.cat(found)


@torch.inference_mode()
def write_on(model: PreTrainedModel, prompts_BP: torch.Tensor, spec: RowsSpec, seed: int) -> torch.Tensor:
    """int64 [B, T] on the CPU: prompts and ``spec.new_tokens`` more; an end is a token like others."""
    generator = torch.Generator(model.device).manual_seed(seed)
    reader = Reader(model)
    ids = [prompts_BP.to(model.device)]
    for _ in range(spec.new_tokens):
        logits_BV = reader.read(ids[-1], last_only=True).logits_BTV[:, -1]
        if spec.temperature:
            probs_BV = torch.softmax(logits_BV / spec.temperature, dim=-1)
            ids.append(torch.multinomial(probs_BV, 1, generator=generator))
        else:
            ids.append(logits_BV.argmax(dim=-1, keepdim=True))
    return torch.cat(ids, dim=1).cpu()
