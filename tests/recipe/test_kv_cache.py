"""The ``kv_cache`` section: what goes together, and where faults are blamed."""

from __future__ import annotations

import pytest

from compressor.recipe.load import dump_recipe, load_recipe

HEAD = "model: {source: x}\nweights: {scheme: nvfp4a16}\n"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{format: turboquant_4bit}", "did you mean 'turboquant_4bit_nc'?"),
        ("{format: auto}", "auto needs a budget"),
        ("{format: fp8, budget: {bits: 4}}", "has no effect with format fp8"),
        ("{budget: {}}", "none is given"),
        ("{budget: {bits: 4, gib: 1, context: 8}}", "not bits and gib"),
        ("{budget: {gib: 1}}", "gib needs a context"),
        ("{budget: {bits: 4, users: 8}}", "users goes with gib only"),
        ("{budget: {bits: 17}}", "less than or equal to 16"),
        ("{format: fp8, sink_tokens: 4}", "keeps no tokens in 16 bit"),
        ("{format: fp8, fold: true}", "fold"),
        ("{fromat: fp8}", "did you mean 'format'?"),
    ],
)
def test_faults_have_a_place(faults, section, message):
    """The line of the section."""
    found = faults(f"{HEAD}kv_cache: {section}\n")
    assert any(message in what and where.startswith("r.yaml:3:") for where, what in found), found


def test_a_section_is_written_back_equal(write):
    """Every key given, resolved and read again."""
    text = (
        f"{HEAD}kv_cache: {{format: auto, tier: research, budget: {{gib: 10, context: 131072, users: 8}},"
        " fold: false, calibrate: true, contexts: [8192], users: [4], sink_tokens: 4, recent_tokens: 32}\n"
    )
    recipe = load_recipe(str(write(text))).recipe
    again = load_recipe(str(write(dump_recipe(recipe)))).recipe
    assert again == recipe
    assert recipe.kv_cache is not None
    assert recipe.kv_cache.budget is not None
    assert recipe.kv_cache.budget.users == 8
    counted = load_recipe(str(write(f"{HEAD}kv_cache: {{budget: {{bytes_per_token: 900}}}}\n"))).recipe
    assert counted.kv_cache is not None
    assert counted.kv_cache.budget is not None
    assert counted.kv_cache.budget.bytes_per_token == 900
    assert "kv_cache" not in dump_recipe(load_recipe(str(write(HEAD))).recipe)
