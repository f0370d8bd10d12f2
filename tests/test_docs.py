"""Every solver, scheme and calibration key is documented, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from compressor.drafts.spec import Kind
from compressor.kv.formats import FORMATS
from compressor.model.families import BUILTINS
from compressor.recipe.adapters import AdaptersSection
from compressor.recipe.budget import DEFAULT_CANDIDATES, WeightBudgetSection
from compressor.recipe.calibration import CalibrationSection, DatasetSection
from compressor.recipe.context_search import SearchSection
from compressor.recipe.drafts import DraftMeasureSection, DraftsSection, DraftTrainSection
from compressor.recipe.evaluate import EvaluateSection, Gate, GenerationSection, SpeedSection
from compressor.recipe.kv_cache import KvBudgetSection, KvCacheSection
from compressor.recipe.load import load_recipe
from compressor.recipe.model import ModelSection, WorkspaceSection
from compressor.recipe.polish import PolishSection
from compressor.recipe.serve import ServeSection
from compressor.report.measured import Verdict
from compressor.rope.spec import Method
from compressor.schemes import known_schemes
from compressor.solvers import known_solvers
from scripts import compounding_page

ROOT = Path(__file__).parents[1]
# What verify compares has rows of its own.
CALIBRATION = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8").partition("## What verify")[0]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTEXT = (ROOT / "docs" / "context.md").read_text(encoding="utf-8")
DRAFTS = (ROOT / "docs" / "drafts.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
FAMILIES = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def _rows(text: str) -> dict[str, str]:
    """First code word of a table's row -> the row."""
    return {found[1]: found[0] for found in re.finditer(r"^\| `(\w+)` .*$", text, re.MULTILINE)}


@pytest.mark.parametrize("kind", known_solvers())
def test_solvers(kind: str) -> None:
    """A row with every option."""
    row = _rows(CALIBRATION)[kind]
    for option in known_solvers()[kind].model_fields.keys() - {"kind"}:
        assert f"`{option}`" in row, f"option {option} of {kind}"


@pytest.mark.parametrize("kind", known_schemes())
def test_schemes(kind: str) -> None:
    """A row with every option."""
    row = _rows(README)[kind]
    for option in known_schemes()[kind].model_fields.keys() - {"kind"}:
        assert f"`{option}" in row, f"option {option} of {kind}"


@pytest.mark.parametrize("section", [CalibrationSection, DatasetSection, PolishSection])
def test_keys(section: type[BaseModel]) -> None:
    """All of them."""
    for key in section.model_fields:
        assert f"`{key}`" in CALIBRATION, key


@pytest.mark.parametrize("section", [EvaluateSection, Gate, GenerationSection, SpeedSection])
def test_evaluation_keys(section: type[BaseModel]) -> None:
    """All of them, and every verdict."""
    for key in section.model_fields.keys() - {"metric"}:
        assert f"`{key}" in EVALUATION, key
    for verdict in get_args(Verdict):
        assert f"| {verdict} |" in EVALUATION


def test_search_keys() -> None:
    """A row for each."""
    assert SearchSection.model_fields.keys() <= _rows(CONTEXT).keys()


def test_adapters() -> None:
    """A row for each key of the section."""
    assert (
        _rows(CONTEXT.partition("## Training on long documents")[2]).keys()
        == AdaptersSection.model_fields.keys()
    )


def test_compounding() -> None:
    """A row for each key, and the very tables that the script prints."""
    text = (ROOT / "docs" / "compounding.md").read_text(encoding="utf-8")
    assert ServeSection.model_fields.keys() <= _rows(text).keys()
    tables = (
        compounding_page.gpu_table(),
        compounding_page.planned_table(),
        compounding_page.ledger_table(),
        compounding_page.claim_table(),
    )
    for table in tables:
        assert "\n".join(table) in text


def test_families() -> None:
    """A row for each, with the model types that it claims and no others; how sources may be read."""
    rows = _rows(FAMILIES)
    assert rows.keys() == {family.name for family in BUILTINS} | {"generic", "dequantize", "keep"}
    for family in BUILTINS:
        told = rows[family.name].split("|")[2]
        assert tuple(re.findall(r"`(\w+)`", told)) == family.model_types


def test_bounds_and_sources() -> None:
    """The README names what else a recipe may say of its source and of the machine."""
    for key in WorkspaceSection.model_fields:
        assert f"`workspace.{key}`" in README, key
    for key in ("from", "factory"):
        assert key in {field.alias or name for name, field in ModelSection.model_fields.items()}
        assert f"`model.{key}" in README, key


def test_rows_are_of_what_exists() -> None:
    """No solver, scheme or key of before; the README has a row for each solver, too."""
    known = {*known_solvers(), *CalibrationSection.model_fields, *DatasetSection.model_fields}
    assert _rows(CALIBRATION).keys() <= known
    assert _rows(README).keys() == {*known_schemes(), *known_solvers()}


def test_kv_cache() -> None:
    """Every key of the section and every format is named."""
    text = (ROOT / "docs" / "kv-cache.md").read_text(encoding="utf-8")
    for name in [*KvCacheSection.model_fields, *KvBudgetSection.model_fields]:
        assert f"`{name}`" in text, f"kv_cache.{name}"
    named = set(re.findall(r"`(\w[\w.]*)`", text))
    between = {f"turboquant_mse_{bits}bit" for bits in (2, 3)} | {"turboquant_prod_3bit"}
    assert set(FORMATS) - between <= named


def test_context() -> None:
    """A row for every method, and the Python that stands there runs."""
    assert set(get_args(Method)) <= _rows(CONTEXT).keys()
    blocks = re.findall(r"^```python\n(.*?)^```", CONTEXT, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/context.md", "exec"), {})


def test_budgets() -> None:
    """Every key of a budget is named, and what ``auto`` chooses among by default."""
    text = (ROOT / "docs" / "mixed-precision.md").read_text(encoding="utf-8")
    for key in [*WeightBudgetSection.model_fields, "candidates", *DEFAULT_CANDIDATES]:
        assert f"`{key}`" in text, key


@pytest.mark.parametrize("section", [DraftsSection, DraftTrainSection, DraftMeasureSection])
def test_draft_keys(section: type[BaseModel]) -> None:
    """All of them have a row, and every kind is there."""
    rows = _rows(DRAFTS)
    assert section.model_fields.keys() <= rows.keys()
    assert set(get_args(Kind)) <= rows.keys()


def _recipes() -> list[tuple[str, str]]:
    """Every recipe, or part of one, that a page shows."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (page.name, found[1])
        for page in pages
        for found in re.finditer(
            r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    ]


@pytest.mark.parametrize("page, text", _recipes())
def test_recipes_that_are_shown_are_recipes(tmp_path: Path, page: str, text: str) -> None:
    """As they stand, with the sections that every recipe needs beside them."""
    needed = {"schema_version": "1", "model": "{source: org/model}", "weights": "{scheme: nvfp4a16}"}
    heads = [
        f"{key}: {value}" for key, value in needed.items() if not re.search(f"^{key}:", text, re.MULTILINE)
    ]
    recipe = tmp_path / f"{page}.yaml"
    recipe.write_text("\n".join([*heads, text]), encoding="utf-8")
    load_recipe(str(recipe))
