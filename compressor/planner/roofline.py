"""Seconds of a step and of a prompt: what memory and arithmetic allow at most. Pure arithmetic.

A step is as long as the longer of two times: all bytes that it moves over the bandwidth of all GPUs, and all
its operations over their arithmetic (Williams, Waterman and Patterson, "Roofline", CACM 2009). Links between
GPUs, launches of kernels and scheduling take none of it; ``fixed_s`` is for who has measured them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compressor.planner.weight_load import WeightLoad
from compressor.recipe.gpus import Gpu
from compressor.schemes.base import Arithmetic


@dataclass(frozen=True)
class Proposals:
    """What proposes tokens ahead of the model.

    Attributes:
        tokens: proposed at a time, one after another.
        passed: tokens that one pass of the model gives with them, its own included.
        weights: that each of them is proposed with.
    """

    tokens: int
    passed: float
    weights: WeightLoad


@dataclass(frozen=True)
class Load:
    """One model at one length of context.

    Attributes:
        weights: of it.
        cache_bytes: that a step reads of one user's cache, and writes of states.
        attention_flops: for one token.
        prompt_flops: attention over a prompt of that length.
        proposals: or None.
    """

    weights: WeightLoad
    cache_bytes: float
    attention_flops: float
    prompt_flops: float
    proposals: Proposals | None = None

    @property
    def passed(self) -> float:
        """Tokens for each user that a pass gives."""
        return 1.0 if self.proposals is None else self.proposals.passed

    @property
    def proposed(self) -> int:
        """Tokens for each user that a pass reads: the last one, and the proposed."""
        return 1 + (0 if self.proposals is None else self.proposals.tokens)

    def moved(self, users: int) -> float:
        """Bytes that a pass and what proposes for it move, for all users."""
        moved = self.weights.read(users * self.proposed) + users * self.cache_bytes
        if self.proposals is not None:
            moved += self.proposals.tokens * self.proposals.weights.read(users)
        return moved

    def flops(self, users: int) -> dict[Arithmetic, float]:
        """Operations of the same by arithmetic: two for each weight and token; attention in bf16."""
        tokens = users * self.proposed
        found: dict[Arithmetic, float] = {"bf16": tokens * self.attention_flops}
        for products in (self.weights.products, self.weights.head):
            for arithmetic, count in products.items():
                found[arithmetic] = found.get(arithmetic, 0.0) + 2 * count * tokens
        if self.proposals is not None:
            found["bf16"] += 2 * self.proposals.weights.active * users * self.proposals.tokens
        return found

    def token_bytes(self, users: int) -> float:
        """Bytes moved for each token that is written."""
        return self.moved(users) / (users * self.passed)

    def token_flops(self) -> float:
        """Operations for each token that is written."""
        return sum(self.flops(1).values()) / self.passed


def step_seconds(load: Load, users: int, gpu: Gpu, gpus: int, *, fixed_s: float = 0.0) -> float:
    """Seconds of one pass over all users, with what proposes for it."""
    return max(load.moved(users) / (gpus * gpu.bandwidth), _computed(load.flops(users), gpu, gpus)) + fixed_s


def tokens_per_second(load: Load, users: int, gpu: Gpu, gpus: int, *, fixed_s: float = 0.0) -> float:
    """Tokens a second that each user is written."""
    return load.passed / step_seconds(load, users, gpu, gpus, fixed_s=fixed_s)


def prompt_seconds(load: Load, tokens: int, gpu: Gpu, gpus: int) -> float:
    """Seconds to read one prompt and give its first token; the head multiplies the last token only."""
    weights = load.weights
    flops: dict[Arithmetic, float] = {"bf16": load.prompt_flops}
    for products, count in ((weights.products, tokens), (weights.head, 1)):
        for arithmetic, parameters in products.items():
            flops[arithmetic] = flops.get(arithmetic, 0.0) + 2 * parameters * count
    return max(weights.read(tokens) / (gpus * gpu.bandwidth), _computed(flops, gpu, gpus))


def _computed(flops: Mapping[Arithmetic, float], gpu: Gpu, gpus: int) -> float:
    return sum(count / (gpus * gpu.rate(arithmetic)) for arithmetic, count in flops.items())
