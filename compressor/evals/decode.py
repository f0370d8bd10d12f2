"""Decoding with transformers: plain, or with tokens that a drafter proposes and the target verifies.

Legend: B sequences, T tokens of a prompt, K proposed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from compressor.device import synchronize
from compressor.errors import CheckpointError, UserError
from compressor.evals.decode_record import Acceptance
from compressor.evals.decode_verify import pick, verify
from compressor.model.reach import reach

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compressor.drafts.base import Drafter
    from compressor.model.reader import Reader, Reading


@dataclass(frozen=True)
class DecodeResult:
    """Continuations of prompts.

    Attributes:
        ids: of each prompt, up to and with its first stop token.
        acceptance: of each prompt; without proposals where there was no drafter.
        wall_s: of all, prompts included.
        passes: of the target, without those of the prompts.
    """

    ids: tuple[tuple[int, ...], ...]
    acceptance: tuple[Acceptance, ...]
    wall_s: float
    passes: int

    @property
    def tokens(self) -> int:
        """New tokens of all prompts."""
        return sum(map(len, self.ids))


def decode(
    target: PreTrainedModel,
    drafter: Drafter | None,
    prompts: Sequence[torch.Tensor],
    new_tokens: int,
    *,
    tokens: int = 3,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 1,
    stop: frozenset[int] = frozenset(),
) -> DecodeResult:
    """Continues each prompt by up to ``new_tokens`` tokens.

    Args:
        target: in evaluation mode, on its device, in the dtype to compute in.
        drafter: proposes tokens, or None for plain decoding.
        prompts: ids [T] of each; those of equal length share batches.
        new_tokens: at least 1.
        tokens: K, proposed at a time.
        temperature: 0 for the likeliest token.
        seed: of the draws.
        batch: sequences at once, at most.
        stop: tokens that end a continuation.

    Raises:
        UserError: a prompt and its continuation are longer than the model reads.
        CheckpointError: NaN logits; a cache that cannot forget tokens row by row (``Reader.mark``).
    """
    import torch

    _check_lengths(target, prompts, new_tokens + (tokens if drafter else 0))
    generator = None
    if temperature:
        generator = torch.Generator(target.device).manual_seed(seed)
    made = [_Sequence() for _ in prompts]
    passes = 0
    synchronize(target.device)
    start = perf_counter()
    with torch.inference_mode():
        for numbers in _batches(prompts, batch):
            ids_BT = torch.stack([prompts[number] for number in numbers]).to(target.device)
            loop = _Loop(target, drafter, tokens, temperature, generator)
            passes += loop.run(ids_BT, [made[number] for number in numbers], new_tokens, stop)
    synchronize(target.device)
    wall_s = perf_counter() - start
    return DecodeResult(
        ids=tuple(tuple(sequence.ids) for sequence in made),
        acceptance=tuple(Acceptance.of(sequence.kept, tokens) for sequence in made),
        wall_s=wall_s,
        passes=passes,
    )


class _Sequence:
    """New tokens of a prompt, and how many stayed of each proposal."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.kept: list[int] = []

    def add(self, ids: Sequence[int], new_tokens: int, stop: frozenset[int]) -> bool:
        """Whether the sequence is finished with these."""
        for token in ids:
            self.ids.append(token)
            if token in stop or len(self.ids) == new_tokens:
                return True
        return False


class _Loop:
    """One batch, from its prompts to the end of its last sequence."""

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: Drafter | None,
        tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> None:
        from compressor.model.reader import Reader

        self._drafter, self._tokens = drafter, tokens
        self._temperature, self._generator = temperature, generator
        self._reader: Reader = Reader(target, drafter.layers if drafter else ())

    def run(
        self, ids_BT: torch.Tensor, made: Sequence[_Sequence], new_tokens: int, stop: frozenset[int]
    ) -> int:
        """Fills ``made`` and returns how often the target read after the prompts."""
        found = self._reader.read(ids_BT, last_only=True)
        next_B = self._first(found)
        new = [[token] for token in next_B.tolist()]
        live, passes = list(made), 0
        if self._drafter is not None:
            self._drafter.begin(ids_BT, found.hidden, next_B)
        while True:
            finished = [part.add(ids, new_tokens, stop) for part, ids in zip(live, new, strict=True)]
            if all(finished):
                return passes
            if any(finished):
                live = [part for part, done in zip(live, finished, strict=True) if not done]
                next_B = self._select([row for row, done in enumerate(finished) if not done], next_B)
            passes += 1
            if self._drafter is None:
                next_B = self._plain(next_B)
                new = [[token] for token in next_B.tolist()]
            else:
                next_B, new = self._speculate(self._drafter, next_B, live)

    def _first(self, found: Reading) -> torch.Tensor:
        last_BV = found.logits_BTV[:, -1]
        if not bool(last_BV.isfinite().any(-1).all()) or bool(last_BV.isnan().any()):
            raise CheckpointError(
                "the target's logits are NaN or infinite",
                fix="its weights or scales are broken, or it needs a wider dtype",
            )
        return pick(last_BV, self._temperature, self._generator)

    def _plain(self, next_B: torch.Tensor) -> torch.Tensor:
        found = self._reader.read(next_B[:, None])
        return pick(found.logits_BTV[:, -1], self._temperature, self._generator)

    def _speculate(
        self, drafter: Drafter, next_B: torch.Tensor, live: Sequence[_Sequence]
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """The target's own next tokens, and all new ones of each sequence."""
        import torch

        proposal = drafter.propose(self._tokens, self._generator, self._temperature)
        self._reader.mark()
        found = self._reader.read(torch.cat([next_B[:, None], proposal.ids_BK], dim=1))
        kept_B, next_B = verify(found.logits_BTV, proposal, self._temperature, self._generator)
        self._reader.unread(self._tokens - kept_B.cpu())
        drafter.keep(found.hidden, kept_B, next_B)
        new = []
        rows = zip(live, proposal.ids_BK.tolist(), kept_B.tolist(), next_B.tolist(), strict=True)
        for part, proposed, kept, own in rows:
            part.kept.append(kept)
            new.append([*proposed[:kept], own])
        return next_B, new

    def _select(self, rows: list[int], next_B: torch.Tensor) -> torch.Tensor:
        import torch

        rows_R = torch.tensor(rows, device=next_B.device)
        self._reader.select(rows_R)
        if self._drafter is not None:
            self._drafter.select(rows_R)
        return next_B[rows_R]


def _batches(prompts: Sequence[torch.Tensor], batch: int) -> Iterator[list[int]]:
    """Numbers of prompts of equal length, ``batch`` at a time, in their order."""
    by_length: dict[int, list[int]] = {}
    for number, ids_T in enumerate(prompts):
        by_length.setdefault(len(ids_T), []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), batch):
            yield numbers[start : start + batch]


def _check_lengths(target: PreTrainedModel, prompts: Sequence[torch.Tensor], more: int) -> None:
    longest = reach(target.config.get_text_config().to_dict())
    length = max(map(len, prompts)) + more
    if longest is not None and length > longest:
        raise UserError(
            f"a prompt and its continuation are {length} tokens, and the model reads {longest}",
            fix="ask for shorter prompts or fewer new tokens",
        )
