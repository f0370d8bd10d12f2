"""Long documents -> sequences to train on: stretches of one document each, and joined short documents.

Legend: N sequences, T tokens of a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from compressor.calibration.documents import open_documents
from compressor.calibration.render import Renderer
from compressor.calibration.spec import DatasetSpec
from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.errors import UserError
from compressor.evals.run import leading_token
from compressor.progress import Progress
from compressor.spec import TensorHeader
from compressor.stages.tokens import check_ids, source_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_FILE = "sequences.tensors"
_NAME = "ids"


@dataclass(frozen=True, eq=False)
class Sequences:
    """What adapters are trained on.

    Attributes:
        ids_NT: int32 token ids.
        joined: how many of the sequences are put together from documents, or ends of them, that do not fill
            one; the others are one stretch of one document.
        documents: how many documents were read.
    """

    ids_NT: torch.Tensor
    joined: int
    documents: int


def adapter_sequences(
    source: Source,
    datasets: Sequence[DatasetSpec],
    *,
    length: int,
    count: int,
    seed: int,
    folder: Path,
    progress: Progress,
) -> Sequences:
    """Up to ``count`` sequences of ``length`` tokens, kept in ``folder``; fewer where the texts end before.

    Documents are taken in a random order. Each is cut from its start into stretches of the full length. What
    is left at its end is joined, by the tokenizer's end-of-text token, to what was left of the documents
    before; attention is not kept apart there. Each sequence starts with the token that the tokenizer puts
    before a text, if it puts one.

    Raises:
        CheckpointError: the source has no tokenizer that transformers can load, or one that makes ids which
            its embedding has no rows for.
        UserError: a text cannot be read, or all are too short for one sequence; the disk is full.
    """
    path = folder / _FILE
    if path.is_file():
        file = read_header(path)
        told = json.loads(file.metadata["told"])
        ids_NT = read_tensor(path, file.headers[_NAME], file.offsets[_NAME])
        check_ids(ids_NT, source)
        return Sequences(ids_NT, told["joined"], told["documents"])
    maker = _Maker(source_tokenizer(source, folder), length)
    made = maker.fill(datasets, count, seed, progress)
    check_ids(made.ids_NT, source)
    header = TensorHeader(_NAME, "I32", tuple(made.ids_NT.shape))
    told = {"joined": made.joined, "documents": made.documents}
    with ShardWriter(path, [header], {"told": json.dumps(told)}) as writer:
        writer.write(_NAME, made.ids_NT)
    return made


class _Maker:
    """Cuts and joins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        first = leading_token(tokenizer)
        self._tokenizer = tokenizer
        self._lead = [] if first is None else [first]
        self._room = length - len(self._lead)
        self._rows: list[torch.Tensor] = []
        self._rest: list[int] = []
        self._joined = 0

    def fill(self, datasets: Sequence[DatasetSpec], count: int, seed: int, progress: Progress) -> Sequences:
        """See ``adapter_sequences``."""
        import torch

        room = self._room + len(self._lead)
        opened = [open_documents(dataset, count * room, seed) for dataset in datasets]
        renderers = [Renderer(dataset, self._tokenizer) for dataset in datasets]
        order = [(which, index) for which, found in enumerate(opened) for index in range(len(found))]
        Random(seed).shuffle(order)
        progress.start("long documents", count * room, "tokens")
        read = 0
        for which, index in order:
            if len(self._rows) >= count:
                break
            before = len(self._rows)
            self._add(renderers[which].text(index, opened[which][index]))
            read += 1
            progress.advance((min(len(self._rows), count) - min(before, count)) * room)
        progress.finish()
        if not self._rows:
            raise UserError(
                f"the documents hold {len(self._rest):,} tokens, fewer than one sequence of {room:,}",
                where="adapters.documents",
                fix="name longer documents, or more of them, or lower sequence_length",
            )
        return Sequences(torch.stack(self._rows[:count]), self._joined, read)

    def _add(self, text: str) -> None:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        if not ids:
            return
        whole = len(ids) // self._room * self._room
        for start in range(0, whole, self._room):
            self._put(ids[start : start + self._room])
        end = self._tokenizer.eos_token_id
        self._rest += [*ids[whole:], *([] if end is None else [end])]
        while len(self._rest) >= self._room:
            self._put(self._rest[: self._room])
            self._rest = self._rest[self._room :]
            self._joined += 1

    def _put(self, ids: list[int]) -> None:
        import torch

        self._rows.append(torch.tensor([*self._lead, *ids], dtype=torch.int32))
