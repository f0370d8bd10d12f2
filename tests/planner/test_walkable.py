"""What of a model that cannot be walked is said before transformers is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.dialects import DIALECTS
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.planner.walkable import walk_faults
from compressor.recipe.model import WeightsSection
from compressor.spec import TensorHeader
from compressor.stages.base import Claim
from tests.tiny import tiny_llama

from .fakes import LLAMA, llama_headers


def _claims(headers: dict[str, TensorHeader], config: dict[str, Any]) -> list[Claim]:
    section = WeightsSection.model_validate({"scheme": "nvfp4a16"})
    return claim_tensors(headers, config, family_for(config), section, DIALECTS["compressed-tensors"])


def _faults(headers: dict[str, TensorHeader], config: dict[str, Any]) -> list[str]:
    return [fault.what for fault in walk_faults(_claims(headers, config), config, "model")]


def test_whole_models_pass() -> None:
    """With and without a number of blocks in the config, and beside a tower of more blocks."""
    assert _faults(llama_headers(), LLAMA) == []
    assert _faults(llama_headers(), {"model_type": "llama", "tie_word_embeddings": False}) == []
    tower = {
        name: TensorHeader(name, "BF16", (8, 8))
        for name in (f"vision_model.layers.{index}.fc.weight" for index in range(1, 5))
    }
    assert _faults(llama_headers() | tower, LLAMA) == []


@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_without_tensors(layer: int) -> None:
    """Named by its number."""
    left = {name: h for name, h in llama_headers().items() if f"layers.{layer}." not in name}
    assert _faults(left, LLAMA) == [
        f"there are 2 blocks, but block {layer} has no tensors: it cannot be calibrated"
    ]


def test_fewer_blocks_than_the_config_says() -> None:
    """A number that would take forever to count to is found at once."""
    (said,) = _faults(llama_headers(), LLAMA | {"num_hidden_layers": 2**50})
    assert "block 2 has no tensors" in said


def test_no_model_type_and_no_blocks() -> None:
    """Both are said."""
    config = {"num_hidden_layers": 2, "tie_word_embeddings": False}
    assert "model_type" in _faults(llama_headers(), config)[0]
    assert "repeated blocks" in walk_faults([], LLAMA, "model")[0].what


def test_a_plan_says_so_and_imports_no_torch(tmp_path: Path) -> None:
    """Where the recipe walks; one that streams does not mind."""
    folder = tiny_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: {json.dumps(str(folder))}}}\nweights: {{scheme: nvfp4a16, solver: gptq}}\n"
        "evaluate: null\n"
    )
    code = (
        "import sys, compressor\n"
        f"for solver in ('rtn', 'gptq'):\n    try:\n        compressor.plan({str(recipe)!r}, "
        "overrides=[f'weights.solver={solver}'])\n    except compressor.errors.UserError as error:\n"
        "        print(solver, error)\nprint('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, torch_is_there = done.stdout.strip().splitlines()[0], done.stdout.strip().splitlines()[-1]
    assert said.startswith("gptq")
    assert "block 2 has no tensors" in said
    assert torch_is_there == "False"
