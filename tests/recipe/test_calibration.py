"""The `calibration` section, mixtures, and what becomes of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.calibration.spec import DEFAULT_LENGTH, DEFAULT_SAMPLES, CalibrationSpec
from compressor.data import shipped_root
from compressor.errors import PlanError
from compressor.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from compressor.recipe.mixtures import calibration_spec, seen_from
from tests.recipe.conftest import SMALL, Faults, Write

SHIPPED = [str(shipped_root() / "calibration" / f"{name}.jsonl") for name in ("prose", "code", "chat")]
COMMIT = "0123456789" * 4


def _spec(loaded: LoadedRecipe, longest: int | None = None) -> CalibrationSpec:
    return calibration_spec(loaded.recipe, loaded.folder, longest)


def _load(write: Write, section: str, *overrides: str) -> LoadedRecipe:
    return load_recipe(str(write(f"{SMALL}{section}\n")), overrides)


@pytest.mark.parametrize(
    "section", ["", "calibration: {}", "calibration: null", "calibration: {mixture: default}"]
)
def test_the_shipped_mixture_is_the_default(write: Write, section: str) -> None:
    """Three texts in equal parts; rows no longer than the model allows."""
    loaded = _load(write, section, "seed=7")
    spec = _spec(loaded)
    assert [str(dataset.path) for dataset in spec.datasets] == SHIPPED
    assert {dataset.weight for dataset in spec.datasets} == {1.0}
    assert (spec.num_samples, spec.sequence_length, spec.seed) == (DEFAULT_SAMPLES, DEFAULT_LENGTH, 7)
    assert _spec(loaded, 512).sequence_length == 512
    assert _spec(loaded, 10**6).sequence_length == DEFAULT_LENGTH


def test_what_was_not_said_is_not_written(write: Write) -> None:
    """The resolved recipe of who says nothing has no such key, so that its bytes are as before it existed."""
    assert "calibration:" not in dump_recipe(_load(write, "").recipe)
    assert "calibration: {}\n" in dump_recipe(_load(write, "calibration: {}").recipe)
    text = dump_recipe(_load(write, "calibration: {datasets: [{path: a}], seed: 0}").recipe)
    assert "calibration:\n  datasets:\n  - path: a\n    weight: 1.0\n  seed: 0\nevaluate:" in text


@pytest.mark.parametrize("section", ["", "calibration: {mixture: default, num_samples: 9}"])
def test_set_names_other_datasets(write: Write, section: str) -> None:
    """`--set calibration.datasets=...` works on any recipe; a mixture's other keys stay."""
    write("some text", "my.txt")
    loaded = _load(write, section, "calibration.datasets=[{path: my.txt}]")
    spec = _spec(loaded)
    (dataset,) = spec.datasets
    assert dataset.path == Path("my.txt").resolve()
    assert dataset.name == "my.txt"
    assert spec.num_samples == (9 if section else DEFAULT_SAMPLES)


