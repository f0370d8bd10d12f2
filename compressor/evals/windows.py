"""Windows of a text, scored by two models or by one model in two ways, and the figures over all of them.

Legend: T tokens of the text or of a window, P scored positions of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from compressor.errors import CheckpointError
from compressor.evals.base import TextResult
from compressor.evals.units import CONFIDENCE, Passage, Unit, units_of
from compressor.numerics.paired import exponential, relative_change

if TYPE_CHECKING:
    import torch


@dataclass
class Window:
    """Sums and values of one window: negative log-likelihoods [P] in nats, KL [P] and agreeing positions."""

    scored: int = 0
    nll_source: float = 0.0
    nll_result: float = 0.0
    agree: int = 0
    kl_P: list[torch.Tensor] = field(default_factory=list)
    nll_P: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, source_PV: torch.Tensor, result_PV: torch.Tensor, target_P: torch.Tensor) -> None:
        """Counts P positions: log-probabilities of both and the ids that came; overwrites ``result_PV``."""
        target_P1 = target_P.to(source_PV.device)[:, None]
        self.scored += len(target_P)
        source_P, result_P = (part_PV.gather(1, target_P1)[:, 0] for part_PV in (source_PV, result_PV))
        self.nll_source -= float(source_P.double().sum())
        self.nll_result -= float(result_P.double().sum())
        self.nll_P.append((-source_P.cpu(), -result_P.cpu()))
        self.agree += int((source_PV.argmax(-1) == result_PV.argmax(-1)).sum())
        self.kl_P.append(_kl(source_PV, result_PV).cpu())


def split_windows(ids_T: torch.Tensor, context: int, first: int | None) -> list[torch.Tensor]:
    """Non-overlapping windows of ``context`` tokens, the last one shorter, each after the token ``first``.

    What is too short to score anything is left out.
    """
    import torch

    ahead_T = ids_T.new_tensor([] if first is None else [first])
    parts = torch.split(ids_T, context - len(ahead_T))
    return [torch.cat([ahead_T, part_T]) for part_T in parts if len(ahead_T) + len(part_T) > 1]


def _kl(source_PV: torch.Tensor, result_PV: torch.Tensor) -> torch.Tensor:
    """KL(source || result) [P] of log-probabilities; overwrites ``result_PV``."""
    import torch

    difference_PV = torch.sub(source_PV, result_PV, out=result_PV)
    # Never negative but for rounding.
    return (source_PV.exp() * difference_PV).sum(-1).clamp_min(0)


def check_finite(window: Window, number: int) -> None:
    """Refuses a window with NaN or infinite logits.

    Raises:
        CheckpointError: naming which of the two and the window, ``number`` + 1.
    """
    for whose, nll in (("source", window.nll_source), ("result", window.nll_result)):
        if not isfinite(nll):
            raise CheckpointError(
                f"the {whose}'s logits are NaN or infinite in window {number + 1} of the text",
                fix="its weights or scales are broken, or it needs a wider dtype",
            )


def summary(
    windows: Sequence[Window],
    *,
    tokens: int,
    context: int,
    seed: int,
    passage: Passage | None = None,
    first: bool = False,
) -> TextResult:
    """The figures over all windows; ``tokens`` were read in windows of ``context``.

    ``passage``: where the tokens come from; ``first``: whether each window began with a token of none.
    """
    import torch

    scored = sum(window.scored for window in windows)
    nll_source, nll_result = (
        sum(getattr(window, f"nll_{whose}") for window in windows) for whose in ("source", "result")
    )
    kl_P = torch.cat([part_P for window in windows for part_P in window.kl_P])
    nll_P = [torch.cat(parts) for parts in zip(*(p for w in windows for p in w.nll_P), strict=True)]
    units = units_of(
        [
            Unit(w.scored, w.nll_source, w.nll_result, float(torch.cat(w.kl_P).double().sum()))
            for w in windows
        ],
        (nll_P[0], nll_P[1], kl_P),
        passage,
        _places([window.scored for window in windows], first=first),
    )
    sorted_P = kl_P.double().sort().values
    # The smallest value that 99.9% of the positions do not exceed.
    rank = -(-999 * scored // 1000) - 1
    return TextResult(
        perplexity_source=exponential(nll_source / scored),
        perplexity_result=exponential(nll_result / scored),
        increase=relative_change((nll_result - nll_source) / scored),
        increase_ci95=units.increase_interval(CONFIDENCE, seed),
        kl_mean=float(sorted_P.mean()),
        kl_p999=float(sorted_P[rank]),
        top1_agreement=sum(window.agree for window in windows) / scored,
        tokens=tokens,
        scored_tokens=scored,
        context=context,
        windows=len(windows),
        kl_ci95=units.kl_interval(CONFIDENCE, seed),
        units=units,
        seed=seed,
    )


def _places(scored: Sequence[int], *, first: bool) -> torch.Tensor:
    """Where in the text each scored token stands: of a window all but its first, if that is the text's."""
    import torch

    parts, start = [], 0
    for count in scored:
        begin = start if first else start + 1
        parts.append(torch.arange(begin, begin + count))
        start = begin + count
    return torch.cat(parts)
