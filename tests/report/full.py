"""A report with every section, and the same with an attack in every string that a stranger could choose."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from compressor.report.budget import BudgetFacts, BudgetGroup, BudgetOption, BudgetPoint, FrontierPoint
from compressor.report.calibration import ExpertCoverage
from compressor.report.compounding import (
    Cell,
    ClaimedGain,
    CompoundingFacts,
    CompoundingRow,
    Ledger,
    Multiplier,
    ServePoint,
)
from compressor.report.kv import StoredKvLayer
from compressor.report.long import long_facts
from compressor.report.measured import (
    DomainQuality,
    Gate,
    GenerationFacts,
    SpeedFacts,
    SpeedFigures,
    Spread,
)
from compressor.report.model import Report, WeightFacts
from compressor.report.parts import LayerMatrix, PartBytes
from tests.report import test_adapters, test_context, test_drafts, test_kv, test_long
from tests.report.sample import ATTACK, sample_report

LAYERS = 24
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
_MB = 1_000_000


def full_report() -> Report:
    """Every optional part of a report; numbers of the right size, not of one model."""
    report = sample_report()
    assert report.quality is not None
    assert report.calibration is not None
    quality = report.quality.model_copy(
        update={"domains": _domains(), "generation": GENERATION, "speed": SPEED, "interval_unit": "documents"}
    )
    parts = (
        PartBytes(part="embedding", scheme="16 bit", tensors=1, source_bytes=57 * _MB, bytes=57 * _MB),
        PartBytes(part="attention", scheme="NVFP4A16", tensors=120, source_bytes=53 * _MB, bytes=15 * _MB),
        PartBytes(part="routed experts", scheme="FP8", tensors=90, source_bytes=159 * _MB, bytes=45 * _MB),
    )
    experts = tuple(
        ExpertCoverage(
            name=f"model.layers.{layer}.mlp.experts",
            experts=8,
            tokens=(layer, 500.0 + layer, 2_000),
            enough=64,
            starved=2,
            topped_up=1,
            topped_up_tokens=60,
            never_reached=int(layer == 0),
            scored=True,
            shared_range=True,
        )
        for layer in range(4)
    )
    kv = test_kv.FACTS.model_copy(
        update={
            "layers": tuple(
                StoredKvLayer(
                    layer=layer, format="fp8" if layer % 3 else "bf16", bits=8.0 if layer % 3 else 16.0
                )
                for layer in range(12)
            )
        }
    )
    return report.model_copy(
        update={
            "quality": quality,
            "gates": (*report.gates, UNCERTAIN),
            "result": report.result.model_copy(update={"parts": parts}),
            "weights": WeightFacts(relative_error=report.weights.relative_error, layers=layer_matrices()),
            "calibration": report.calibration.model_copy(update={"experts": experts}),
            "kv": kv,
            "context": test_context.FACTS.model_copy(
                update={"cost": test_context.COST, "search": test_context.SEARCH}
            ),
            "long": long_facts(test_long.measured()),
            "adapters": test_adapters.FACTS,
            "drafts": test_drafts.FACTS,
            "compounding": COMPOUNDING,
            "budget": BUDGET,
        }
    )


def layer_matrices(scale: float = 1.0) -> tuple[LayerMatrix, ...]:
    """Matrices of some layers, errors growing with the layer."""
    return tuple(
        LayerMatrix(
            layer=layer,
            matrix=matrix,
            scheme="NVFP4A16" if layer else "16 bit",
            parameters=1_000_000,
            bits=4.5 if layer else 16.0,
            relative_error=scale * layer * (0.001 + 0.0001 * index),
            output_error=0.0002 * (layer + 1) if index else None,
            rtn_output_error=0.0004 * (layer + 1) if index else None,
        )
        for layer in range(LAYERS)
        for index, matrix in enumerate(MATRICES)
    )


def hostile_full_report() -> Report:
    """``full_report`` with ``ATTACK`` for every string and key that the layout does not fix."""
    told = json.loads(full_report().to_json())
    attacked = _attacked(told)
    for _ in range(20):
        try:
            return Report.model_validate_json(json.dumps(attacked))
        except ValidationError as error:
            for fault in error.errors():
                _restore(attacked, told, fault["loc"])
    raise AssertionError("what the layout fixes was not found")


def _attacked(value: Any) -> Any:
    if isinstance(value, str):
        return ATTACK
    if isinstance(value, list):
        return [_attacked(item) for item in value]
    if isinstance(value, dict):
        return {key: _attacked(item) for key, item in value.items()}
    return value


def _restore(attacked: Any, told: Any, place: tuple[Any, ...]) -> None:
    """Puts back what stood at a place of the layout."""
    *parents, last = [step for step in place if not str(step).endswith("-sequence")]
    for step in parents:
        if isinstance(attacked, dict) and step not in attacked:
            return
        attacked, told = attacked[step], told[step]
    attacked[last] = told[last]


def _domains() -> tuple[DomainQuality, ...]:
    return tuple(
        DomainQuality(
            name=name,
            documents=12,
            scored_tokens=4_000,
            perplexity_source=20.0,
            perplexity_result=20.0 * (1 + increase),
            increase=increase,
            increase_ci95=(increase - 0.02, increase + 0.02),
            kl_mean=0.1,
        )
        for name, increase in (("prose", 0.18), ("code", 0.31), ("chat", 0.12))
    )


UNCERTAIN = Gate(
    metric="task:piqa",
    value=0.985,
    passed=True,
    min_recovery=0.99,
    confidence=0.95,
    verdict="UNCERTAIN",
    interval=(0.96, 1.01),
    units=1_838,
    unit="items",
    needed=9_000,
    p_value=0.2,
    note="about 9,000 items would tell",
)
GENERATION = GenerationFacts(
    prompts=16,
    prompt_tokens=64,
    new_tokens=128,
    until_divergence=31.5,
    until_divergence_ci95=(20.0, 44.0),
    agreeing=0.4,
    identical=0.125,
    lengths=(31,) * 16,
    dtype="float32",
)
_SPREAD = Spread(median=12.5, low=12.0, high=13.0)
_FIGURES = SpeedFigures(
    first_token_s=Spread(median=0.5, low=0.4, high=0.6),
    tokens_per_s=_SPREAD,
    weight_bytes=200 * _MB,
    cache_bytes=3 * _MB,
    peak_device_bytes=None,
)
SPEED = SpeedFacts(
    device="Example CPU",
    dtype="bfloat16",
    prompt_tokens=128,
    new_tokens=64,
    batch=1,
    runs=3,
    source=_FIGURES,
    result=_FIGURES,
    speedup=Spread(median=1.0, low=0.9, high=1.1),
    runs_compressed=False,
)


def _pair(before: float | None, after: float | None) -> dict[str, Cell]:
    return {
        "baseline": Cell(value=before, mark="computed", note="" if before else "reference"),
        "optimized": Cell(value=after, mark="measured"),
    }


COMPOUNDING = CompoundingFacts(
    point=ServePoint(
        gpu="example-80gb",
        gpu_source="a data sheet",
        memory_bytes=80_000_000_000,
        bandwidth=3e12,
        flops={"bf16": 1e15},
        context=8_192,
        concurrency=4,
        gpus=(4, 1),
        price_per_hour=2.5,
        tokens_per_pass=2.2,
        tokens_per_pass_mark="claimed",
        active_parameters=1.3e8,
        embedding_parameters=28_000_000,
        parameters=134_515_008,
    ),
    rows=(
        CompoundingRow(key="weights", title="weights", unit="bytes", **_pair(269e6, 116e6)),
        CompoundingRow(key="gpus", title="GPUs for 4 users", unit="GPUs", **_pair(4, 1)),
        CompoundingRow(key="speed", title="tokens/s of each user", unit="tokens/s", **_pair(40, 200)),
        CompoundingRow(key="perplexity", title="perplexity", unit="change", **_pair(None, 0.2)),
    ),
    ledgers=(
        Ledger(
            resource="memory",
            title="memory held, 4 users of 8,192 tokens",
            before=8e8,
            after=1e8,
            steps=(
                Multiplier(what="sliding layers", of="model", alone=2.0, factor=2.0, mark="computed"),
                Multiplier(what="weights smaller", of="recipe", alone=5.0, factor=4.5, mark="computed"),
                Multiplier(what="the draft's weights", of="recipe", alone=1.0, factor=8 / 9, mark="claimed"),
            ),
        ),
        Ledger(resource="arithmetic", title="operations", before=1e9, after=1e9, steps=()),
    ),
    claims=(
        ClaimedGain(key="gpus", baseline=(4, 4), optimized=(1, 1), computed=(4, 1), measured=(None, None)),
    ),
    notes=("GPUs are a lower bound.",),
)
BUDGET = BudgetFacts(
    goal="bits_per_target_weight: 4.75",
    tokens_heard=8_192,
    tokens_judged=24_576,
    groups=tuple(
        BudgetGroup(
            name=f"model.layers.{layer}.{matrix}",
            parameters=1_000_000,
            chosen="nvfp4a16" if layer % 4 else "fp8_dynamic",
            options=(
                BudgetOption(scheme="nvfp4a16", bytes=562_500, cost=0.001 * (layer + 1)),
                BudgetOption(scheme="fp8_dynamic", bytes=1_000_000, cost=0.0001 * (layer + 1)),
                BudgetOption(scheme="copy", bytes=2_000_000, cost=0.0),
            ),
        )
        for layer in range(12)
        for matrix in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    points=tuple(
        BudgetPoint(
            kind=kind,  # type: ignore[arg-type]
            label=label,
            bytes=round(bits * 13.3e6),
            bits_per_target_weight=bits,
            predicted_kl=kl * 1.1,
            kl=kl,
            increase=kl,
            increase_ci95=(kl * 0.9, kl * 1.1),
        )
        for kind, label, bits, kl in (
            ("uniform", "nvfp4a16", 4.5, 0.18),
            ("random", "0", 4.75, 0.17),
            ("random", "1", 4.75, 0.16),
            ("chosen", "", 4.75, 0.11),
            ("uniform", "fp8_dynamic", 8.0, 0.006),
        )
    ),
    frontier=tuple(
        FrontierPoint(
            bytes=round(bits * 13.3e6), bits_per_target_weight=bits, predicted_kl=0.2 * 2 ** -(bits - 4.5)
        )
        for bits in (4.5, 4.75, 5.0, 6.0, 8.0)
    ),
    kv_format="fp8",
)
