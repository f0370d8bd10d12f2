"""The section ``drafts``: what it may say, and what does not go together."""

from __future__ import annotations

import pytest

from compressor.recipe.load import dump_recipe, load_recipe
from tests.recipe.conftest import SMALL, Faults, Write


@pytest.mark.parametrize(
    "text, trained",
    [
        ("{kind: eagle3}", True),
        ("{kind: native}", False),
        ("{kind: native, train: {}}", True),
        ("{kind: draft_model, model: org/small, revision: main, quantize: true}", False),
        ("{kind: eagle3, tokens: 5, train: {cache: 2GB, vocabulary_size: 8192, patience: null}}", True),
    ],
)
def test_what_it_may_say(write: Write, text: str, trained: bool) -> None:
    """A new head is always trained, layers of the source where asked for, a model never."""
    recipe = load_recipe(str(write(f"{SMALL}drafts: {text}\n"))).recipe
    assert recipe.drafts is not None
    assert (recipe.drafts.training is not None) == trained
    again = load_recipe(str(write(dump_recipe(recipe), "again.yaml"))).recipe
    assert again.drafts == recipe.drafts


def test_left_out_where_nothing_is_said(write: Write) -> None:
    """Recipes from before the section stay the same bytes."""
    assert "drafts" not in dump_recipe(load_recipe(str(write(SMALL))).recipe)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "key 'drafts.kind' is missing"),
        ("{kind: medusa}", "drafts.kind: must be 'native', 'eagle3' or 'draft_model', not 'medusa'"),
        ("{kind: eagle3, tokens: 0}", "drafts.tokens: must be greater than or equal to 1"),
        ("{kind: eagle3, model: org/small}", "drafts.model: has no effect with `kind: eagle3`"),
        ("{kind: eagle3, quantize: false}", "drafts.quantize: has no effect with `kind: eagle3`"),
        ("{kind: draft_model}", "drafts: `kind: draft_model` needs `model`"),
        ("{kind: draft_model, model: a/b, train: {}}", "drafts.train: a draft model is taken as it is"),
        ("{kind: native, train: {vocabulary_size: 64}}", "their vocabulary is the model's"),
        ("{kind: eagle3, train: {data: text, temperature: 1}}", "has no effect with `data: text`"),
        ("{kind: eagle3, train: {sequence_length: 64, new_tokens: 64}}", "no room for 64 and a prompt"),
        ("{kind: eagle3, train: {temperature: 0.001}}", "must be 0, or from 0.01 to 2"),
        ("{kind: eagle3, train: {cache: lots}}", "'lots' is no size"),
    ],
)
def test_what_does_not_go_together(faults: Faults, text: str, message: str) -> None:
    """Each fault says which key, and why."""
    found = [what for _, what in faults(f"{SMALL}drafts: {text}\n")]
    assert any(message in what for what in found), found
