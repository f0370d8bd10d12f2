"""The ``context`` section: what goes together, and where faults are blamed."""

from __future__ import annotations

import pytest

from compressor.recipe.load import dump_recipe, load_recipe
from compressor.rope.spec import ContextSpec

from .conftest import Faults, Write

HEAD = "model: {source: x}\nweights: {scheme: nvfp4a16}\n"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{target_length: 8}", "key 'context.method' is missing"),
        ("{method: yarn}", "key 'context.target_length' is missing"),
        ("{method: yearn, target_length: 8}", "must be 'linear', 'ntk', 'dynamic', 'yarn'"),
        ("{method: yarn, target_length: true}", "must be a number, not true"),
        ("{method: yarn, target_length: 8, factor: 0.5}", "greater than or equal to 1"),
        ("{method: yarn, target_length: 8, factors: [1.0]}", "factors go with longrope only"),
        ("{method: longrope, target_length: 8}", "longrope needs its factors"),
        ("{method: longrope, target_length: 8, factors: []}", "must not be empty"),
        ("{method: yarn, target_length: 8, original_length: 8}", "nothing to extend"),
        ("{method: yarn, target_lenght: 8}", "did you mean 'target_length'?"),
    ],
)
def test_faults_have_a_place(faults: Faults, section: str, message: str) -> None:
    """The line of the section."""
    found = faults(f"{HEAD}context: {section}\n")
    assert any(message in what and where.startswith("r.yaml:3:") for where, what in found), found


def test_a_section_is_written_back_equal(write: Write) -> None:
    """Every key given, resolved and read again; nothing where nothing was said."""
    text = "method: longrope, target_length: 64, original_length: 16, factor: 4, factors: [1, 2.5]"
    recipe = load_recipe(str(write(f"{HEAD}context: {{{text}}}\n"))).recipe
    assert load_recipe(str(write(dump_recipe(recipe)))).recipe == recipe
    assert recipe.context is not None
    assert recipe.context.spec() == ContextSpec("longrope", 64, 16, 4.0, (1.0, 2.5))
    assert "\ncontext:" not in dump_recipe(load_recipe(str(write(HEAD))).recipe)
