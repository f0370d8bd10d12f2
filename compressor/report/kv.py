"""The KV cache in a report: what it takes before and after, how it is served, what was lost."""

from __future__ import annotations

from typing import Literal

from compressor.report.record import Count, Measure, Record
from compressor.report.words import percent

KV_HEADS = ("tokens x sequences", "before", "after", "smaller")
KV_QUALITY_HEADS = ("read as", "perplexity", "16-bit cache", "change", "KL mean", "KL 99.9%", "top-1")
NOT_SERVABLE = "not servable by vLLM 0.32"
_GIB = 2**30


class KvSizes(Record):
    """Bytes of the whole cache of ``users`` sequences of ``context`` tokens: in 16 bit, and as chosen."""

    context: Count
    users: Count
    before: Count
    after: Count


class KvQuality(Record):
    """The model with the chosen cache against itself with a 16-bit one.

    Attributes:
        mode: ``strict``: every key and value is read as stored; ``vllm``: as vLLM 0.32 reads them.
        perplexity_16bit: with a 16-bit cache.
        perplexity: with the chosen one.
        increase: of the perplexity, relative.
        increase_ci95: its 95% interval, or None.
        kl_mean: mean KL divergence from the 16-bit cache, nats a token.
        kl_p999: the same at the 99.9th percentile.
        top1_agreement: share of tokens whose most probable successor is the same.
        tokens: scored.
    """

    mode: Literal["strict", "vllm"]
    perplexity_16bit: Measure
    perplexity: Measure
    increase: Measure
    increase_ci95: tuple[Measure, Measure] | None
    kl_mean: Measure
    kl_p999: Measure
    top1_agreement: Measure
    tokens: Count


class StoredKvLayer(Record):
    """One full-attention layer: its index, its format, and the bits of an element of keys and values."""

    layer: Count
    format: str
    bits: Measure


class KvFacts(Record):
    """How the KV cache is stored.

    Attributes:
        format: as the recipe names it.
        formats: name of a format -> how many full-attention layers have it.
        tier: who can serve it.
        servable: whether vLLM 0.32 can.
        flags: what ``vllm serve`` is told; "" for nothing.
        bytes_per_token_before: of all full-attention layers, in 16 bit.
        bytes_per_token: of the same as chosen.
        bits: mean bits of an element, scales, norms and 16-bit layers included.
        sizes: before and after at some contexts and numbers of users.
        notes: what is folded into the weights, and what is not and why.
        changed_16bit: tensors that stay in 16 bit and that a fold changed.
        quality: measured, or empty.
        layers: how each is stored.
    """

    format: str
    formats: dict[str, Count]
    tier: Literal["vllm", "own", "research"]
    servable: bool
    flags: str
    bytes_per_token_before: Count
    bytes_per_token: Count
    bits: Measure
    sizes: tuple[KvSizes, ...]
    notes: tuple[str, ...] = ()
    changed_16bit: tuple[str, ...] = ()
    quality: tuple[KvQuality, ...] = ()
    layers: tuple[StoredKvLayer, ...] = ()


def kv_caption(facts: KvFacts) -> str:
    """One line: formats, bytes a token, bits, and whether vLLM can serve it."""
    layers = ", ".join(f"{name} in {count}" for name, count in facts.formats.items())
    served = "" if facts.servable else f"; {NOT_SERVABLE}: for this package's own cache"
    return (
        f"{layers} full-attention layers: {facts.bytes_per_token:,} bytes a token instead of "
        f"{facts.bytes_per_token_before:,}, {facts.bits:.2f} bits an element{served}"
    )


def kv_rows(facts: KvFacts) -> list[tuple[str, str, str, str]]:
    """Contexts and users against GiB before and after."""
    return [
        (
            f"{sizes.context:,} x {sizes.users}",
            f"{sizes.before / _GIB:,.3f} GiB",
            f"{sizes.after / _GIB:,.3f} GiB",
            f"{sizes.before / sizes.after:.2f}x" if sizes.after else "-",
        )
        for sizes in facts.sizes
    ]


def kv_quality_rows(facts: KvFacts) -> list[tuple[str, ...]]:
    """What was measured, by mode."""
    return [
        (
            {"strict": "as stored", "vllm": "as vLLM reads"}[found.mode],
            f"{found.perplexity:.4f}",
            f"{found.perplexity_16bit:.4f}",
            f"{found.increase:+.2%}",
            f"{found.kl_mean:.5f}",
            f"{found.kl_p999:.4f}",
            percent(found.top1_agreement),
        )
        for found in facts.quality
    ]


def kv_notes(facts: KvFacts) -> list[str]:
    """Folds, and tensors that these changed in 16 bit."""
    changed = len(facts.changed_16bit)
    told = [f"{changed} tensors in 16 bit are the source's once it is folded"] if changed else []
    return [*facts.notes, *told]
