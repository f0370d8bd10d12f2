"""Resolved recipes load again to equal ones; mangled recipes never do worse than a RecipeError."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compressor.data import shipped_root
from compressor.recipe.calibration import CalibrationSection, DatasetSection
from compressor.recipe.evaluate import (
    EvalTask,
    EvaluateSection,
    Gate,
    GenerationSection,
    SpeedSection,
)
from compressor.recipe.faults import RecipeFaults
from compressor.recipe.load import dump_recipe, load_recipe, shipped_recipes
from compressor.recipe.model import (
    ExportSection,
    ModelSection,
    Recipe,
    WeightRule,
    WeightsSection,
    WorkspaceSection,
)
from compressor.recipe.patterns import compile_pattern
from compressor.schemes import known_schemes, parse_scheme
from compressor.solvers import parse_solver
from tests.recipe.conftest import Write

TRICKY = st.sampled_from(
    ["on", "no", "~", "null", "true", "0o17", "1e3", "1_0", "12:30", ".5", "=", "<<", "- a", "a: b", "a #c",
     "#", "'", '"', "${X}", "$$", "$", "${X:-y}", "re:.*_proj$", "*a", "&a", "!a", "%a", "@a", "`a", "{a}",
     "[a]", "a\nb", "\n", " a ", "a\tb", "é", "😀", "\x85", "\u2028", "\ufeffx", "---", "...", "? a", "| a",
     "> a", "2024-01-01"]
)  # fmt: skip
TEXTS = TRICKY | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=[chr(code) for code in (*range(32), 127)]),
    min_size=1,
    max_size=20,
)
SLUGS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
COUNTS = st.integers(1, 10**12)
SCHEMES = st.sampled_from(sorted(known_schemes())).map(parse_scheme)
SOLVERS = st.sampled_from(["full", "minmax"]).map(
    lambda search: parse_solver({"kind": "rtn", "search": search})
)


def _is_pattern(text: str) -> bool:
    try:
        compile_pattern(text)
    except ValueError:
        return False
    return True


PATTERNS = TEXTS.filter(_is_pattern)


@st.composite
def _rules(draw: st.DrawFn) -> WeightRule:
    scheme = draw(SCHEMES | st.just("copy"))
    solver = None if scheme == "copy" else draw(st.none() | SOLVERS)
    return WeightRule(
        match=tuple(draw(st.lists(PATTERNS, min_size=1, max_size=3))), scheme=scheme, solver=solver
    )


@st.composite
def _evaluations(draw: st.DrawFn) -> EvaluateSection:
    names = draw(st.lists(SLUGS, max_size=3, unique=True))
    metrics = st.sampled_from(["perplexity", "kl", *(f"task:{name}" for name in names)])
    sure = st.none() | st.floats(0.5, 0.999)
    gates = st.builds(Gate, metric=metrics, max_increase=st.floats(0, 1e300), confidence=sure) | st.builds(
        Gate,
        metric=st.just("perplexity"),
        min_recovery=st.floats(0, 1),
        confidence=st.just(0.95),
        uncertain=st.sampled_from([None, "warn", "fail"]),
    )
    return EvaluateSection(
        text=draw(TEXTS),
        tokens=draw(COUNTS.filter(lambda count: count > 1)),
        context=draw(st.integers(2, 2**24)),
        tasks=tuple(EvalTask(name=name, limit=draw(st.none() | COUNTS)) for name in names),
        gates=tuple(draw(st.lists(gates, max_size=3))),
        seeds=draw(st.none() | st.just((3, 0))),
        generation=draw(st.none() | st.builds(GenerationSection, prompts=st.integers(1, 10_000))),
        speed=draw(st.none() | st.builds(SpeedSection, runs=st.integers(1, 1000))),
    )


NUMBERS = {"weight": st.floats(1e-9, 1e6), "template": st.sampled_from([None, "plain", "chat"])}
FILES = st.builds(DatasetSection, path=TEXTS, field=st.none() | TEXTS, **NUMBERS)
HUB = st.builds(
    DatasetSection, hub=TEXTS, subset=st.none() | TEXTS, revision=st.just("0" * 40), split=TEXTS, **NUMBERS
)
CALIBRATIONS = st.builds(
    CalibrationSection,
    mixture=st.none() | SLUGS,
    datasets=st.lists(FILES | HUB, min_size=1, max_size=3).map(tuple),
    num_samples=st.none() | st.integers(1, 1_000_000),
    sequence_length=st.none() | st.integers(2, 2**20),
    seed=st.none() | st.integers(0, 2**32 - 1),
) | st.builds(CalibrationSection, mixture=st.none() | SLUGS)


BOUNDS = st.none() | st.integers(1, 2**63 - 1)
RECIPES = st.builds(
    Recipe,
    schema_version=st.just(1),
    name=SLUGS,
    seed=st.integers(0, 2**32 - 1),
    model=st.builds(
        ModelSection,
        source=TEXTS.map(lambda text: f"{text}.gguf"),
        revision=st.none() | st.sampled_from(["main", "1e10", "0123456", "0" * 40, "refs/pr/1"]),
        sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
        headers=st.none() | TEXTS,
        **{"from": st.sampled_from([None, "dequantize", "keep"])},
    ),
    weights=st.builds(
        WeightsSection,
        scheme=SCHEMES,
        solver=SOLVERS,
        ignore=st.lists(PATTERNS, max_size=3).map(tuple),
        rules=st.lists(_rules(), max_size=3).map(tuple),
    ),
    calibration=st.none() | CALIBRATIONS,
    evaluate=st.none() | _evaluations(),
    export=st.builds(ExportSection, max_shard_bytes=st.integers(1, 2**63 - 1)),
    workspace=st.none() | st.builds(WorkspaceSection, max_bytes=BOUNDS, max_memory_bytes=BOUNDS),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(RECIPES)
def test_a_dumped_recipe_loads_to_an_equal_one(recipe: Recipe) -> None:
    """Whatever its texts and numbers, a recipe survives being written and read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "other-name.yaml")
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        again = load_recipe(str(path)).recipe
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_the_dump_is_resolved(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parents, variables, overrides and defaults are all written out; nothing else is needed to read it."""
    monkeypatch.setenv("SOME_REVISION", "abc")
    write("schema_version: 1\nseed: 4\n", "base.yaml")
    text = "extends: base.yaml\nmodel: {source: a/b, revision: '${SOME_REVISION}'}\nweights: {scheme: int8}\n"
    dumped = dump_recipe(load_recipe(str(write(text, "mine.yaml")), ["evaluate.tokens=9"]).recipe)
    for line in ("name: mine", "seed: 4", "revision: abc", "tokens: 9", "context: 1024", "search: full"):
        assert line in dumped
    assert "extends" not in dumped
    assert "$" not in dumped


def test_recipes_cannot_be_changed(write: Write) -> None:
    """Recipes are frozen all the way down, lists included."""
    recipe = load_recipe("recipes/smollm2-nvfp4.yaml").recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.weights.ignore = ()  # type: ignore[misc]
    assert isinstance(recipe.weights.rules, tuple)
    assert hash(recipe.export) == hash(recipe.export)


LONG = """\
schema_version: 1
name: ${NAME:-long}
model: {source: "pkg:a/b.gguf", sha256: null}
weights:
  scheme: {kind: int4, group_size: 64, symmetric: true}
  solver: {kind: rtn, search: minmax}
  +ignore: ["*.router", re:.*mlp]
  rules:
  - {match: [a, 're:b+'], scheme: copy}
  - {match: lm_head, scheme: fp8_dynamic, solver: rtn}
evaluate:
  tasks: [piqa, {name: other, limit: 5}]
  gates: [{metric: perplexity, max_increase: 35%}, {metric: task:piqa, max_increase: 0.02}]
export: {max_shard_bytes: 2GB}
"""
BASES = [LONG] + [(shipped_root() / path).read_text(encoding="utf-8") for path, _ in shipped_recipes()]
SNIPPETS = st.sampled_from(
    ["\n", " ", "  ", ":", ": ", "- ", "{", "}", "[", "]", "'", '"', "*", "&a ", "*a", "!x ", "#", "|", ">",
     "\t", "?", "null", "~", "[]", "{}", "-1", "1e999", ".nan", "${X}", "${", "$$", "+", "extends: r.yaml\n",
     "extends: 3\n", "kind: ", "re:(", "re:(a+)+", "copy", "<<: ", "\x00", "\ud7ff", "\x85", "---\n",
     "%YAML 1.1\n", "0" * 400, "token: x\n", "rtn", "weights", "seed: 1\n", "\\", "🙂", "é"]
)  # fmt: skip
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "swap", "repeat"]), st.floats(0, 1), st.integers(1, 40), SNIPPETS
    ),
    min_size=1,
    max_size=6,
)


def _mutated(text: str, mutations: list[tuple[str, float, int, str]]) -> str:
    for action, place, length, snippet in mutations:
        start = int(place * len(text))
        end = min(start + length, len(text))
        if action == "insert":
            text = text[:start] + snippet + text[start:]
        elif action == "delete":
            text = text[:start] + text[end:]
        elif action == "swap":
            text = text[:start] + snippet + text[end:]
        else:
            text = text[:end] + text[start:end] + text[end:]
    return text


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.sampled_from(BASES),
    MUTATIONS,
    st.lists(st.sampled_from(["seed=1", "weights.rules.0.match=x"]), max_size=1),
)
def test_mangled_text_gives_a_recipe_or_a_recipe_error(
    base: str, mutations: list[tuple[str, float, int, str]], overrides: list[str]
) -> None:
    """No text leads to any other exception, every fault has a place, and what loads can be dumped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "r.yaml")
        path.write_text(_mutated(base, mutations), encoding="utf-8")
        outcome = _load(str(path), overrides)
        if isinstance(outcome, RecipeFaults):
            assert all(fault.where and fault.what for fault in outcome.faults)
        else:
            again = Path(folder, "again.yaml")
            again.write_text(dump_recipe(outcome), encoding="utf-8")
            assert _load(str(again), []) == outcome


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="weights.rules0+=[]{}:'* $\n", max_size=40))
def test_mangled_overrides_give_a_recipe_or_a_recipe_error(text: str) -> None:
    """The same for overrides."""
    outcome = _load("recipes/smollm2-int4.yaml", [text])
    if isinstance(outcome, RecipeFaults):
        assert all(fault.where.startswith("--set ") for fault in outcome.faults)


def _load(path: str, overrides: list[str]) -> Recipe | RecipeFaults:
    try:
        return load_recipe(path, overrides).recipe
    except RecipeFaults as faults:
        return faults
