"""How factors are searched, as stages are told it. Importing this does not import torch: for plans."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# What candidates are compared by.
Objective = Literal["perplexity", "needle"]

POPULATION, GENERATIONS = 16, 8
SEARCH_DOCUMENTS, ACCEPT_DOCUMENTS = 2, 4
NEEDLES, MOST_NEEDLES = 4, 8
# Of a document, to see what factors cost within the original length: little time beside the whole.
STRETCHES = 4
# 0.2% of perplexity.
SHORT_SLACK = 0.002


@dataclass(frozen=True)
class SearchSpec:
    """The search for a model's own factors.

    Attributes:
        documents: file of long documents, one a JSON line or plain text.
        documents_sha256: of its text.
        held_out: file of those that the choice is accepted on, or None for others of ``documents``.
        held_out_sha256: of its text.
        objective: ``perplexity``: the mean negative log-likelihood of all tokens past the original length;
            ``needle``: that of numbers hidden in the documents and asked for at their end.
        population: half of it are parents, half are new in each generation.
        generations: after the seeds.
        search_documents: documents that candidates are scored on.
        accept_documents: others, that the choice is compared with YaRN on.
        tokens: of each document, or None for the target length.
        needles: hidden in a document, evenly over its depth, for ``needle``.
        short_slack: nats a token by which the choice may be worse than YaRN within the original length and
            still counts as equal.
        seed: decides which documents, and every child.
    """

    documents: Path
    documents_sha256: str
    held_out: Path | None = None
    held_out_sha256: str | None = None
    objective: Objective = "perplexity"
    population: int = POPULATION
    generations: int = GENERATIONS
    search_documents: int = SEARCH_DOCUMENTS
    accept_documents: int = ACCEPT_DOCUMENTS
    tokens: int | None = None
    needles: int = NEEDLES
    short_slack: float = SHORT_SLACK
    seed: int = 0

    @property
    def children(self) -> int:
        """New candidates of a generation; as many as there are parents."""
        return max(1, self.population // 2)

    @property
    def content(self) -> dict[str, Any]:
        """JSON-able: what the result depends on, wherever the files lie."""
        told = asdict(self)
        return {key: value for key, value in told.items() if key not in ("documents", "held_out")}
