"""Which tokens a block's experts are sent, and what the starved among them are topped up with.

An expert's inputs are known as well as its rows are many: moments of an eighth as many rows as columns
already leave its solver little but damping (``solvers/rounding.py``). An expert with fewer is starved.
It is topped up to so many rows with tokens that the router sent elsewhere: those that it scored highest for
this expert, which other text would have it sent first. Only these pass the expert besides its own.

Legend: N tokens of a batch, R rows offered or kept, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from compressor.stages.receipts import Coverage

if TYPE_CHECKING:
    import torch

    from compressor.model.blocks import Site
    from compressor.model.routed import Share

# Columns for each row that an expert is to have. On two small models trained on text, KL got worse with 4 and
# fewer: rows that the router sent elsewhere crowd out its own.
COLUMNS_PER_ROW = 8
_GOLDEN = (sqrt(5.0) - 1.0) / 2.0


def enough_rows(in_features: int) -> int:
    """Rows that an expert with inputs so wide is to have at least."""
    return max(1, in_features // COLUMNS_PER_ROW)


@dataclass
class _Expert:
    """One expert.

    Attributes:
        enough: rows that it is to have.
        tokens: that it was sent; None until they were counted, which no pass need have done.
        settled: whether its own tokens are enough, or others were looked for.
        spare_RH: what it was not sent, but is solved on as well, if anything.
        scored: whether what it was not sent was chosen by the router's scores.
    """

    enough: int
    tokens: int | None = None
    settled: bool = False
    spare_RH: torch.Tensor | None = None
    scored: bool = True

    @property
    def topped_up(self) -> int:
        return 0 if self.spare_RH is None else len(self.spare_RH)


class Experts:
    """The experts of one block that need data.

    Args:
        sites: of the block, in order.
        needing: the experts among them that have something to be quantized with data.
    """

    def __init__(self, sites: Iterable[Site], needing: Set[str]) -> None:
        self._experts = {
            site.expert: _Expert(enough_rows(site.in_features))
            for site in sites
            if site.is_entrance and site.expert in needing
        }

    def passing(self, sites: Sequence[Site]) -> TopUp:
        """For one pass of all batches: counts, and finds what to top up the experts of ``sites`` with."""
        names = {site.expert for site in sites if site.routed} & self._experts.keys()
        return TopUp(self._experts, {name for name in names if not self._experts[name].settled})

    def topped_up(self, site: Site) -> int:
        """Rows of a site's moments that are of tokens sent elsewhere."""
        expert = self._experts.get(site.expert) if site.routed else None
        return 0 if expert is None else expert.topped_up

    def coverage(self, has_shared_range: Callable[[str], bool]) -> list[Coverage]:
        """By module of experts; asks of each, by its path, whether they have a range of inputs in common."""
        modules: dict[str, list[tuple[_Expert, int]]] = {}
        for name, expert in self._experts.items():
            if expert.tokens is not None:
                modules.setdefault(name.rpartition(".")[0], []).append((expert, expert.tokens))
        return [
            Coverage(
                name=name,
                enough=counted[0][0].enough,
                tokens=tuple(tokens for _, tokens in counted),
                topped_up=tuple(expert.topped_up for expert, _ in counted),
                scored=all(expert.scored for expert, _ in counted),
                shared_range=has_shared_range(name),
            )
            for name, counted in modules.items()
        ]


class TopUp:
    """One pass of all batches through a block, or through its beginning.

    Args:
        experts: of the block by name.
        wanted: those to find rows for.
    """

    def __init__(self, experts: dict[str, _Expert], wanted: set[str]) -> None:
        self._experts = experts
        self._counts: dict[str, int] = {}
        self._wanted = wanted
        self._best = {name: _Best(experts[name].enough) for name in wanted}
        self._inner: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def hear(self, site: Site, share: Share) -> None:
        """Told of every routed site of every batch, in order."""
        name = site.expert
        if name not in self._experts:
            return
        if not site.is_entrance:
            self._inner[site.name] = share.inner
            return
        count = self._counts[name] = self._counts.get(name, 0) + len(share.tokens_M)
        if name not in self._best:
            return
        if count < self._experts[name].enough:
            self._best[name].add(share)
        else:
            del self._best[name]

    def finish(self) -> None:
        """After the last batch."""
        for name, count in self._counts.items():
            expert, best = self._experts[name], self._best.get(name)
            expert.tokens = count
            expert.settled |= name in self._wanted
            if best is not None:
                expert.spare_RH, expert.scored = best.first(expert.enough - count), best.scored

    def rows(self, site: Site) -> torch.Tensor | None:
        """What a site hears of the tokens that its expert is topped up with; None where it is not."""
        expert = self._experts.get(site.expert)
        spare_RH = None if expert is None else expert.spare_RH
        if spare_RH is None:
            return None
        return spare_RH if site.is_entrance else self._inner[site.name](spare_RH)


@dataclass
class _Best:
    """The rows with the highest scores so far, of equal ones the first: the same however tokens are batched.

    Where no scores are heard, tokens are taken evenly from all.
    """

    most: int
    seen: int = 0
    scored: bool = True
    score_R: torch.Tensor | None = None
    x_RH: torch.Tensor | None = None

    def first(self, rows: int) -> torch.Tensor | None:
        """So many of the best, or as many as there are; None where there are none."""
        return None if self.x_RH is None or len(self.x_RH) == 0 else self.x_RH[:rows].clone()

    def add(self, share: Share) -> None:
        """Looks at the tokens of a batch that went elsewhere."""
        import torch

        first, self.seen = self.seen, self.seen + share.batch_tokens
        if share.offered is None:
            self.scored = False
            return
        device = share.tokens_M.device
        free_N = torch.ones(share.batch_tokens, dtype=torch.bool, device=device)
        free_N[share.tokens_M] = False
        if share.score_N is None:
            self.scored = False
            # The fractional parts of multiples of the golden ratio: any first few are spread evenly.
            place_N = torch.arange(first, self.seen, dtype=torch.float64, device=device)
            score_N = (place_N * _GOLDEN).frac()
        else:
            score_N = share.score_N.double()
        free_R = (free_N & score_N.isfinite()).nonzero().flatten()
        order_R = score_N[free_R].sort(descending=True, stable=True).indices[: self.most]
        found_R = free_R[order_R]
        x_RH, score_R = share.offered(found_R), score_N[found_R]
        if self.x_RH is not None and self.score_R is not None:
            x_RH, score_R = torch.cat([self.x_RH, x_RH]), torch.cat([self.score_R, score_R])
        kept_R = score_R.sort(descending=True, stable=True).indices[: self.most]
        self.x_RH, self.score_R = x_RH[kept_R], score_R[kept_R]
