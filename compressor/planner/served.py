"""Source and result as they are served: what each holds and reads of a cache, and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from compressor.kv.base import KvFormat
from compressor.kv.formats import FORMATS
from compressor.kv.spec import AUTO
from compressor.planner.attention_work import AttentionLayer, prompt_flops, written_flops
from compressor.planner.context import planned_reach
from compressor.planner.kv_bytes import KvLayer, full_context, kv_layers
from compressor.planner.kv_choice import cache_bytes, format_map
from compressor.planner.predict import GPU_USABLE
from compressor.planner.roofline import Load, Proposals
from compressor.planner.weight_load import WeightLoad, plain_load, prediction_load, result_load
from compressor.recipe.gpus import Gpu

if TYPE_CHECKING:
    from compressor.kv.plan import KvPlan
    from compressor.planner.plan import Plan

# Of a model whose config does not say how far it reads.
_MOST_TOKENS = 2**24
_EAGLE_BYTES = 2  # a head is stored in 16 bit


@dataclass(frozen=True)
class Cache:
    """The cache of one user, by tokens.

    Attributes:
        held: bytes that the engine takes for it, with its pages.
        stored: bytes of what lies in it; a step reads these.
        state_bytes: of ``stored``, what a step writes, too.
    """

    held: Callable[[int], int]
    stored: Callable[[int], int]
    state_bytes: int

    def moved(self, tokens: int) -> int:
        """Bytes that a step moves."""
        return self.stored(tokens) + self.state_bytes


@dataclass(frozen=True)
class Served:
    """A model as it is served.

    Attributes:
        weights: of it.
        cache: of one user.
        attention: its layers.
        reach: tokens that it reads.
        proposals: what proposes tokens for it, or None.
    """

    weights: WeightLoad
    cache: Cache
    attention: Sequence[AttentionLayer]
    reach: int
    proposals: Proposals | None = None

    @property
    def held_bytes(self) -> int:
        """Of all weights, the draft's too."""
        return self.weights.held_bytes + (0 if self.proposals is None else self.proposals.weights.held_bytes)

    def load(self, tokens: int) -> Load:
        """At a length of context."""
        return Load(
            self.weights,
            self.cache.moved(tokens),
            written_flops(self.attention, tokens),
            prompt_flops(self.attention, tokens),
            self.proposals,
        )

    def gpus(self, gpu: Gpu, tokens: int, users: int) -> int:
        """GPUs that hold it and the caches of so many users, both divided evenly: a lower bound."""
        return max(1, ceil((self.held_bytes + users * self.cache.held(tokens)) / usable(gpu, 1)))

    def users(self, gpu: Gpu, gpus: int, tokens: int) -> int:
        """Users whose caches lie beside the weights."""
        return max(0, int((usable(gpu, gpus) - self.held_bytes) // max(1, self.cache.held(tokens))))

    def longest(self, gpu: Gpu, gpus: int, users: int) -> int | None:
        """The most tokens of each user that fit and that it reads; None where the weights do not fit."""
        free = usable(gpu, gpus) - self.held_bytes
        if free < users * self.cache.held(1):
            return None
        low, high = 1, self.reach
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if users * self.cache.held(middle) <= free else (low, middle - 1)
        return low


def usable(gpu: Gpu, gpus: int) -> float:
    """Bytes for weights and caches."""
    return gpus * gpu.memory_bytes * GPU_USABLE


def plain_cache(layers: Sequence[KvLayer]) -> Cache:
    """In 16 bit."""
    return stored_cache(layers, {}, engine=True)


def planned_cache(plan: Plan) -> Cache:
    """As the recipe asks; where formats are chosen by a fit, at its budget."""
    config = plan.configured.config
    layers, _ = kv_layers(config)
    if plan.kv is None:
        return plain_cache(layers)
    spec = plan.kv.spec
    if spec.format == AUTO:
        assert spec.budget_bytes_per_token is not None, "auto has a budget"
        full = [layer for layer in layers if layer.kind == "full"]
        token = min(spec.budget_bytes_per_token, sum(layer.bytes_16bit for layer in full))
        others = stored_cache([layer for layer in layers if layer.kind != "full"], {}, engine=False)

        def stored(tokens: int) -> int:
            return token * tokens + others.stored(tokens)

        return Cache(stored, stored, others.state_bytes)
    return stored_cache(layers, format_map(layers, config, FORMATS[spec.format]), engine=plan.kv.servable)


def own_cache(layers: Sequence[KvLayer], chosen: KvPlan) -> Cache:
    """In this package's own cache: what the plan of a fit holds, and the other layers in 16 bit."""
    others = stored_cache([layer for layer in layers if layer.index not in chosen.layers], {}, engine=False)

    def stored(tokens: int) -> int:
        return chosen.bytes_at(tokens) + others.stored(tokens)

    return Cache(stored, stored, others.state_bytes)


def stored_cache(layers: Sequence[KvLayer], formats: Mapping[int, KvFormat], *, engine: bool) -> Cache:
    """With a format in some layers, the others in 16 bit; ``engine``: held in vLLM's blocks and pages."""

    def stored(tokens: int) -> int:
        found = cache_bytes(layers, formats, tokens, engine=False)
        assert found is not None, "only vLLM has pages"
        return found

    def held(tokens: int) -> int:
        found = cache_bytes(layers, formats, tokens, engine=True) if engine else None
        return stored(tokens) if found is None else found

    return Cache(held, stored, sum(layer.bytes_16bit for layer in layers if layer.kind == "state"))


def planned_proposals(plan: Plan, passed: float) -> Proposals | None:
    """What the recipe's draft costs, where one pass gives ``passed`` tokens with it."""
    drafts = plan.drafts
    if drafts is None:
        return None
    config = plan.configured.config
    if drafts.model is not None:
        weights = result_load(drafts.model.claims, drafts.model.source.config)
    elif drafts.spec.kind == "native":
        weights = prediction_load(plan.claims, config)
    else:
        weights = plain_load(drafts.parameters, _EAGLE_BYTES * drafts.parameters)
        train = drafts.spec.train
        if train is None or train.vocabulary_size is None:
            model = result_load(plan.claims, config)
            weights = replace(weights, head_bytes=model.head_bytes, head=model.head)
    return Proposals(drafts.spec.tokens, passed, weights)


def reaches(plan: Plan) -> tuple[int, int]:
    """Tokens that source and result read."""
    before, after = (
        full_context(plan.source.config),
        planned_reach(plan.loaded.recipe, plan.configured.config),
    )
    return before or _MOST_TOKENS, after or _MOST_TOKENS
