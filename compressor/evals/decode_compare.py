"""Drafters against plain decoding: what stays of their proposals, whether the text is the same, what time.

Legend: T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from compressor.device import device_name
from compressor.errors import CheckpointError
from compressor.evals.decode import DecodeResult, decode
from compressor.evals.decode_record import (
    Acceptance,
    DecodingResult,
    Divergence,
    DomainFigures,
    DraftFigures,
)
from compressor.evals.decode_texts import prompts_of
from compressor.evals.run import leading_token
from compressor.model.reader import check_unreading

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.drafts.base import Drafter
    from compressor.evals.decode_spec import DecodeSpec
    from compressor.progress import Progress


def compare_decoding(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafters: Mapping[str, Drafter],
    spec: DecodeSpec,
    progress: Progress,
    *,
    rounded: bool = False,
) -> DecodingResult:
    """Each drafter by domain and batch size; greedy continuations against plain decoding's, token by token.

    Prompts whose continuation by the target alone runs in circles are left out: any drafter foretells those.
    Each is decoded once for the figures and to warm up, then ``spec.runs`` times against the clock.

    Args:
        target: in evaluation mode, on its device, in the dtype to compute in.
        tokenizer: of the target.
        drafters: by name; controls too.
        spec: how to measure.
        progress: told the decoded continuations.
        rounded: whether the target rounds inputs, see ``DecodingResult``.

    Raises:
        UserError: an unusable text, or more tokens than the model reads.
        CheckpointError: the target's cache cannot forget tokens at a batch size, or NaN logits.
    """
    for batch in spec.batches:
        check_unreading(target, batch)
    first = leading_token(tokenizer)
    texts = {
        domain: prompts_of(tokenizer, path, spec.prompts, spec.prompt_tokens, first=first)
        for domain, path in spec.domains.items()
    }
    total = spec.prompts * len(texts) * len(spec.batches) * (1 + spec.runs) * (1 + len(drafters))
    progress.start("decoding", total, "items")
    measure = _Measure(target, drafters, spec, progress)
    domains = [
        measure.domain(domain, prompts, batch) for batch in spec.batches for domain, prompts in texts.items()
    ]
    progress.finish()
    return DecodingResult(
        tokens=spec.tokens,
        new_tokens=spec.new_tokens,
        temperature=spec.temperature,
        runs=spec.runs,
        dtype=str(target.dtype).removeprefix("torch."),
        device=device_name(),
        rounded=rounded,
        domains=tuple(domains),
    )


def check_lossless(result: DecodingResult) -> None:
    """Refuses a greedy result in float32 that is not plain decoding's, token by token.

    In 16 bit a pass over several tokens rounds otherwise than one over a single token, so that near ties may
    fall either way, and inputs rounded to few bits make such differences in any dtype: those are reported
    (``Divergence``), not refused.

    Raises:
        CheckpointError: naming the first that differs.
    """
    if result.dtype != "float32" or result.rounded or result.temperature:
        return
    for domain in result.domains:
        for figures in domain.drafts:
            for found in figures.divergences or ():
                raise CheckpointError(
                    f"decoding with {figures.name} differs from plain decoding in float32: {domain.domain}, "
                    f"prompt {found.prompt + 1}, new token {found.at + 1}, logits {found.gap:.3g} apart"
                )


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, as the model's generation config says."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list | tuple) else [found])


def loops(ids: Sequence[int]) -> bool:
    """Whether a continuation ends in a circle, see ``numerics.loops.looping``."""
    import torch

    from compressor.numerics.loops import looping

    return bool(looping(torch.tensor([list(ids)]))[0])


class _Measure:
    """What is the same for all domains."""

    def __init__(
        self,
        target: PreTrainedModel,
        drafters: Mapping[str, Drafter],
        spec: DecodeSpec,
        progress: Progress,
    ) -> None:
        self._target, self._drafters, self._spec, self._progress = target, drafters, spec, progress
        self._stop = end_tokens(target) if spec.stop else frozenset()

    def domain(self, domain: str, prompts: Sequence[torch.Tensor], batch: int) -> DomainFigures:
        """Plain decoding, then each drafter; then all of them by turns, against the clock."""
        usual = self._decode(None, prompts, batch)
        used = [number for number, ids in enumerate(usual.ids) if not loops(ids)]
        looping = len(prompts) - len(used)
        if not used:
            self._progress.warn(f"decoding: every continuation of {domain} loops: nothing is measured on it")
            return DomainFigures(domain, batch, 0, looping, 0.0, ())
        kept = [prompts[number] for number in used]
        found = {name: self._decode(drafter, kept, batch) for name, drafter in self._drafters.items()}
        plain_s: list[float] = []
        draft_s: dict[str, list[float]] = {name: [] for name in found}
        speedups: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(self._spec.runs):
            plain = self._decode(None, kept, batch)
            plain_s.append(plain.wall_s)
            for name, drafter in self._drafters.items():
                run = self._decode(drafter, kept, batch)
                draft_s[name].append(run.wall_s)
                speedups[name].append(plain.wall_s / plain.tokens * run.tokens / run.wall_s)
        figures = []
        for name, result in found.items():
            counted = [
                part for part, ids in zip(result.acceptance, result.ids, strict=True) if not loops(ids)
            ]
            figures.append(
                DraftFigures(
                    name=name,
                    acceptance=Acceptance.sum(counted, self._spec.tokens),
                    looping=len(used) - len(counted),
                    divergences=self._divergences(used, prompts, usual, result),
                    wall_s=median(draft_s[name]),
                    speedup=median(speedups[name]),
                    tokens=result.tokens,
                    passes=result.passes,
                    prompts=tuple(
                        (sum(part.accepted_at), part.drafts * self._spec.tokens) for part in counted
                    ),
                )
            )
        return DomainFigures(domain, batch, len(used), looping, median(plain_s), tuple(figures))

    def _decode(self, drafter: Drafter | None, prompts: Sequence[torch.Tensor], batch: int) -> DecodeResult:
        spec = self._spec
        result = decode(
            self._target,
            drafter,
            prompts,
            spec.new_tokens,
            tokens=spec.tokens,
            temperature=spec.temperature,
            seed=spec.seed,
            batch=batch,
            stop=self._stop,
        )
        self._progress.advance(len(prompts))
        return result

    def _divergences(
        self,
        used: Sequence[int],
        prompts: Sequence[torch.Tensor],
        usual: DecodeResult,
        result: DecodeResult,
    ) -> tuple[Divergence, ...] | None:
        """Of the prompts numbered ``used``, which ``result`` has in this order."""
        if self._spec.temperature:
            return None
        return tuple(
            divergence(self._target, prompts[number], usual.ids[number], ids, number)
            for number, ids in zip(used, result.ids, strict=True)
            if ids != usual.ids[number]
        )


def divergence(
    target: PreTrainedModel, prompt_T: torch.Tensor, usual: Sequence[int], other: Sequence[int], number: int
) -> Divergence:
    """Where two greedy continuations of one prompt part, and how far apart the target's logits are there."""
    import torch

    at = next(place for place, (one, two) in enumerate(zip(usual, other, strict=False)) if one != two)
    whole_1T = torch.cat([prompt_T, torch.tensor(usual[:at], dtype=torch.long)])[None].to(target.device)
    with torch.inference_mode():
        logits_V = target(whole_1T, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return Divergence(prompt=number, at=at, gap=float(logits_V[usual[at]] - logits_V[other[at]]))
