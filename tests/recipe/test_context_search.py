"""The ``context.search`` section: what goes together, and what it says when nothing is said."""

from __future__ import annotations

import pytest

from compressor.recipe.context_search import SearchSection
from compressor.recipe.load import dump_recipe, load_recipe
from compressor.rope.search_spec import SearchSpec

from .conftest import Faults, Write

HEAD = "model: {source: x}\nweights: {scheme: nvfp4a16}\n"
LONGROPE = "method: longrope, target_length: 64"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{method: yarn, target_length: 8, search: {}}", "a search goes with longrope only"),
        (f"{{{LONGROPE}, factors: [1.0], search: {{}}}}", "there is nothing to search"),
        (f"{{{LONGROPE}, search: {{objective: ppl}}}}", "must be 'perplexity' or 'needle'"),
        (f"{{{LONGROPE}, search: {{population: 1}}}}", "greater than or equal to 2"),
        (f"{{{LONGROPE}, search: {{generations: true}}}}", "must be a number, not true"),
        (f"{{{LONGROPE}, search: {{needles: 9}}}}", "less than or equal to 8"),
        (f"{{{LONGROPE}, search: {{short_slack: -0.1}}}}", "greater than or equal to 0"),
        (f"{{{LONGROPE}, search: {{populaton: 8}}}}", "did you mean 'population'?"),
    ],
)
def test_faults_have_a_place(faults: Faults, section: str, message: str) -> None:
    """The line of the section."""
    found = faults(f"{HEAD}context: {section}\n")
    assert any(message in what and where.startswith("r.yaml:3:") for where, what in found), found


def test_a_section_is_written_back_equal(write: Write) -> None:
    """Every key given, resolved and read again."""
    told = (
        "documents: a.txt, held_out: b.txt, objective: needle, population: 4, generations: 2, tokens: 32, "
        "search_documents: 1, accept_documents: 2, needles: 2, short_slack: 0.5, seed: 3"
    )
    recipe = load_recipe(str(write(f"{HEAD}context: {{{LONGROPE}, search: {{{told}}}}}\n"))).recipe
    assert load_recipe(str(write(dump_recipe(recipe)))).recipe == recipe
    assert recipe.context is not None
    assert recipe.context.search is not None
    assert set(recipe.context.search.model_dump()) == set(SearchSection.model_fields)


def test_the_section_and_what_stages_are_told_agree() -> None:
    """The same defaults under the same names."""
    spec = SearchSpec.__dataclass_fields__
    for name, field in SearchSection.model_fields.items():
        if name not in ("documents", "seed"):
            assert spec[name].default == field.default, name
