"""The KV cache of a finished run: the plan that its stage left, counted and put into words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.folded import FoldedSource
from compressor.kv.formats import FORMATS
from compressor.planner.kv_bytes import KvLayer, kv_layers
from compressor.planner.kv_choice import BF16, cache_bytes, kv_points, launch_flags
from compressor.planner.staged import weights_source
from compressor.report.kv import KvFacts, KvQuality, KvSizes

if TYPE_CHECKING:
    from compressor.kv.plan import KvPlan
    from compressor.planner.plan import Plan


def told_kv(plan: Plan, folder: Path | None, shown: Mapping[str, Any]) -> KvFacts | None:
    """The report's part on the KV cache."""
    if folder is None:
        return None
    weights = weights_source(plan)
    changed = weights.changed if isinstance(weights, FoldedSource) else ()
    quality = (shown["evaluate"]["evaluation"] or {}).get("kv", ())
    return kv_facts(plan, folder, shown["kv"]["kv"], quality, changed)


def kv_facts(
    plan: Plan,
    folder: Path,
    facts: Mapping[str, Any],
    quality: Sequence[Mapping[str, Any]],
    changed: Collection[str],
) -> KvFacts:
    """The report's part.

    Args:
        plan: of the run, with a section ``kv_cache``.
        folder: of the finished stage ``kv``.
        facts: that the stage told.
        quality: ``KvResult.to_json`` of what was measured.
        changed: tensors that the fold changed.

    Raises:
        CheckpointError: the stage's plan cannot be read.
    """
    from compressor.kv.plan import KvPlan

    assert plan.kv is not None
    assert plan.kv_stage is not None
    chosen = KvPlan.read(folder)
    layers, _ = kv_layers(plan.configured.config)
    section = plan.loaded.recipe.kv_cache
    points = kv_points(plan.configured.config, section.contexts, section.users) if section else []
    servable = plan.kv.servable
    formats = {
        index: FORMATS[layer.format] for index, layer in chosen.layers.items() if layer.format in FORMATS
    }
    formats = {index: form for index, form in formats.items() if form.name != BF16}
    sizes = []
    for context, users in points:
        before = cache_bytes(layers, {}, context, engine=servable)
        after = (
            cache_bytes(layers, formats, context, engine=True) if servable else _own(chosen, layers, context)
        )
        if before is not None and after is not None:
            sizes.append(KvSizes(context=context, users=users, before=users * before, after=users * after))
    copied = {claim.tensor.name for claim in plan.claims if claim.action == "copy"}
    return KvFacts(
        format=plan.kv.spec.format,
        formats=dict(Counter(layer.format for layer in chosen.layers.values())),
        tier=plan.kv.spec.tier,
        servable=servable,
        flags=launch_flags(layers, plan.configured.config, formats) if servable else "",
        bytes_per_token_before=sum(layer.plain_bytes for layer in chosen.layers.values()),
        bytes_per_token=chosen.token_bytes,
        bits=chosen.bits if chosen.layers else 16.0,
        sizes=tuple(sizes),
        notes=_notes(plan, facts),
        changed_16bit=tuple(sorted(copied.intersection(changed))),
        quality=tuple(_quality(found) for found in quality),
    )


def _own(chosen: KvPlan, layers: Sequence[KvLayer], tokens: int) -> int:
    """Bytes in our own cache: what the plan holds, and the other layers in 16 bit."""
    others = cache_bytes(
        [layer for layer in layers if layer.index not in chosen.layers], {}, tokens, engine=False
    )
    assert others is not None, "only vLLM has pages"
    return chosen.bytes_at(tokens) + others


def _notes(plan: Plan, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What was folded in the end: a fold that did not pass its trial was not."""
    assert plan.kv_stage is not None
    job = plan.kv_stage.job
    dropped = [
        f"{what} were not folded: a block computed otherwise with them"
        for what, wanted, done in (
            ("rotated values", job.fold_values, facts["folded_values"]),
            ("scaled keys", job.fold_keys, facts["folded_keys"]),
        )
        if wanted and not done
    ]
    return tuple(dropped) or plan.kv_stage.notes


def _quality(found: Mapping[str, Any]) -> KvQuality:
    perplexity, kl = found["perplexity"], found["kl"]
    interval = perplexity["increase_ci95"]
    return KvQuality(
        mode=found["mode"],
        perplexity_16bit=perplexity["source"],
        perplexity=perplexity["result"],
        increase=perplexity["increase"],
        increase_ci95=tuple(interval) if interval else None,
        kl_mean=kl["mean"],
        kl_p999=kl["p999"],
        top1_agreement=found["top1_agreement"],
        tokens=found["tokens"],
    )