def test_paths_are_looked_for_as_other_texts_are(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, beside the recipe, among the shipped files."""
    write("here", "here.txt")
    write("beside", "sub/beside.txt")
    listed = "{path: here.txt}, {path: beside.txt}, {path: calibration/prose.jsonl}"
    path = write(f"{SMALL}calibration: {{datasets: [{listed}]}}\n", "sub/r.yaml")
    spec = _spec(load_recipe(str(path)))
    found = [Path("here.txt").resolve(), path.parent / "beside.txt", Path(SHIPPED[0])]
    assert [dataset.path for dataset in spec.datasets] == found


MIXTURE = f"""\
datasets:
  - {{path: mine.txt, weight: 3, template: chat}}
  - {{path: calibration/code.jsonl, field: text}}
  - {{hub: org/name, subset: en, revision: {COMMIT}, field: body}}
num_samples: 5
sequence_length: 2048
seed: 11
"""


def test_a_mixture_of_ones_own(write: Write) -> None:
    """Found beside the recipe, its texts beside it; the recipe overrides its numbers."""
    write(MIXTURE, "sub/calibration/own.yaml")
    write("mine", "sub/calibration/mine.txt")
    write("another", "mine.txt")
    path = write(f"{SMALL}calibration: {{mixture: own, sequence_length: 64, seed: 0}}\n", "sub/r.yaml")
    spec = _spec(load_recipe(str(path)), 1024)
    mine, code, hub = spec.datasets
    assert mine.path == path.parent / "calibration" / "mine.txt"
    assert (mine.weight, mine.template) == (3.0, "chat")
    assert str(code.path) == SHIPPED[1]
    assert (hub.name, hub.hub, hub.subset, hub.revision) == ("org/name/en", "org/name", "en", COMMIT)
    assert (hub.split, hub.field, hub.path, hub.sha256) == ("train", "body", None, None)
    assert (spec.num_samples, spec.sequence_length, spec.seed) == (5, 64, 0)
    assert spec.mixture == path.parent / "calibration" / "own.yaml"


def test_an_exported_recipe_calibrates_on_the_same(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, and by the same stage key: own mixtures are spelled out, relative paths moved."""
    write(MIXTURE, "sub/calibration/own.yaml")
    text = write("mine", "sub/calibration/mine.txt")
    sections = [
        "",
        "calibration: {num_samples: 3}",
        "calibration: {mixture: own, sequence_length: 64}",
        "calibration: {datasets: [{path: calibration/mine.txt}], seed: 4}",
        f"calibration: {{datasets: [{{path: {text}}}, {{path: calibration/chat.jsonl, weight: 2}}]}}",
    ]
    out = text.parents[2] / "out" / "result"
    out.mkdir(parents=True)
    for section in sections:
        loaded = load_recipe(str(write(f"{SMALL}{section}\n", "sub/r.yaml")))
        spec = _spec(loaded)
        moved = loaded.recipe.model_copy(
            update={"calibration": seen_from(out, loaded.recipe.calibration, spec)}
        )
        (out / "recipe.yaml").write_text(dump_recipe(moved))
        again = load_recipe(str(out / "recipe.yaml"))
        assert again.recipe == moved
        assert _spec(again).content == spec.content
        if "{num" in section or not section:
            assert moved == loaded.recipe
        assert (str(text) in dump_recipe(moved)) == (str(text) in section)


@pytest.mark.parametrize("given", ["", ", images: {path: calibration/p.jsonl, num_samples: 1}"])
def test_an_exported_recipe_keeps_the_images(given: str, write: Write) -> None:
    """Those of its own, or of the mixture that is spelled out in it."""
    pictures = write('{"messages": [{"role": "user", "content": "a"}]}\n' * 2, "sub/calibration/p.jsonl")
    write(f"{MIXTURE}images: {{path: p.jsonl}}\n", "sub/calibration/own.yaml")
    write("mine", "sub/calibration/mine.txt")
    out = pictures.parents[2] / "out"
    out.mkdir()
    loaded = load_recipe(str(write(f"{SMALL}calibration: {{mixture: own{given}}}\n", "sub/r.yaml")))
    spec = _spec(loaded)
    assert spec.images is not None
    assert spec.images.num_samples == (1 if given else 2)
    moved = loaded.recipe.model_copy(update={"calibration": seen_from(out, loaded.recipe.calibration, spec)})
    (out / "recipe.yaml").write_text(dump_recipe(moved))
    assert _spec(load_recipe(str(out / "recipe.yaml"))).content == spec.content


@pytest.mark.parametrize(
    "section, where, message",
    [
        ("{mixtures: a}", "4:15", "did you mean 'mixture'?"),
        ("{datasets: []}", "4:15", "datasets: must not be empty"),
        ("{datasets: [{}]}", "4:26", "either `path` or `hub`"),
        ("{datasets: [{path: a, hub: b, revision: c}]}", "4:26", "either `path` or `hub`"),
        ("{datasets: [{hub: a/b}]}", "4:32", "needs its `revision`: pin a commit"),
        ("{datasets: [{path: a, split: test}]}", "4:43", "no effect on a file"),
        ("{datasets: [{path: a, wieght: 1}]}", "4:36", "did you mean 'weight'?"),
        ("{datasets: [{path: a, weight: 0}]}", "4:44", "must be greater than 0"),
        ("{datasets: [{path: a, weight: true}]}", "4:44", "must be a number, not true"),
        ("{datasets: [{path: a, template: chatml}]}", "4:46", "must be 'plain' or 'chat'"),
        ("{num_samples: 0}", "4:28", "must be greater than or equal to 1"),
        ("{num_samples: 1000001}", "4:28", "must be less than or equal to 1000000"),
        ("{sequence_length: 1048577}", "4:32", "must be less than or equal to 1048576"),
        ("{sequence_length: 1}", "4:32", "must be greater than or equal to 2"),
        ("{mixture: ../a}", "4:24", "must be up to 100 letters"),
        ("[a]", "4:1", "must be a map of keys"),
    ],
)
def test_faults_name_their_place(faults: Faults, section: str, where: str, message: str) -> None:
    """As those of every other section."""
    place, found = faults(f"{SMALL}calibration: {section}\n")[0]
    assert message in found
    assert place == f"r.yaml:{where}"


def test_missing_and_unreadable_texts_are_reported_together(write: Write) -> None:
    """Each at its key, from which the plan knows the line."""
    write("", "empty.txt")
    Path("latin.txt").write_bytes(b"caf\xe9")
    listed = ", ".join(f"{{path: {name}.txt}}" for name in ("none", "empty", "latin"))
    with pytest.raises(PlanError) as caught:
        _spec(_load(write, f"calibration: {{datasets: [{listed}]}}"))
    found = [(fault.where, fault.what) for fault in caught.value.faults]
    assert [where for where, _ in found] == [f"calibration.datasets.{index}" for index in range(3)]
    for (_, what), message in zip(
        found, ("no such calibration text: none.txt", "empty", "byte 3"), strict=True
    ):
        assert message in what


@pytest.mark.parametrize(
    "mixture, message",
    [
        (None, "calibration.mixture: no such mixture: calibration/own.yaml"),
        ("num_samples: 3\n", "own.yaml:1:1: key 'datasets' is missing"),
        ("datasets: [{path: a}]\nmixture: default\n", "own.yaml:2:1: a mixture names no mixture"),
        ("datasets: [{path: a, wait: 1}]\n", "own.yaml:1:22: unknown key 'datasets.0.wait'"),
        ("kv_cache: {}\n", "own.yaml:1:1: unknown key 'kv_cache'"),
        ("datasets: [\n", "own.yaml:2:1: not valid YAML"),
        ("datasets: [{path: none.txt}]\n", "own.yaml: datasets.0: no such calibration text: none.txt"),
    ],
)
def test_a_faulty_mixture_is_named(write: Write, mixture: str | None, message: str) -> None:
    """Its own file and line, not the recipe's."""
    if mixture is not None:
        write(mixture, "calibration/own.yaml")
    with pytest.raises(PlanError) as caught:
        _spec(_load(write, "calibration: {mixture: own}"))
    assert message in str(caught.value)
    assert mixture is not None or "shipped: default" in str(caught.value)
