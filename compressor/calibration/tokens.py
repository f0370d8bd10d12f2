"""Texts -> rows of tokens: drawn from all over each dataset, packed without padding, the same every time.

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, TypeVar

from compressor.calibration.documents import Row, open_documents
from compressor.calibration.render import Renderer
from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.errors import UserError
from compressor.evals.run import leading_token

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from compressor.progress import Progress

T = TypeVar("T")

# A stretch is about a row of English: long enough to fill one, short enough to come from many places.
_CHARS_PER_TOKEN = 4
# Stretches tokenized at a time; fast tokenizers spread them over threads.
_BATCH = 32


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a model is shown.

    Attributes:
        ids_NT: token ids, int64 ``[num_samples, sequence_length]``.
        counts: tokens by dataset, in the order of the spec; for the report.
        warnings: what was not done as asked for.
    """

    ids_NT: torch.Tensor
    counts: dict[str, int]
    warnings: tuple[str, ...]


def load_tokens(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Calibration:
    """Rows of exactly ``sequence_length`` tokens; only what they need is read and tokenized.

    Stretches of the documents are joined by the tokenizer's end-of-text token, where it has one, and cut
    into rows; each row starts with the token that the tokenizer puts before a text, if it puts one. Rows of
    the datasets take turns (``CalibrationSpec.order``).

    Raises:
        UserError: a dataset cannot be read, or holds fewer tokens than its share, or the tokenizer makes
            none of its texts.
    """
    import torch

    order = spec.order()
    first = leading_token(tokenizer)
    lead = [] if first is None else [first]
    rows: list[Iterator[list[int]]] = []
    warnings: list[str] = []
    progress.start("calibration texts", spec.num_samples * spec.sequence_length, "tokens")
    for index, dataset in enumerate(spec.datasets):
        count = order.count(index)
        made, heard = _rows(index, count, spec, tokenizer, lead)
        if count == 0:
            heard.append(f"calibration: {dataset.name} gets none of the {spec.num_samples} samples")
        rows.append(iter(made))
        warnings += heard
        progress.advance(count * spec.sequence_length, dataset.name)
    progress.finish()
    for warning in warnings:
        progress.warn(warning)
    counts: Counter[str] = Counter()
    for index, dataset in enumerate(spec.datasets):
        counts[dataset.name] += order.count(index) * spec.sequence_length
    return Calibration(torch.tensor([next(rows[index]) for index in order]), dict(counts), tuple(warnings))


def _rows(
    index: int,
    count: int,
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase,
    lead: list[int],
) -> tuple[list[list[int]], list[str]]:
    """``count`` rows of one dataset, and warnings."""
    if count == 0:
        return [], []
    dataset, where = spec.datasets[index], spec.place(index)
    if dataset.template == "chat" and tokenizer.chat_template is None:
        raise UserError(
            f"{dataset.name} is to pass through the chat template, and the source's tokenizer has none",
            where=where,
            fix="leave `template` out, or set it to plain",
        )
    # Of the content, not of the name: the rows may not depend on where a file lies.
    random = Random(f"{spec.seed} {json.dumps(dataset.content, sort_keys=True)}")
    step = spec.sequence_length - len(lead)
    renderer = Renderer(dataset, tokenizer)
    documents = open_documents(dataset, count * step, spec.seed)
    stretches = _stretches(documents, renderer, step * _CHARS_PER_TOKEN, random)
    ids: list[int] = []
    seen = 0
    while len(ids) < count * step:
        batch = list(islice(stretches, _BATCH))
        if not batch:
            raise _too_little(dataset, where, len(ids), count * step, seen, renderer.warnings)
        seen += len(batch)
        for tokens in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += _document_ids(tokens, lead, tokenizer.eos_token_id)
    made = [lead + ids[start : start + step] for start in range(0, count * step, step)]
    return made, renderer.warnings


def _too_little(
    dataset: DatasetSpec, where: str, found: int, wanted: int, stretches: int, warnings: list[str]
) -> UserError:
    if stretches and not found:
        return UserError(
            f"the tokenizer makes no tokens of the texts of {dataset.name}",
            where=where,
            fix="look at the normalizer and the pre-tokenizer in the source's tokenizer.json",
        )
    heard = "".join(f" ({warning.removeprefix('calibration: ')})" for warning in warnings)
    return UserError(
        f"{dataset.name} holds {found} tokens; its share of the calibration is {wanted}{heard}",
        where=where,
        fix="lower num_samples or sequence_length, give it a smaller weight, or name more text",
    )


def _document_ids(tokens: list[int], lead: list[int], end: int | None) -> list[int]:
    """A stretch as it stands in a row: no leading token of its own, and an end-of-text token behind it.

    Of no tokens nothing is made: ends alone are no text.
    """
    if lead and tokens[:1] == lead:
        tokens = tokens[1:]
    if not tokens:
        return []
    # Chat templates often end with it, and perhaps a line feed.
    return tokens if end is None or end in tokens[-2:] else [*tokens, end]


def _stretches(documents: Sequence[Row], renderer: Renderer, longest: int, random: Random) -> Iterator[str]:
    """Stretches of at most ``longest`` characters from all documents: each gives one before any gives two.

    Which document and which of its stretches comes first is random; no stretch comes twice.
    """
    left: dict[int, list[slice]] = {index: [] for index in _shuffled(range(len(documents)), random)}
    text, of = "", -1
    turn = 0
    while left:
        for index in list(left):
            if of != index:
                text, of = renderer.text(index, documents[index]), index
            if turn == 0:
                left[index] = _shuffled(_cuts(text, longest), random)
            if left[index]:
                yield text[left[index].pop()]
            if not left[index]:
                del left[index]
        turn += 1


def _cuts(text: str, longest: int) -> list[slice]:
    """The text in pieces of at most ``longest`` characters, cut between paragraphs, lines or words."""
    cuts, start = [], 0
    while len(text) - start > longest:
        least, most = start + longest // 2, start + longest
        ends = (text.rfind(mark, least, most) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > least), most)
        cuts.append(slice(start, end))
        start = end
    cuts.append(slice(start, len(text)))
    return [cut for cut in cuts if text[cut].strip()]


def _shuffled(items: Sequence[T], random: Random) -> list[T]:
    """In random order; ``Random.shuffle`` may change between versions of Python, ``random()`` does not."""
    return sorted(items, key=lambda _: random.random())
