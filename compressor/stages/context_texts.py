"""The documents that factors are searched and accepted on: long ones first, cut to one length.

Legend: T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from compressor.calibration.documents import open_documents
from compressor.calibration.spec import DatasetSpec
from compressor.errors import UserError
from compressor.evals.run import leading_token
from compressor.evals.text import CHARS_PER_TOKEN
from compressor.progress import Progress
from compressor.rope.search_spec import SearchSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Tokens of a document that lie past the original length: fewer say little.
LEAST_PAST = 64
# Tokens that a character makes at most: the bytes of UTF-8. Texts too short for sure are not tokenized.
_MOST_TOKENS_OF_CHAR = 4


@dataclass(frozen=True, eq=False)
class SearchTexts:
    """Attributes:
    search: documents [T] that candidates are scored on.
    accept: others, for the choice.
    first: the token that each begins with where the tokenizer has one, or None.
    """

    search: tuple[torch.Tensor, ...]
    accept: tuple[torch.Tensor, ...]
    first: int | None


def search_texts(
    tokenizer: PreTrainedTokenizerBase,
    spec: SearchSpec,
    *,
    original_length: int,
    target_length: int,
    progress: Progress,
) -> SearchTexts:
    """Documents of ``spec.tokens`` tokens, drawn in an order that the seed decides; shorter ones where there
    are too few, which is warned of.

    Raises:
        UserError: too few documents that are longer than the original length, or an unreadable file.
    """
    length, begin = spec.tokens or target_length, leading_token(tokenizer)
    counts = (spec.search_documents, spec.accept_documents)
    least = original_length + LEAST_PAST
    had: set[tuple[int, ...]] = set()
    if spec.held_out is None:
        both = _draw(tokenizer, spec.documents, sum(counts), length, least, spec.seed, progress, had)
        return SearchTexts(both[: counts[0]], both[counts[0] :], begin)
    first = _draw(tokenizer, spec.documents, counts[0], length, least, spec.seed, progress, had)
    had = {tuple(text_T.tolist()) for text_T in first}
    second = _draw(tokenizer, spec.held_out, counts[1], length, least, spec.seed, progress, had)
    return SearchTexts(first, second, begin)


def _draw(
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    count: int,
    length: int,
    least: int,
    seed: int,
    progress: Progress,
    had: set[tuple[int, ...]],
) -> tuple[torch.Tensor, ...]:
    """``count`` documents of ``length`` tokens, then the longest of the others; none of ``had``, which they
    are added to.
    """
    import torch

    first = leading_token(tokenizer)
    ahead = [] if first is None else [first]
    full: list[torch.Tensor] = []
    shorter: list[torch.Tensor] = []
    for text in _texts(path, seed):
        if _MOST_TOKENS_OF_CHAR * len(text) < least:
            continue
        head = text[: length * CHARS_PER_TOKEN]
        ids = [*ahead, *tokenizer.encode(head, add_special_tokens=False, verbose=False)][:length]
        if tuple(ids) in had:
            continue
        had.add(tuple(ids))
        if len(ids) == length:
            full.append(torch.tensor(ids))
        elif len(ids) >= least:
            shorter.append(torch.tensor(ids))
        if len(full) == count:
            return tuple(full)
    # Sorting keeps the drawn order among equals.
    found = [*full, *sorted(shorter, key=len, reverse=True)][:count]
    if len(found) < count:
        raise UserError(
            f"{len(found)} documents of {path.name} are longer than {least:,} tokens; {count} are asked for",
            where=str(path),
            fix="name a file of longer documents, or ask for fewer with context.search.search_documents and "
            "accept_documents",
        )
    progress.warn(
        f"context.search: {count - len(full)} of {count} documents of {path.name} are shorter than "
        f"{length:,} tokens (the shortest is {len(found[-1]):,})"
    )
    return tuple(found)


def _texts(path: Path, seed: int) -> Iterator[str]:
    """The documents of a file in a drawn order; conversations are left out."""
    documents = open_documents(DatasetSpec(path.name, path=path), 0, seed)
    order = list(range(len(documents)))
    Random(seed).shuffle(order)
    for index in order:
        document = documents[index]
        if isinstance(document, str):
            yield document
