"""What the recipe's ``kv_cache`` section adds to a plan: the stage's spec, faults, warnings, flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressor.errors import UserError
from compressor.kv.base import KvFormat, Tier
from compressor.kv.formats import FORMATS
from compressor.kv.spec import AUTO, KvSpec
from compressor.planner.kv_bytes import KvLayer, kv_layers
from compressor.planner.kv_choice import (
    BF16,
    KvOption,
    cache_bytes,
    format_map,
    format_problem,
    kv_options,
    launch_flags,
)
from compressor.recipe.kv_cache import KvBudgetSection, KvCacheSection

_TIERS: tuple[Tier, ...] = ("vllm", "own", "research")
NOT_SERVABLE = "not servable by vLLM 0.32"


@dataclass(frozen=True)
class KvPlanned:
    """The KV cache of a plan.

    Attributes:
        spec: what the stage is told.
        flags: of ``vllm serve``, where the plan knows them already; "" where the fit decides, where none are
            needed, and where vLLM cannot serve the format.
        servable: whether vLLM 0.32 can serve it.
        needs_data: whether the stage reads calibration texts.
    """

    spec: KvSpec
    flags: str
    servable: bool
    needs_data: bool

    def described(self) -> str:
        """One line for people."""
        spec = self.spec
        what = f"{spec.format}"
        if spec.budget_bytes_per_token is not None:
            what += f", at most {spec.budget_bytes_per_token:,} bytes a token, tier {spec.tier}"
        return what if self.servable else f"{what} ({NOT_SERVABLE})"


def plan_kv(
    section: KvCacheSection, config: dict[str, Any], faults: list[UserError], warnings: list[str]
) -> KvPlanned | None:
    """The section against the model of a config; None after adding to ``faults`` why it cannot be."""
    layers, reason = kv_layers(config)
    if not layers:
        faults.append(UserError(reason, where="kv_cache", fix="remove the section"))
        return None
    tier = section.tier or (FORMATS[section.format].tier if section.format != AUTO else "vllm")
    found = len(faults)
    faults += _format_faults(section, tier, layers)
    budget = None
    if section.budget is not None and len(faults) == found:
        budget = _budget(section.budget, layers, config, tier, faults, warnings)
    if len(faults) > found:
        return None
    spec = KvSpec(
        section.format,
        tier,
        budget,
        section.fold == "auto",
        section.calibrate,
        section.sink_tokens,
        section.recent_tokens,
        _unpaged(layers, config) if section.format == AUTO and tier == "vllm" else (),
    )
    servable = tier == "vllm"
    if not servable:
        warnings.append(f"the KV cache of tier {tier} is {NOT_SERVABLE}: it is for this package's own cache")
    flags = ""
    if servable and section.format != AUTO:
        form = FORMATS[section.format]
        formats = format_map(layers, config, form)
        flags = launch_flags(layers, config, formats)
        if cache_bytes(layers, formats, 1, engine=True) is None:
            what = (
                f"vLLM 0.32 cannot page the layers of this model with {form.name} (AssertionError at start)"
            )
            faults.append(UserError(what, where="kv_cache.format", fix="choose another format"))
            return None
    return KvPlanned(spec, flags, servable, needs_data=_needs_data(spec, layers))


def _unpaged(layers: Sequence[KvLayer], config: dict[str, Any]) -> tuple[str, ...]:
    """Formats of vLLM for which it finds no common page size of this model's layers."""
    return tuple(
        name
        for name in _names("vllm")
        if not format_problem(layers, FORMATS[name])
        and cache_bytes(layers, format_map(layers, config, FORMATS[name]), 1, engine=True) is None
    )


def section_options(
    section: KvCacheSection | None, config: dict[str, Any]
) -> tuple[tuple[KvOption, ...], str]:
    """Every format, counted where the section says, its own marked."""
    if section is None:
        return kv_options(config)
    return kv_options(config, chosen=section.format, contexts=section.contexts, users=section.users)


def _needs_data(spec: KvSpec, layers: Sequence[KvLayer]) -> bool:
    """Whether anything is fitted: what is stored in 16 bit, or is latent, has nothing to fit."""
    if any(layer.kind == "latent" for layer in layers):
        return False
    return spec.calibrate and spec.format != BF16


