"""Frequencies against the tables that vLLM's own classes made (scripts/make_rope_golden.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.rope import methods

RECORDED = json.loads(Path(__file__).with_name("golden_vllm.json").read_text())
CASES: list[dict[str, Any]] = RECORDED["cases"]
# fp32 frequencies lose 1e-7 of themselves in each of a few steps, cosines of 1 and more the same absolutely.
FP32 = 5e-7


def _name(case: dict[str, Any]) -> str:
    told = case["parameters"]
    sizes = f"{case['head']}-{told['partial_rotary_factor']}-{told['rope_theta']:g}-{case['length']}"
    return f"{told['rope_type']}-{sizes}" + ("-knobs" if {"beta_fast", "mscale"} & told.keys() else "")


def test_all_of_them() -> None:
    """Every method that vLLM serves, of the version that the rest is written for."""
    assert RECORDED["vllm"].startswith("0.32.")
    kinds = {case["parameters"]["rope_type"] for case in CASES}
    assert kinds == {"default", "linear", "yarn", "deepseek_yarn", "llama3", "longrope"}


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_tables(case: dict[str, Any]) -> None:
    """As many rows as the config says; the first and the last position are turned as ours."""
    told, length = dict(case["parameters"]), case["length"]
    # vLLM names YaRN so where it has latent attention (models/deepseek_v2.py); configs do not.
    told["rope_type"] = told["rope_type"].removeprefix("deepseek_")
    dims = int(case["head"] * told["partial_rotary_factor"])
    reached = int(length * told["factor"]) if told["rope_type"] == "linear" else length
    assert case["rows"] == reached
    found = methods.of_parameters(told, dims, length, reached)
    inverse = torch.tensor(found.inverse, dtype=torch.float64)
    for place, row in ((1, case["first"]), (reached - 1, case["last"])):
        angle = place * inverse
        mine = torch.cat((angle.cos(), angle.sin())) * found.multiplier
        # An angle of many radians carries the error of its frequency as often.
        slack = FP32 * (2 + torch.cat((angle, angle)))
        error = (mine - torch.tensor(row, dtype=torch.float64)).abs()
        assert bool((error < slack).all()), (place, float((error / slack).max()))
    # Position 1 again, without the absolute error of cosines near 1: the slowest pairs to their last digits.
    cos, sin = torch.tensor(case["first"], dtype=torch.float64).chunk(2)
    torch.testing.assert_close(torch.atan2(sin, cos), inverse, rtol=FP32 * 4, atol=0)
    assert float(torch.hypot(cos, sin).mean()) == pytest.approx(found.multiplier, rel=FP32)
