"""``--set a.b=c``."""

from __future__ import annotations

import pytest

from compressor.recipe.load import load_recipe
from compressor.recipe.model import Recipe
from compressor.schemes import parse_scheme
from compressor.solvers import parse_solver
from tests.recipe.conftest import SMALL, Faults, Write

FULL = SMALL.replace(
    "{scheme: nvfp4a16}",
    "{scheme: nvfp4a16, ignore: [a], rules: [{match: x, scheme: int4}, {match: y, scheme: copy}]}",
)


def _set(write: Write, *overrides: str) -> Recipe:
    return load_recipe(str(write(FULL)), overrides).recipe


def test_values_are_yaml(write: Write) -> None:
    """Numbers, text, maps and lists; later overrides see earlier ones."""
    recipe = _set(
        write,
        "seed=0x10",
        "name=n-1",
        "weights.solver={kind: rtn, search: minmax}",
        "model.source=pkg:a/b.gguf",
        "evaluate.gates=[{metric: perplexity, max_increase: 5%}]",
        "evaluate.gates.0.max_increase=0.5",
    )
    assert (recipe.seed, recipe.name, recipe.model.source) == (16, "n-1", "pkg:a/b.gguf")
    assert recipe.weights.solver == parse_solver({"kind": "rtn", "search": "minmax"})
    assert recipe.evaluate is not None
    assert recipe.evaluate.gates[0].max_increase == 0.5


def test_lists_by_index_and_by_appending(write: Write) -> None:
    """``rules.1.match`` changes an item, ``+ignore`` appends."""
    recipe = _set(write, "weights.rules.1.match=[z, w]", "weights.rules.0.scheme=int8", "weights.+ignore=[b]")
    assert [rule.match for rule in recipe.weights.rules] == [("x",), ("z", "w")]
    assert recipe.weights.rules[0].scheme == parse_scheme("int8")
    assert recipe.weights.ignore == ("a", "b")


def test_a_value_replaces_whole_sections(write: Write) -> None:
    """An override assigns: what it replaces is gone, and an empty value is null."""
    recipe = _set(write, "model.revision=r", "model={source: other}", "evaluate=")
    assert (recipe.model.source, recipe.model.revision, recipe.evaluate) == ("other", None, None)


def test_a_switched_off_section_is_switched_on_by_its_keys(write: Write) -> None:
    """Setting a key below null makes the map."""
    recipe = _set(write, "evaluate=null", "evaluate.tokens=7")
    assert recipe.evaluate is not None
    assert recipe.evaluate.tokens == 7


def test_variables_work_in_overrides(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """``${VAR}`` means the same as in a file."""
    monkeypatch.setenv("SOME_SEED", "5")
    assert _set(write, "seed=${SOME_SEED}").seed == 5


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed", "an override is KEY=VALUE"),
        ("=3", "an override is KEY=VALUE"),
        ("a..b=3", "an override is KEY=VALUE"),
        ("weights.+=3", "an override is KEY=VALUE"),
        ("seed=[", "not valid YAML"),
        ("weights.ignore=[*x]", "put text that begins with * or & in quotes"),
        ("seed=${NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE is not set"),
        ("wieghts.scheme=int4", "unknown key 'wieghts' -> did you mean 'weights'?"),
        ("weights.rules.0.shceme=int4", "unknown key 'weights.rules.0.shceme' -> did you mean 'scheme'?"),
        ("weights.rules.2.match=x", "weights.rules is a list of 2, and '2' is no index into it"),
        ("weights.rules.-1.match=x", "'-1' is no index"),
        (
            "weights.rules.first.match=x",
            "'first' is no index into it -> count from 0, or append with weights.+rules=",
        ),
        ("weights.scheme.group_size=64", "weights.scheme is 'nvfp4a16', not a map with keys"),
        ("weights.scheme=int5", "unknown scheme 'int5'"),
        ("weights.+scheme=[x]", "'+scheme' appends to a list"),
        ("seed=x", "seed: must be a whole number"),
        ("extends=x.yaml", "cannot be overridden"),
        ("publish.repo=x", "section 'publish' is not available"),
        (".".join("a" * 30) + "=1", "nested deeper"),
    ],
)
def test_faults_name_the_override(faults: Faults, text: str, message: str) -> None:
    """Whatever is wrong with an override, the fault's place is the override itself."""
    ((where, found),) = faults(FULL, [text])
    assert where == f"--set {text}"
    assert message in found


@pytest.mark.parametrize("key", ["hf_token", "model.api_key", "a.password.b"])
def test_a_secret_is_refused_and_not_repeated(faults: Faults, key: str) -> None:
    """The message names the key and keeps the value to itself."""
    ((where, found),) = faults(FULL, [f"{key}=hunter2"])
    assert where == f"--set {key}=..."
    assert "looks like a secret" in found
    assert "hunter2" not in where + found