def _format_faults(section: KvCacheSection, tier: Tier, layers: Sequence[KvLayer]) -> list[UserError]:
    """A format that the tier, or the model, cannot have; fits that were switched off."""
    faults = []
    if not section.calibrate and section.format == AUTO:
        what = "formats are chosen by errors measured on calibration texts, and calibrate is false"
        faults.append(UserError(what, where="kv_cache.calibrate", fix="set it to true, or name a format"))
    if section.format == AUTO:
        if not any(layer.kind == "full" for layer in layers):
            what = format_problem(layers, FORMATS["int4_per_token_head"])
            faults.append(UserError(f"no formats to choose among: {what}", where="kv_cache.format"))
        return faults
    form = FORMATS[section.format]
    if form.make is None and not section.calibrate:
        what = f"{form.name} is fitted to calibration texts, and calibrate is false"
        faults.append(
            UserError(what, where="kv_cache.calibrate", fix="set it to true, or name another format")
        )
    if _TIERS.index(form.tier) > _TIERS.index(tier):
        what = f"{form.name} is {NOT_SERVABLE}" if tier == "vllm" else f"{form.name} is of tier {form.tier}"
        fix = f"set tier to {form.tier}, or choose among {', '.join(_names(tier))}"
        faults.append(UserError(what, where="kv_cache.format", fix=fix))
    if problem := format_problem(layers, form):
        faults.append(UserError(problem, where="kv_cache.format", fix=_possible(layers, tier)))
    return faults


def _names(tier: Tier) -> list[str]:
    allowed = _TIERS[: _TIERS.index(tier) + 1]
    return [form.name for form in FORMATS.values() if form.tier in allowed]


def _possible(layers: Sequence[KvLayer], tier: Tier) -> str:
    names = [name for name in _names(tier) if not format_problem(layers, FORMATS[name])]
    return f"this model can have {', '.join(names)}"


def _budget(
    section: KvBudgetSection,
    layers: Sequence[KvLayer],
    config: dict[str, Any],
    tier: Tier,
    faults: list[UserError],
    warnings: list[str],
) -> int:
    """The budget in bytes a token; adds to ``faults`` where no format is that small."""
    full = [layer for layer in layers if layer.kind == "full"]
    plain = sum(layer.bytes_16bit for layer in full)
    if section.bytes_per_token is not None:
        found, key = section.bytes_per_token, "bytes_per_token"
    elif section.bits is not None:
        found, key = int(plain * section.bits / 16), "bits"
    else:
        assert section.gib is not None
        assert section.context is not None
        fixed = cache_bytes(
            [layer for layer in layers if layer.kind != "full"], {}, section.context, engine=False
        )
        assert fixed is not None
        each = section.gib * 2**30 / (section.users or 1)
        found, key = max(0, int((each - fixed) // section.context)), "gib"
        if tier == "vllm" and any(layer.kind in ("sliding", "chunked") for layer in layers):
            warnings.append(
                "kv_cache.budget.gib counts bytes as stored; beside layers with windows vLLM gives every "
                "layer pages of the largest size, which may take up to twice as much (see the table)"
            )
    sizes = [
        (_form_bytes(full, layers, config, FORMATS[name]), name)
        for name in _names(tier)
        if not format_problem(layers, FORMATS[name])
    ]
    if tier == "research":
        # A fitted codec has a byte for the keys of a head, and one for its values, at least.
        sizes = [(sum(2 * layer.heads for layer in full), "a fitted codec")]
    smallest, name = min(sizes)
    if found < smallest:
        what = (
            f"{found:,} bytes a token is below the smallest format of tier {tier}: {name}, {smallest:,} bytes"
        )
        fix = f"that is {16 * smallest / plain:.2f} bits an element; raise the budget"
        if tier != "research":
            fix += f", or set tier to {_TIERS[_TIERS.index(tier) + 1]}"
        faults.append(UserError(what, where=f"kv_cache.budget.{key}", fix=fix))
    elif found >= plain:
        warnings.append(f"the budget of the KV cache, {found:,} bytes a token, holds it in 16 bit")
    return found


def _form_bytes(
    full: Sequence[KvLayer], layers: Sequence[KvLayer], config: dict[str, Any], form: KvFormat
) -> int:
    formats = format_map(layers, config, form)
    return sum(
        layer.heads * form.slot_bytes(layer.head_dim) if layer.index in formats else layer.bytes_16bit
        for layer in full
    )
