"""What a text's figures are drawn from: its documents, or its windows where documents are few.

Legend: T tokens of the text, P scored tokens in their order, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compressor.numerics.paired import exponential, ratio_interval, relative_change

if TYPE_CHECKING:
    import torch

CONFIDENCE = 0.95
# Of fewer documents, an interval says more of the few than of the many that they stand for.
ENOUGH_DOCUMENTS = 8


@dataclass(frozen=True)
class Passage:
    """The beginning of a text.

    Attributes:
        ids_T: its tokens.
        names: of the documents that something was read of.
        domains: of each.
        document_T: number of the document that each token begins in; None where that is not known.
    """

    ids_T: torch.Tensor
    names: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    document_T: torch.Tensor | None = None


@dataclass(frozen=True)
class Unit:
    """Source and result on one document or window: sums over its scored tokens, in nats.

    Attributes:
        scored: tokens.
        nll_source: negative log-likelihood by the source.
        nll_result: the same by the result.
        kl: KL(source || result).
        name: of a document.
        domain: of a document.
    """

    scored: int
    nll_source: float
    nll_result: float
    kl: float
    name: str = ""
    domain: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-able: means, nats a token."""
        return {
            "name": self.name,
            "domain": self.domain,
            "scored_tokens": self.scored,
            "nll_source": self.nll_source / self.scored,
            "nll_result": self.nll_result / self.scored,
            "kl_mean": self.kl / self.scored,
        }


@dataclass(frozen=True)
class Units:
    """A text's figures unit by unit.

    Attributes:
        kind: what the units of the intervals are.
        units: these.
        documents: all documents, be they the units or too few; empty where they are not known.
    """

    kind: Literal["documents", "windows"]
    units: tuple[Unit, ...]
    documents: tuple[Unit, ...]

    def increase_interval(self, confidence: float, seed: int) -> tuple[float, float] | None:
        """Of the relative increase of the perplexity; None where units are too few."""
        return increase_interval(self.units, confidence, seed)

    def kl_interval(self, confidence: float, seed: int) -> tuple[float, float] | None:
        """Of the mean divergence, nats a token, which is never negative."""
        found = ratio_interval(
            [unit.kl for unit in self.units], [unit.scored for unit in self.units], confidence, seed
        )
        return found and (max(0.0, found[0]), found[1])

    def domains(self, seed: int) -> list[dict[str, Any]]:
        """JSON-able: figures by domain, in order of appearance."""
        by_domain: dict[str, list[Unit]] = {}
        for unit in self.documents:
            by_domain.setdefault(unit.domain, []).append(unit)
        return [_domain(name, units, seed) for name, units in by_domain.items()]


def increase_interval(units: Sequence[Unit], confidence: float, seed: int) -> tuple[float, float] | None:
    """Of the relative increase of the perplexity over some units."""
    more = [unit.nll_result - unit.nll_source for unit in units]
    found = ratio_interval(more, [unit.scored for unit in units], confidence, seed)
    return found and (relative_change(found[0]), relative_change(found[1]))


def units_of(
    windows: Sequence[Unit],
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    passage: Passage | None,
    places_P: torch.Tensor,
) -> Units:
    """Groups what was scored.

    Args:
        windows: one unit for each window.
        scored: negative log-likelihoods [P] by source and by result, and KL [P].
        passage: where the tokens come from, or None where nothing is known of that.
        places_P: of the tokens in the passage.
    """
    documents: tuple[Unit, ...] = ()
    if passage is not None and passage.document_T is not None:
        documents = tuple(_documents(scored, passage, passage.document_T[places_P]))
    if len(documents) >= ENOUGH_DOCUMENTS:
        return Units("documents", documents, documents)
    return Units("windows", tuple(windows), documents)


def _documents(
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor], passage: Passage, document_P: torch.Tensor
) -> list[Unit]:
    """A unit for each document that any token was scored of."""
    import torch

    count = len(passage.names)
    sums = [
        torch.zeros(count, dtype=torch.float64).index_add(0, document_P, part_P.double()) for part_P in scored
    ]
    tokens = torch.bincount(document_P, minlength=count)
    figures = zip(tokens.tolist(), *(part.tolist() for part in sums), strict=True)
    named = zip(passage.names, passage.domains, figures, strict=True)
    return [
        Unit(number, source, result, kl, name, domain)
        for name, domain, (number, source, result, kl) in named
        if number
    ]


def _domain(name: str, units: Sequence[Unit], seed: int) -> dict[str, Any]:
    scored = sum(unit.scored for unit in units)
    source, result = (sum(getattr(unit, f"nll_{whose}") for unit in units) for whose in ("source", "result"))
    return {
        "name": name,
        "documents": len(units),
        "scored_tokens": scored,
        "perplexity_source": exponential(source / scored),
        "perplexity_result": exponential(result / scored),
        "increase": relative_change((result - source) / scored),
        "increase_ci95": increase_interval(units, CONFIDENCE, seed)
        if len(units) >= ENOUGH_DOCUMENTS
        else None,
        "kl_mean": sum(unit.kl for unit in units) / scored,
    }
