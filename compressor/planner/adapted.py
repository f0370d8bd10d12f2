"""What the recipe's ``adapters`` section adds to a plan: its texts, faults, memory, time, key and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.made_by import FactorySource
from compressor.device import available_device_bytes, available_memory_bytes
from compressor.errors import PlanError, UserError
from compressor.evals.base import EvalSpec
from compressor.model.attention_targets import attention_targets
from compressor.model.families.naming import leaf
from compressor.planner.adapter_spec import (
    adapt_spec,
    fold_faults,
    found_documents,
    kept_faults,
    unmerged_faults,
)
from compressor.planner.faults import collect
from compressor.planner.kv_job import KvStage
from compressor.planner.predict import BASE_RSS_BYTES, Prediction
from compressor.planner.sizes import (
    DTYPE_BYTES,
    Device,
    active_parameters,
    in_block,
    planned_device,
    vocabulary_size,
)
from compressor.recipe.load import LoadedRecipe
from compressor.report.words import counted, duration, millions, size
from compressor.stages.adapt import AdaptSpec
from compressor.stages.adapt_memory import CHUNK_LOGITS, attention_width, blocks_of, kept_bytes
from compressor.stages.base import Claim
from compressor.workspace import stage_key

ADAPT_VERSION = 1
# config/lora.py of vLLM 0.32, MaxLoRARanks.
_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Floating-point operations a second of two CPU cores, and of an accelerator: SmolLM2-135M reached 2.5e14 on
# an H100 in sequences of 32,768 tokens, and more in longer ones.
_FLOPS = {"cpu": 8e10, "cuda": 2e14}
# Passes of frozen matrices: forward, and back to their inputs; once more where blocks are computed twice.
_MATRIX_PASSES = 2
# Attention's way back computes scores and probabilities again: five products for two (arXiv:2307.08691).
_ATTENTION_PASSES = 3.5
# fp32: value, gradient and two moments of what is trained.
_TRAINED_BYTES = 16
# Copies of the logits of a chunk, in fp32.
_LOGIT_COPIES = 5
# Gradients on their way, and fragments: 30 GB were measured where 26 are counted.
_SLACK = 1.15


@dataclass(frozen=True)
class AdaptPlan:
    """The stage of a plan.

    Attributes:
        spec: what it is told.
        device: ``cpu`` or ``cuda``; results differ in the last bits.
        layers: how many matrices get an adapter.
        targets: their last names.
        trained: numbers that are trained.
        held_bytes: of memory, on the device that computes.
        stage_bytes: of disk.
        time_s: that it takes.
        recomputes: whether blocks would be computed twice, by what memory is free now.
    """

    spec: AdaptSpec
    device: Device
    layers: int
    targets: tuple[str, ...]
    trained: int
    held_bytes: int
    stage_bytes: int
    time_s: float
    recomputes: bool

    @property
    def tokens(self) -> int:
        """Of all steps."""
        return self.spec.steps * self.spec.sequences * self.spec.sequence_length

    @property
    def served_rank(self) -> int:
        """vLLM's ``--max-lora-rank`` for an adapter that is not merged."""
        return next(rank for rank in _SERVED_RANKS if rank >= self.spec.rank)

    def key(self, source: str) -> str:
        """Content key; ``source`` is that of what is trained."""
        return stage_key("adapt", ADAPT_VERSION, {**self.spec.content, "device": self.device}, [source])

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with memory, disk and time of the stage."""
        rss = BASE_RSS_BYTES + (self.held_bytes if self.device == "cpu" else 0)
        return replace(
            prediction,
            peak_rss_bytes=max(prediction.peak_rss_bytes, rss),
            disk_bytes=prediction.disk_bytes + self.stage_bytes,
            time_s=prediction.time_s + self.time_s,
        )

    def warnings(self) -> list[str]:
        """Whether this machine looks too small, or too slow."""
        found = []
        free = _free_bytes(self.device)
        if self.held_bytes > free:
            found.append(
                f"adapters take about {self.held_bytes / 1e9:.1f} GB of memory; this machine has "
                f"{free / 1e9:.1f} GB free"
            )
        if self.device == "cpu" and self.time_s > 3600:
            found.append(f"training adapters takes about {self.time_s / 3600:,.0f} hours on this CPU")
        return found

    def described(self) -> tuple[str, ...]:
        """Lines for people."""
        spec, device = self.spec, "GPU" if self.device == "cuda" else "CPU"
        besides = " and ".join(name for name in ("norms", "embeddings") if getattr(spec, name))
        texts = ", ".join(dataset.name for dataset in spec.documents)
        again = ", blocks computed twice" if self.recomputes else ""
        return (
            f"rank {spec.rank} beside {', '.join(self.targets)} of {self.layers:,} matrices"
            f"{', and ' + besides if besides else ''}: {millions(self.trained)} numbers are trained",
            f"{counted(spec.steps, 'step')} of {spec.sequences:,} x {spec.sequence_length:,} tokens "
            f"({millions(self.tokens)}) of {texts}",
            f"about {size(self.held_bytes)} and {duration(self.time_s)} on the {device}{again} (estimates)",
            "merged into the weights" if spec.merge else "written beside the weights, to folder adapter",
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able, for ``compress plan --json``."""
        facts = asdict(self)
        facts["spec"] = self.spec.content
        return facts | {"tokens": self.tokens}


