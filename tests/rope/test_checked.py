"""Faults of configs as they are found in checkpoints; most of these transformers only warns of, or loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compressor.cli.main import cli
from compressor.rope.checked import check_positions
from compressor.rope.positions import read_positions
from compressor.rope.refusals import ENGINES, method_refusal
from compressor.rope.scaled import scaled_config
from tests.rope.test_refusals import LLAMA31, YARN
from tests.rope.test_scaled import ALL, FAMILIES, LLAMA, spec_of
from tests.tiny import tiny_llama

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
    "short_factor": [2.0] * 32,
    "long_factor": [2.0] * 32,
}


def _with(parameters: dict[str, Any], length: int = 32768, **more: Any) -> dict[str, Any]:
    return (
        LLAMA | {"rope_theta": 1e6, "max_position_embeddings": length, "rope_parameters": parameters} | more
    )


def _but(parameters: dict[str, Any], *keys: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in keys} | more


@pytest.mark.parametrize(
    ("config", "severity", "told"),
    [
        (_with(_but(YARN, "original_max_position_embeddings")), "error", "silently takes max_position"),
        (_with(_but(LONG, "original_max_position_embeddings")), "error", "silently takes max_position"),
        (_with(_but(YARN, "factor")), "error", "yarn without factor"),
        (_with(YARN | {"factor": None}), "error", "factor is null"),
        (_with(YARN | {"beta_fast": None}), "error", "beta_fast is null"),
        (_with(YARN | {"beta_slow": "1"}), "error", "beta_slow is '1', not a number"),
        (_with(YARN | {"truncate": 0}), "error", "truncate is 0, neither"),
        (_with(YARN | {"factor": 0.5}), "error", "not a number of at least 1"),
        (_with(YARN | {"factor": "4"}), "error", "not a number of at least 1"),
        (_with(YARN, 40000), "error", "vLLM has no positions beyond"),
        (_with(YARN, 20000), "warning", "is not max_position_embeddings"),
        (_with(YARN | {"type": "linear"}), "error", "vLLM refuses"),
        (_with({"rope_type": "linear", "factor": 4}), "error", "write 4.0"),
        (_with({"rope_type": "ntk", "factor": 4.0}), "error", "none that engines know"),
        (_with({"rope_type": "dynamic", "factor": 4.0}), "error", "does not change frequencies"),
        (_with(LONG | {"long_factor": [2.0]}), "error", "one factor: engines use it for all 32"),
        (_with(LONG | {"long_factor": [2.0] * 31}), "error", "31 factors, the model 32"),
        (_with(LONG | {"short_factor": [1.0, "2"] * 16}), "error", "no list of positive numbers"),
        (_with(LONG | {"short_factor": [1.0] * 32}), "warning", "keeps keys of the short ones"),
        (_with(_but(LONG, "long_factor")), "error", "longrope without long_factor"),
        (LLAMA31 | {"max_position_embeddings": 8192}, "warning", "not below max_position_embeddings"),
        (_with(YARN, rope_scaling={"rope_type": "linear", "factor": 2.0}), "error", "which is legacy"),
        (
            _with(LLAMA31["rope_scaling"] | {"high_freq_factor": 1.0}),
            "error",
            "is not above low_freq_factor",
        ),
        (_with(YARN | {"mrope_section": [8, 12, 12]}), "error", "four times the original length"),
        (_with(YARN | {"rope_theta": None}), "error", "rope_theta is None"),
    ],
)
def test_faults(config: dict[str, Any], severity: str, told: str) -> None:
    """Each alone, by its severity."""
    found = [finding for finding in check_positions(config) if told in finding.what]
    assert [finding.severity for finding in found] == [severity], check_positions(config)


def test_good_ones() -> None:
    """Published configs as they are; whatever is written here; models without positions."""
    assert check_positions(LLAMA) == check_positions(LLAMA31) == check_positions(_with(YARN)) == ()
    assert (
        check_positions(_with(LONG)) == check_positions({"model_type": "mamba"}) == check_positions({}) == ()
    )
    for config in FAMILIES.values():
        assert check_positions(config) == ()
        for method in ALL:
            if not method_refusal(read_positions(config), method, ENGINES):
                result = scaled_config(config, spec_of(config, method)).config
                if (method, config["model_type"]) not in {("longrope", "phi3"), ("longrope", "phimoe")}:
                    assert check_positions(result) == (), (config["model_type"], method)


def test_inspect_tells(tmp_path: Path) -> None:
    """Beside the tensors, as text and as JSON."""
    folder = tiny_llama(tmp_path / "model")
    clean = CliRunner().invoke(cli, ["inspect", str(folder), "--json"])
    assert json.loads(clean.stdout)["positions"] == []
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2}
    (folder / "config.json").write_text(json.dumps(config))
    told = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert told.exit_code == 0
    assert "error: positions: factor is the integer 2: vLLM fails, write 2.0" in told.stdout
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(folder), "--json"]).stdout)["positions"]
    assert [finding["severity"] for finding in found] == ["error"]


def test_plan_warns(tmp_path: Path) -> None:
    """Of the source's faults, before hours are spent on it."""
    folder = tiny_llama(tmp_path / "model", hidden=128, intermediate=128)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{source: {folder}}}\nweights: {{scheme: fp8_dynamic}}\nevaluate: null\n")
    told = CliRunner().invoke(cli, ["plan", str(recipe), "--json"])
    assert told.exit_code == 0, told.output
    warnings = json.loads(told.stdout)["warnings"]
    assert "config.json of the source: factor is the integer 2: vLLM fails, write 2.0" in warnings
