"""Windows of a text, scored by two models or by one model in two ways, and the figures over all of them.

Legend: T tokens of the text or of a window, P scored positions of a window, V vocabulary, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, isfinite
from typing import TYPE_CHECKING

from compressor.errors import CheckpointError
from compressor.evals.base import TextResult

if TYPE_CHECKING:
    import torch

BOOTSTRAP_RESAMPLES = 2000


@dataclass
class Window:
    """Sums and values of one window: negative log-likelihoods in nats, KL [P] and agreeing positions."""

    scored: int = 0
    nll_source: float = 0.0
    nll_result: float = 0.0
    agree: int = 0
    kl_P: list[torch.Tensor] = field(default_factory=list)

    def add(self, source_PV: torch.Tensor, result_PV: torch.Tensor, target_P: torch.Tensor) -> None:
        """Counts P positions: log-probabilities of both and the ids that came; overwrites ``result_PV``."""
        target_P1 = target_P.to(source_PV.device)[:, None]
        self.scored += len(target_P)
        self.nll_source -= float(source_PV.gather(1, target_P1).double().sum())
        self.nll_result -= float(result_PV.gather(1, target_P1).double().sum())
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


def summary(windows: Sequence[Window], *, tokens: int, context: int, seed: int) -> TextResult:
    """The figures over all windows; ``tokens`` were read in windows of ``context``."""
    import torch

    scored = sum(window.scored for window in windows)
    nll_source, nll_result = (
        sum(getattr(window, f"nll_{whose}") for window in windows) for whose in ("source", "result")
    )
    kl_P = torch.cat([part_P for window in windows for part_P in window.kl_P]).double().sort().values
    # The smallest value that 99.9% of the positions do not exceed.
    rank = -(-999 * scored // 1000) - 1
    return TextResult(
        perplexity_source=exp(nll_source / scored),
        perplexity_result=exp(nll_result / scored),
        increase=exp((nll_result - nll_source) / scored) - 1,
        increase_ci95=_bootstrap(windows, seed),
        kl_mean=float(kl_P.mean()),
        kl_p999=float(kl_P[rank]),
        top1_agreement=sum(window.agree for window in windows) / scored,
        tokens=tokens,
        scored_tokens=scored,
        context=context,
        windows=len(windows),
    )


def _bootstrap(windows: Sequence[Window], seed: int) -> tuple[float, float] | None:
    """95% percentile interval of the relative perplexity increase, windows resampled in pairs.

    Tokens of one window depend on each other, windows hardly: so windows are drawn, not tokens (Efron and
    Tibshirani 1993, chapter 13; moving blocks without overlap).
    """
    import torch

    if len(windows) < 2:
        return None
    extra_W = torch.tensor([w.nll_result - w.nll_source for w in windows], dtype=torch.float64)
    scored_W = torch.tensor([w.scored for w in windows], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    increases = torch.empty(BOOTSTRAP_RESAMPLES, dtype=torch.float64)
    for resample in range(BOOTSTRAP_RESAMPLES):
        drawn_W = torch.randint(len(windows), (len(windows),), generator=generator)
        increases[resample] = torch.expm1(extra_W[drawn_W].sum() / scored_W[drawn_W].sum())
    low, high = increases.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
