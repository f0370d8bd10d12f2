"""Where the gain comes from: memory, traffic and arithmetic, each shrinking step by step.

Each begins with a twin of the source: as many weights, all of them used for each token, full attention in
every layer, 16 bit, one token a pass. Each step changes one thing more, so that the factors of a ledger
multiply to what all of them do together; the three are never multiplied with one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from compressor.planner.served import Served
from compressor.planner.weight_load import WeightLoad
from compressor.report.compounding import Ledger, Mark, Multiplier

_Of = Literal["model", "recipe"]
# What was done, whose doing it is, what it touches before and after, and the whole after it.
_Step = tuple[str, _Of, float, float, float, Mark]

_ROUTING = "experts: active of all weights"
_ATTENTION = "attention: windows, chunks and states"
_WEIGHTS = "weights stored smaller"
_CACHE = "cache stored smaller"
_DRAFT = "tokens a pass with the draft, and its cost"


def ledgers(
    before: Served, after: Served, twin: Served, tokens: int, users: int, draft_mark: Mark
) -> tuple[Ledger, ...]:
    """All three at ``users`` users of ``tokens`` tokens each; ``twin``: the source with full attention."""
    return (
        _memory(before, after, twin, tokens, users),
        _traffic(before, after, twin, tokens, users, draft_mark),
        _arithmetic(before, after, twin, tokens, draft_mark),
    )


def _memory(before: Served, after: Served, twin: Served, tokens: int, users: int) -> Ledger:
    weights, smaller = before.weights.held_bytes, after.weights.held_bytes
    full, own, stored = (users * served.cache.held(tokens) for served in (twin, before, after))
    steps: list[_Step] = [
        (_ATTENTION, "model", full, own, weights + own, "computed"),
        (_WEIGHTS, "recipe", weights, smaller, smaller + own, "computed"),
        (_CACHE, "recipe", own, stored, smaller + stored, "computed"),
    ]
    if after.proposals is not None:
        whole = after.held_bytes + stored
        steps.append(("the draft's weights", "recipe", smaller + stored, whole, whole, "computed"))
    title = f"memory held, {_for(users)} of {tokens:,} tokens"
    return _ledger("memory", title, weights + full, steps)


def _traffic(
    before: Served, after: Served, twin: Served, tokens: int, users: int, draft_mark: Mark
) -> Ledger:
    own = before.load(tokens)
    all_read = replace(own, weights=_dense(before.weights), cache_bytes=twin.cache.moved(tokens))
    routed = replace(all_read, weights=before.weights)
    smaller = replace(own, weights=after.weights)
    plain = replace(after.load(tokens), proposals=None)
    drafted = after.load(tokens)
    steps: list[_Step] = [
        (
            _ROUTING,
            "model",
            before.weights.read_by_all,
            before.weights.read(users),
            routed.token_bytes(users),
            "computed",
        ),
        (_ATTENTION, "model", routed.cache_bytes, own.cache_bytes, own.token_bytes(users), "computed"),
        (
            _WEIGHTS,
            "recipe",
            before.weights.read(users),
            after.weights.read(users),
            smaller.token_bytes(users),
            "computed",
        ),
        (_CACHE, "recipe", own.cache_bytes, plain.cache_bytes, plain.token_bytes(users), "computed"),
    ]
    if after.proposals is not None:
        whole = drafted.token_bytes(users)
        steps.append((_DRAFT, "recipe", drafted.passed, 1.0, whole, draft_mark))
    title = f"bytes moved for a token, {_for(users)} of {tokens:,}"
    return _ledger("traffic", title, all_read.token_bytes(users), steps)


def _arithmetic(before: Served, after: Served, twin: Served, tokens: int, draft_mark: Mark) -> Ledger:
    own = before.load(tokens)
    full = twin.load(tokens).attention_flops
    all_used = replace(own, weights=_dense(before.weights), attention_flops=full)
    routed = replace(own, attention_flops=full)
    steps: list[_Step] = [
        (
            _ROUTING,
            "model",
            before.weights.parameters,
            before.weights.active,
            routed.token_flops(),
            "computed",
        ),
        (_ATTENTION, "model", full, own.attention_flops, own.token_flops(), "computed"),
    ]
    if after.proposals is not None:
        drafted = after.load(tokens).token_flops()
        steps.append((_DRAFT, "recipe", own.token_flops(), drafted, drafted, draft_mark))
    title = f"operations for a token behind {tokens:,}"
    return _ledger("arithmetic", title, all_used.token_flops(), steps)


def _ledger(
    resource: Literal["memory", "traffic", "arithmetic"], title: str, start: float, steps: Sequence[_Step]
) -> Ledger:
    """Multipliers from the whole after each step; steps that touch nothing are left out."""
    found, whole = [], float(start)
    for what, of, touched, left, after, mark in steps:
        if touched == left and whole == after:
            continue
        alone = touched / left if left else 1.0
        found.append(Multiplier(what=what, of=of, alone=alone, factor=whole / after, mark=mark))
        whole = float(after)
    return Ledger(resource=resource, title=title, before=float(start), after=whole, steps=tuple(found))


def _dense(weights: WeightLoad) -> WeightLoad:
    """The same weights, all of them used for each token."""
    idle = weights.parameters - weights.active
    return replace(
        weights,
        dense_bytes=weights.dense_bytes + weights.routed_bytes,
        routed_bytes=0,
        products={**weights.products, "bf16": weights.products.get("bf16", 0.0) + idle},
    )


def _for(users: int) -> str:
    return f"{users:,} user{'' if users == 1 else 's'}"
