"""What decoding with proposed tokens gives, as plain records; ``to_json`` gives the shape that scripts read.

Legend: K proposed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Acceptance:
    """Proposals and what stayed of them, counted as vLLM does.

    A proposal is counted whole, with what a sequence's end cuts off (vLLM 0.32 v1/spec_decode/metrics.py,
    SpecDecodingStats.observe_draft; v1/core/sched/scheduler.py, update_from_output).

    Attributes:
        drafts: proposals, each of K tokens.
        accepted_at: number i counts the proposals whose tokens up to i, from 0, all stayed.
    """

    drafts: int
    accepted_at: tuple[int, ...]

    @classmethod
    def of(cls, kept: Sequence[int], tokens: int) -> Acceptance:
        """From how many of ``tokens`` tokens stayed of each proposal."""
        return cls(len(kept), tuple(sum(count > place for count in kept) for place in range(tokens)))

    @classmethod
    def sum(cls, parts: Iterable[Acceptance], tokens: int) -> Acceptance:
        """Of several sequences."""
        found = list(parts)
        places = (sum(part.accepted_at[place] for part in found) for place in range(tokens))
        return cls(sum(part.drafts for part in found), tuple(places))

    @property
    def rates(self) -> tuple[float, ...]:
        """Of all proposals, the part whose token here stayed: not only of those that came so far."""
        return tuple(count / self.drafts if self.drafts else 0.0 for count in self.accepted_at)

    @property
    def length(self) -> float:
        """Tokens for each pass of the target: 1 + accepted / drafts."""
        return 1 + sum(self.rates)

    def to_json(self) -> dict[str, Any]:
        """``length``, ``rates`` by position, ``drafts``, ``accepted_at``."""
        return {
            "length": self.length,
            "rates": list(self.rates),
            "drafts": self.drafts,
            "accepted_at": list(self.accepted_at),
        }


@dataclass(frozen=True)
class Divergence:
    """Where greedy decoding with proposals first leaves plain decoding.

    Attributes:
        prompt: number of the prompt within its domain.
        at: number of the new token, from 0.
        gap: the target's logit of plain decoding's token minus that of the other, after the same tokens in
            one pass without a cache: near zero where rounding decided, negative where that pass would have
            decided otherwise.
    """

    prompt: int
    at: int
    gap: float


@dataclass(frozen=True)
class DraftFigures:
    """One drafter on the prompts of one domain at one batch size.

    Attributes:
        name: of the drafter.
        acceptance: over the continuations that do not loop.
        looping: continuations with this drafter that loop and are not counted in ``acceptance``.
        divergences: one for each prompt whose greedy continuation is not plain decoding's; None where
            tokens were sampled.
        wall_s: median over runs, prompts included.
        speedup: median over runs of plain decoding's seconds a token over the drafter's in the run after it.
        tokens: new tokens of one run.
        passes: of the target in one run, without those of the prompts.
        prompts: of each continuation that does not loop, accepted and proposed tokens.
    """

    name: str
    acceptance: Acceptance
    looping: int
    divergences: tuple[Divergence, ...] | None
    wall_s: float
    speedup: float
    tokens: int
    passes: int
    prompts: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-able: the attributes, acceptance's figures among them."""
        found = self.divergences
        return {
            "name": self.name,
            **self.acceptance.to_json(),
            "looping": self.looping,
            "divergences": None if found is None else [dict(vars(one)) for one in found],
            "wall_s": self.wall_s,
            "speedup": self.speedup,
            "tokens": self.tokens,
            "passes": self.passes,
            "prompts": [list(pair) for pair in self.prompts],
        }


@dataclass(frozen=True)
class DomainFigures:
    """Drafters on the prompts of one domain at one batch size.

    Attributes:
        domain: for example ``code``.
        batch: sequences at once.
        prompts: that were measured.
        looping: prompts left out because the target's own continuation loops.
        plain_wall_s: of plain decoding, median over runs, prompts included.
        drafts: in the order asked for; empty where no prompt was left.
    """

    domain: str
    batch: int
    prompts: int
    looping: int
    plain_wall_s: float
    drafts: tuple[DraftFigures, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able, by attribute."""
        return {**vars(self), "drafts": [figures.to_json() for figures in self.drafts]}


@dataclass(frozen=True)
class DecodingResult:
    """Decoding with proposed tokens against plain decoding.

    Attributes:
        tokens: K, proposed at a time.
        new_tokens: that a continuation has at most.
        temperature: 0 where greedy.
        runs: timed, plain decoding and each drafter by turns.
        dtype: that the target computed in.
        device: where, in words.
        rounded: whether the target rounds inputs to few bits, which makes much of a last bit.
        domains: by domain and batch size, in the order asked for.
    """

    tokens: int
    new_tokens: int
    temperature: float
    runs: int
    dtype: str
    device: str
    rounded: bool
    domains: tuple[DomainFigures, ...]

    @property
    def identical(self) -> bool:
        """Whether no greedy continuation differs from plain decoding's; sampled ones are not compared."""
        return not any(figures.divergences for domain in self.domains for figures in domain.drafts)

    def to_json(self) -> dict[str, Any]:
        """JSON-able: how it was measured, ``identical``, and ``domains``."""
        return {
            **{name: value for name, value in vars(self).items() if name != "domains"},
            "identical": self.identical if self.temperature == 0 else None,
            "domains": [domain.to_json() for domain in self.domains],
        }