def plan_adapters(
    loaded: LoadedRecipe, source: Source, claims: Sequence[Claim], held_out: Sequence[Path]
) -> AdaptPlan:
    """The section against the source.

    Args:
        loaded: the recipe, which has the section.
        source: as it is trained: its positions scaled.
        claims: of its tensors.
        held_out: texts that the result is measured on.

    Raises:
        UserError: a package makes the model.
        PlanError: every fault found.
    """
    section = loaded.recipe.adapters
    assert section is not None
    faults: list[UserError] = []
    if isinstance(source, FactorySource):
        what = f"{source.factory} makes the model: which of its parameters is its embedding is not known"
        raise UserError(what, where="adapters", fix="leave the section out")
    documents = found_documents(section, loaded.folder, held_out, faults)
    spec = adapt_spec(section, loaded, source.config, documents, faults)
    matrices = [claim for claim in claims if claim.role.kind == "linear" and in_block(claim)]
    modules = {claim.tensor.name.removesuffix(".weight"): claim for claim in matrices}
    chosen = attention_targets(modules, section.targets)
    if not chosen:
        names = sorted({leaf(module) for module in modules if not leaf(module).isdecimal()})
        faults.append(
            UserError(
                f"no matrix is called {' or '.join(section.targets) or 'as a projection of attention is'}",
                where="adapters.targets",
                fix=f"name some of: {', '.join(names[:12])}" if names else "leave adapters out",
            )
        )
    faults += kept_faults(claims)
    if not section.merge:
        faults += unmerged_faults(chosen, claims)
    if spec is None or faults:
        raise PlanError(faults)
    return _plan(spec, source.config, claims, [modules[module] for module in chosen])


def settled_adapters(
    loaded: LoadedRecipe,
    source: Source,
    claims: Sequence[Claim],
    evaluation: EvalSpec | None,
    kv_stage: KvStage | None,
    faults: list[UserError],
    warnings: list[str],
) -> AdaptPlan | None:
    """What is trained, if anything is; adds to ``faults`` and ``warnings`` what it finds."""
    if loaded.recipe.adapters is None:
        return None
    held_out = list(evaluation.texts.values()) if evaluation is not None else []
    adapters = collect(faults, lambda: plan_adapters(loaded, source, claims, held_out))
    if adapters is None:
        return None
    faults += fold_faults(adapters.spec, kv_stage)
    warnings += adapters.warnings()
    if loaded.recipe.context is None:
        warnings.append("adapters without a context section: the result reads no further than its source")
    return adapters


def _plan(
    spec: AdaptSpec, config: dict[str, Any], claims: Sequence[Claim], adapted: Sequence[Claim]
) -> AdaptPlan:
    """What it costs."""
    device = planned_device()
    length = spec.sequence_length
    direct = [claim for claim in claims if _is_direct(claim, spec)]
    parts = [part for claim in adapted for part in claim.role.parts]
    adapters = spec.rank * sum(part.in_features + part.out_features for part in parts)
    trained = adapters + sum(claim.tensor.numel for claim in direct)
    width = DTYPE_BYTES[spec.dtype]
    kept = kept_bytes(config, length, width, recomputed=False)
    weights = width * sum(claim.tensor.numel for claim in claims) + _TRAINED_BYTES * trained
    chunk = 4 * _LOGIT_COPIES * min(CHUNK_LOGITS[device], length * vocabulary_size(config))
    recomputes = weights + chunk + kept > _free_bytes(device)
    if recomputes:
        kept = kept_bytes(config, length, width, recomputed=True)
    changed = sum(claim.tensor.nbytes for claim in (*adapted, *direct)) if spec.merge else 4 * adapters
    matrices = 2 * active_parameters(claims, config) * (_MATRIX_PASSES + recomputes)
    attention = _ATTENTION_PASSES * 2 * length * attention_width(config) * blocks_of(config)
    tokens = spec.steps * spec.sequences * length
    return AdaptPlan(
        spec=spec,
        device=device,
        layers=len(adapted),
        targets=tuple(sorted({leaf(part.module) for part in parts})),
        trained=trained,
        held_bytes=int(_SLACK * (weights + chunk + kept)),
        stage_bytes=changed + 12 * trained + 4 * tokens,
        time_s=tokens * (matrices + attention) / _FLOPS[device],
        recomputes=recomputes,
    )


def _is_direct(claim: Claim, spec: AdaptSpec) -> bool:
    if spec.embeddings and claim.role.kind == "embedding":
        return True
    return spec.norms and len(claim.tensor.shape) == 1 and claim.role.reason == "norm"


def _free_bytes(device: Device) -> int:
    return available_device_bytes() if device == "cuda" else available_memory_bytes()


def adapted_key(adapters: AdaptPlan | None, source: str) -> str:
    """Content key of what is read after the stage; ``source`` is that of what is trained."""
    return source if adapters is None or not adapters.spec.merge else adapters.key(source)
