"""Parts of the model and layers in a report, against sums over the plan's headers."""

from __future__ import annotations

import pytest

from compressor.planner.plan import Plan, make_plan
from compressor.recipe.load import load_recipe
from compressor.report.parts import (
    PARTS,
    error_range,
    layer_matrices,
    part_bytes,
    part_of,
    part_rows,
    place,
)
from compressor.spec import Role
from tests.e2e.cases import write_recipe
from tests.tiny import tiny_llama4

LAYERS, EXPERTS = 2, 4


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of a model with experts stored as 3-D tensors, FP8 in the last layer."""
    folder = tmp_path_factory.mktemp("parts")
    source = tiny_llama4(folder / "model", layers=LAYERS, experts=EXPERTS)
    weights = "{scheme: nvfp4a16, rules: [{match: '*.layers.1.*.experts.*', scheme: fp8_dynamic}]}"
    path = write_recipe(folder / "recipe.yaml", source, weights, "evaluate: null\n")
    return make_plan(load_recipe(str(path), ()), output=folder / "out")


def test_parts_add_up_to_the_plan(plan: Plan) -> None:
    """Every byte before and after is in one part."""
    parts = part_bytes(plan.claims, plan.source.config)
    assert sum(row.bytes for row in parts) == plan.prediction.result_bytes
    assert sum(row.source_bytes for row in parts) == plan.prediction.source_bytes
    assert sum(row.tensors for row in parts) == len(plan.claims)
    assert {row.part for row in parts} == {
        *("embedding", "attention", "shared experts", "routed experts", "routers", "output head", "norms")
    }
    assert [row.part for row in parts] == sorted((row.part for row in parts), key=PARTS.index)
    experts = {row.scheme: row for row in parts if row.part == "routed experts"}
    for scheme, layer in (("NVFP4A16", 0), ("FP8_DYNAMIC", 1)):
        stored = [
            header
            for name, header in plan.source.headers.items()
            if f"layers.{layer}.feed_forward.experts." in name
        ]
        assert experts[scheme].source_bytes == sum(2 * header.numel for header in stored)
    assert sum(float(row[-1].rstrip("%")) for row in part_rows(parts)) == pytest.approx(100, abs=0.4)


def test_every_matrix_of_every_layer_once(plan: Plan) -> None:
    """Experts are one row; weights and bits are those of the claims; errors are energies added up."""
    errors = [
        {
            "module": part.module,
            "squared_error": 1.0 + (part.expert or 0),
            "squared_norm": 100.0,
            "output_error": 0.25 * (part.expert or 0),
            "rtn_output_error": 0.5,
        }
        for claim in plan.claims
        if claim.stored is not None
        for part in claim.role.parts
    ]
    rows = layer_matrices(plan.claims, errors)
    linear = [claim for claim in plan.claims if claim.role.kind == "linear"]
    assert len({(row.layer, row.matrix) for row in rows}) == len(rows)
    assert {row.layer for row in rows} == set(range(LAYERS))
    assert sum(row.parameters for row in rows) == sum(claim.tensor.numel for claim in linear)
    assert sum(row.bits * row.parameters for row in rows) == pytest.approx(
        8 * sum(claim.result_bytes for claim in linear)
    )
    up = next(row for row in rows if (row.layer, row.matrix) == (0, "feed_forward.experts.up_proj"))
    assert up.scheme == "NVFP4A16"
    assert up.relative_error == pytest.approx(
        sum(1.0 + expert for expert in range(EXPERTS)) / (100 * EXPERTS)
    )
    assert up.output_error == pytest.approx(0.25 * sum(range(EXPERTS)) / EXPERTS)
    down = next(row for row in rows if (row.layer, row.matrix) == (1, "feed_forward.experts.down_proj"))
    assert down.scheme == "FP8_DYNAMIC"
    assert 8 < down.bits < 9


def test_what_is_left_in_16_bit_has_no_error(plan: Plan) -> None:
    """And without calibration there is no error of outputs."""
    rows = layer_matrices(plan.claims, [])
    assert all(row.relative_error == 0 and row.output_error is None for row in rows)


@pytest.mark.parametrize(
    "module, found",
    [
        ("model.layers.3.mlp.experts.7.up_proj", (3, "mlp.experts.up_proj")),
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("model.layers.0.feed_forward.experts.", (0, "feed_forward.experts")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_places(module: str, found: tuple[int | None, str]) -> None:
    """Block and matrix."""
    assert place(module) == found


def test_range_of_errors() -> None:
    """With digits enough to tell the largest."""
    assert error_range([0.0051, 0.00912]) == "0.00510 to 0.00912"
    assert error_range([1.5, 2.0]) == "1.50 to 2.00"
    assert error_range([float("nan")]) == "-"
    assert error_range([]) == "-"


@pytest.mark.parametrize(
    "name, shape, part",
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), "attention"),
        ("model.layers.0.temporal_attn.out.weight", (8, 8), "attention"),
        ("model.layers.0.linear_attn.out_proj.weight", (8, 8), "states"),
        ("model.layers.0.linear_attn.A_log", (8,), "states"),
        ("model.layers.0.mlp.up_proj.weight", (8, 8), "MLP"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (8, 8), "routed experts"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", (8, 8), "shared experts"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), "routers"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,), "routers"),
        ("model.layers.0.self_attn.q_norm.weight", (8,), "norms"),
        ("model.layers.2.self_attn.q_proj.weight", (8, 8), "prediction layers"),
        ("visual.blocks.0.attn.qkv.weight", (8, 8), "towers"),
        ("something.weight", (8, 8), "other"),
    ],
)
def test_parts_are_told_by_names(name: str, shape: tuple[int, ...], part: str) -> None:
    """Alike for reports and for `inspect`; of a model with two blocks."""
    assert part in PARTS
    assert part_of(name, shape, Role("other"), {"num_hidden_layers": 2}) == part
