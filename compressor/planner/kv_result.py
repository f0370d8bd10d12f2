"""The KV cache of a finished run: the plan that its stage left, counted and put into words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.folded import FoldedSource
from compressor.kv.formats import FORMATS
from compressor.planner.kv_bytes import KvLayer, kv_layers
from compressor.planner.kv_choice import BF16, cache_bytes, format_map, kv_points, launch_flags, token_bytes
from compressor.planner.staged import weights_source
from compressor.report.kv import KvFacts, KvQuality, KvSizes, StoredKvLayer

if TYPE_CHECKING:
    from compressor.kv.base import KvFormat
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
    points = _points(plan)
    servable = plan.kv.servable
    formats = stored_formats(plan, chosen, layers)
    stored, before_bytes, after_bytes = _stored_layers(chosen, layers, formats)
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
        formats=dict(Counter(layer.format for layer in stored)),
        tier=plan.kv.spec.tier,
        servable=servable,
        flags=launch_flags(layers, plan.configured.config, formats) if servable else "",
        bytes_per_token_before=before_bytes,
        bytes_per_token=after_bytes,
        bits=16 * after_bytes / before_bytes if before_bytes else 16.0,
        sizes=tuple(sizes),
        notes=_notes(plan, facts),
        changed_16bit=tuple(sorted(copied.intersection(changed))),
        quality=tuple(_quality(found) for found in quality),
        layers=stored,
    )


def stored_formats(plan: Plan, chosen: KvPlan, layers: Sequence[KvLayer]) -> dict[int, KvFormat]:
    """Layer -> format of those that are not in 16 bit.

    Latent attention is in no stage's plan, since nothing of it is fitted: it is stored as the recipe says.
    """
    assert plan.kv is not None
    asked = plan.kv.spec.format
    if not chosen.layers and asked in FORMATS and any(layer.kind == "latent" for layer in layers):
        return dict(format_map(layers, plan.configured.config, FORMATS[asked]))
    named = {index: layer.format for index, layer in chosen.layers.items()}
    return {index: FORMATS[name] for index, name in named.items() if name in FORMATS and name != BF16}


def _stored_layers(
    chosen: KvPlan, layers: Sequence[KvLayer], formats: Mapping[int, KvFormat]
) -> tuple[tuple[StoredKvLayer, ...], int, int]:
    """Every layer of the stage's plan, or of latent attention; bytes of a token before and after."""
    if chosen.layers:
        told = tuple(
            StoredKvLayer(layer=index, format=layer.format, bits=16 * layer.token_bytes / layer.plain_bytes)
            for index, layer in sorted(chosen.layers.items())
        )
        return told, sum(layer.plain_bytes for layer in chosen.layers.values()), chosen.token_bytes
    latent = [layer for layer in layers if layer.kind == "latent"]
    sizes = {layer.index: token_bytes(layer, formats) for layer in latent}
    told = tuple(
        StoredKvLayer(
            layer=layer.index,
            format=formats[layer.index].name if layer.index in formats else BF16,
            bits=16 * sizes[layer.index] / layer.bytes_16bit,
        )
        for layer in latent
    )
    return told, sum(layer.bytes_16bit for layer in latent), sum(sizes.values())


def _points(plan: Plan) -> list[tuple[int, int]]:
    """(tokens, sequences) that the recipe counts the cache for, or that it was chosen for."""
    section, budget = plan.loaded.recipe.kv_cache, plan.loaded.recipe.weights.budget
    if section is not None:
        return kv_points(plan.configured.config, section.contexts, section.users)
    if budget is None or budget.context is None:
        return []
    return kv_points(plan.configured.config, (budget.context,), (budget.users or 1,))


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
