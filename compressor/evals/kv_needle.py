"""A number hidden at some depth of a text and asked for at its end (passkey retrieval, arXiv 2305.16300).

Small models find few of them: so the answer's log-probability is measured beside whether it is found, and
both against the same model with a 16-bit cache.

Legend: R texts at once, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.errors import UserError
from compressor.evals.kv_feed import KvVariant, MakeCache, Mode, feed, fitting_chunk, texts_at_once
from compressor.evals.kv_record import NeedleCell, NeedleResult
from compressor.evals.text import vocabulary_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress

_PLACES = (
    "harbour",
    "library",
    "old mill",
    "north tower",
    "garden",
    "railway station",
    "museum",
    "lighthouse",
)


@dataclass(frozen=True)
class Wording:
    """How a number is hidden and asked for; ``{number}`` and ``{place}`` are filled in.

    Attributes:
        needle: what is hidden.
        question: what ends the text.
        answer: what is to follow.
        opening: what begins the text.
        numbers: the least and the largest.
    """

    needle: str
    question: str
    answer: str = " {number}"
    opening: str = ""
    numbers: tuple[int, int] = (10_000, 99_999)


SECRET = Wording(
    needle="\n\nThe secret number of the {place} is {number}. Remember it.\n\n",
    question="\n\nThe secret number of the {place} is",
)


@dataclass(frozen=True)
class Needle:
    """One text: ids [T], of which the last ``tail`` are question and answer, and ``answer`` the answer."""

    depth: float
    ids_T: torch.Tensor
    answer: int
    tail: int


def hide_needles(
    tokenizer: PreTrainedTokenizerBase,
    filler_T: torch.Tensor,
    *,
    tokens: int,
    depths: Sequence[float],
    trials: int,
    first: int | None,
    seed: int,
    wording: Wording = SECRET,
) -> list[Needle]:
    """Texts of exactly ``tokens`` tokens, ``trials`` for each depth, with different numbers and fillers.

    Args:
        tokenizer: of the model.
        filler_T: ids of the text around the needles; begun again where it is too short.
        tokens: length of each text, everything included.
        depths: 0 for the beginning to 1 for right before the question.
        trials: texts of a depth.
        first: a token before every text (``<bos>``), or None.
        seed: of numbers, places and where the filler begins.
        wording: of the needle and what is around the filler.

    Raises:
        UserError: the length has no room for needle and question.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    def ids(text: str) -> torch.Tensor:
        return filler_T.new_tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    made = []
    opening = ids(wording.opening)
    for depth in depths:
        for _ in range(trials):
            low, high = wording.numbers
            place, number = _PLACES[draw(len(_PLACES))], low + draw(high - low + 1)
            needle, question, answer = (
                ids(text.format(place=place, number=number))
                for text in (wording.needle, wording.question, wording.answer)
            )
            ahead = torch.cat([filler_T.new_tensor([] if first is None else [first]), opening])
            room = tokens - sum(map(len, (ahead, needle, question, answer)))
            if room < 0:
                raise UserError(
                    f"a text of {tokens} tokens has no room for a needle and its question",
                    fix=f"use {tokens - room} tokens or more",
                )
            filler = filler_T[(draw(len(filler_T)) + torch.arange(room)) % len(filler_T)]
            cut = round(depth * room)
            parts = (ahead, filler[:cut], needle, filler[cut:], question, answer)
            made.append(Needle(depth, torch.cat(parts), len(answer), len(question) + len(answer)))
    return made


def find_needles(
    model: PreTrainedModel,
    needles: Sequence[Needle],
    variants: Sequence[KvVariant],
    usual: MakeCache,
    *,
    chunk: int,
    mode: Mode,
    progress: Progress,
) -> list[NeedleResult]:
    """For each variant the cells of all lengths and depths, in the order of ``needles``.

    In mode ``vllm`` everything before the longest question is one raw chunk, as when a conversation goes
    on: question and answer are read through the cache.
    """
    chunk = fitting_chunk(chunk, vocabulary_size(model))
    tail = max(needle.tail for needle in needles) if mode == "vllm" else 0

    def answers(make: MakeCache) -> dict[tuple[int, float], list[tuple[float, bool]]]:
        found: dict[tuple[int, float], list[tuple[float, bool]]] = {}
        for batch in _batches(needles, chunk):
            for needle, answer in zip(batch, _answers(model, batch, make(), chunk, tail), strict=True):
                found.setdefault((len(needle.ids_T), needle.depth), []).append(answer)
            progress.advance(len(batch) * len(batch[0].ids_T))
        return found

    usual_answers = answers(usual)
    results = []
    for variant in variants:
        of_variant = answers(variant.make)
        results.append(
            NeedleResult(
                tuple(_cell(place, before, of_variant[place]) for place, before in usual_answers.items())
            )
        )
    return results


def _cell(
    place: tuple[int, float], usual: Sequence[tuple[float, bool]], other: Sequence[tuple[float, bool]]
) -> NeedleCell:
    return NeedleCell(
        tokens=place[0],
        depth=place[1],
        trials=len(usual),
        found_16bit=sum(found for _, found in usual),
        found=sum(found for _, found in other),
        logprob_16bit=sum(logprob for logprob, _ in usual) / len(usual),
        logprob=sum(logprob for logprob, _ in other) / len(other),
    )


def _batches(needles: Sequence[Needle], chunk: int) -> list[list[Needle]]:
    """Neighbours of the same length."""
    made: list[list[Needle]] = []
    for needle in needles:
        length = len(needle.ids_T)
        if not made or len(made[-1][0].ids_T) != length or len(made[-1]) == texts_at_once(length, chunk):
            made.append([])
        made[-1].append(needle)
    return made


def _answers(
    model: PreTrainedModel, batch: Sequence[Needle], cache: object, chunk: int, tail: int
) -> list[tuple[float, bool]]:
    """Log-probability of each answer, and whether its tokens rank first; ``tail`` tokens follow a prefill."""
    import torch

    ids_RT = torch.stack([needle.ids_T for needle in batch])
    length = ids_RT.shape[1]
    prefill = length - tail if tail else 0
    logprobs, found = [0.0] * len(batch), [True] * len(batch)
    wanted = length - 1 - max(needle.answer for needle in batch)
    for start, logits_RPV in feed(model, ids_RT, cache, chunk, prefill=prefill, wanted=wanted):
        for row, needle in enumerate(batch):
            # Positions before those of the answer's tokens, as far as this chunk has them.
            begin = max(start, length - needle.answer - 1)
            end = min(start + logits_RPV.shape[1], length - 1)
            if begin >= end:
                continue
            logits_PV = logits_RPV[row, begin - start : end - start].log_softmax(-1)
            target_P = needle.ids_T[begin + 1 : end + 1].to(logits_PV.device)
            logprobs[row] += float(logits_PV.gather(1, target_P[:, None]).double().sum())
            found[row] &= bool((logits_PV.argmax(-1) == target_P).all())
    return list(zip(logprobs, found, strict=True))
