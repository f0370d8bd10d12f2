"""What a run must never do: replace what is not its own, mix old and new, or find a fault after hours."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import compressor
from compressor.api import run
from compressor.errors import CheckpointError, PlanError, UserError
from compressor.report.manifest import check_manifest
from compressor.workspace import file_sha256
from tests.tiny import tiny_llama

from .cases import content, write_recipe


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small random Llama of this test's own."""
    folder = tmp_path / "model"
    tiny_llama(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, source: Path) -> Path:
    """NVFP4 without an evaluation."""
    return write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}")


def _edit_tensor(source: Path, name: str) -> None:
    shard = source / "model.safetensors"
    tensors = load_file(shard)
    tensors[name] = tensors[name] * 3
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_changed_weight_is_noticed(name: str, tmp_path: Path, source: Path, recipe: Path) -> None:
    """A source retrained in place, same names and shapes, is compressed anew."""
    first = content(run(recipe, output=tmp_path / "out" / "a").output)
    _edit_tensor(source, name)
    assert content(run(recipe, output=tmp_path / "out" / "b").output) != first


def test_changed_template_is_exported(tmp_path: Path, source: Path, recipe: Path) -> None:
    """Side files belong to the source: a new chat template reaches the next export."""
    run(recipe, output=tmp_path / "out" / "a")
    (source / "chat_template.jinja").write_text("{{ 'new' }}")
    result = run(recipe, output=tmp_path / "out" / "b")
    assert (result.output / "chat_template.jinja").read_text() == "{{ 'new' }}"


def test_edit_of_an_export_stays_there(tmp_path: Path, recipe: Path) -> None:
    """Writing into one export changes neither another one nor what the next one gets."""
    first = run(recipe, output=tmp_path / "out" / "a").output
    second = run(recipe, output=tmp_path / "out" / "b").output
    with (first / "config.json").open("r+") as file:
        file.write("edited")
    assert check_manifest(second) == []
    assert check_manifest(run(recipe, output=tmp_path / "out" / "c").output) == []


def test_damaged_export_is_not_taken_for_finished(tmp_path: Path, recipe: Path) -> None:
    """A result that lost a file is not "already there"; it is refused, not overwritten."""
    result = run(recipe, output=tmp_path / "out" / "a").output
    (result / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not empty"):
        run(recipe, output=result)
    assert (result / "config.json").exists()


@pytest.mark.parametrize(
    ("output", "workspace"), [("o", "o"), ("o", "o/ws"), ("ws/o", "ws"), ("model/o", "ws"), ("o", "model/ws")]
)
def test_folders_must_lie_apart(output: str, workspace: str, tmp_path: Path, recipe: Path) -> None:
    """Output, workspace and source within each other are refused before anything is made."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PlanError, match="lie"):
        run(recipe, output=tmp_path / output, workspace=tmp_path / workspace)
    assert sorted(tmp_path.rglob("*")) == before


def test_gate_failure_never_replaces_somebodys_folder(tmp_path: Path, source: Path) -> None:
    """A folder of that name with a file that is not ours is left alone, whatever else it holds."""
    text = tmp_path / "text.txt"
    text.write_text("Some words to measure on. " * 60)
    rest = (
        f"evaluate: {{text: {json.dumps(str(text))}, tokens: 128, context: 64, "
        "gates: [{metric: kl, max_increase: 0.0000001}]}"
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}", rest)
    theirs = tmp_path / "out" / "a.gate-failed"
    theirs.mkdir(parents=True)
    (theirs / "manifest.json").write_text("{}")
    (theirs / "thesis.tex").write_text("do not lose me")
    with pytest.raises(UserError, match="not empty"):
        run(recipe, output=tmp_path / "out" / "a")
    assert (theirs / "thesis.tex").read_text() == "do not lose me"


def test_output_may_be_a_link_to_an_empty_folder(tmp_path: Path, recipe: Path) -> None:
    """The result goes where the link leads."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    result = run(recipe, output=tmp_path / "link", workspace=tmp_path / "ws")
    assert (tmp_path / "real" / "config.json").exists()
    assert (tmp_path / "link").is_symlink()
    assert check_manifest(result.output) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_output_on_another_file_system(tmp_path: Path, recipe: Path) -> None:
    """Shards are copied there, also over what a killed run left; nothing else stays behind."""
    place = Path("/dev/shm") / f"compressor-test-{os.getpid()}"
    place.mkdir()
    try:
        leftover = place / ".a.compress-partial"
        leftover.mkdir()
        (leftover / "half").write_text("")
        result = run(recipe, output=place / "a", workspace=tmp_path / "ws")
        assert [path.name for path in place.iterdir()] == ["a"]
        assert content(result.output) == content(run(recipe, output=tmp_path / "out" / "b").output)
        run(recipe, output=place / "a", workspace=tmp_path / "ws", fresh=True)
        assert [path.name for path in place.iterdir()] == ["a"]
    finally:
        shutil.rmtree(place)


def test_non_finite_copy_is_named(tmp_path: Path, source: Path, recipe: Path) -> None:
    """NaN in a tensor that is only copied stops the run as well."""
    shard = source / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][100, 3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        run(recipe, output=tmp_path / "out" / "a")


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ("{text: FOLDER}", "not a file"),
        ("{text: EMPTY}", "empty"),
        ("{text: BINARY}", "not UTF-8"),
        ("{text: SHORT, context: 4096}", "longer than the model's context"),
    ],
)
def test_unusable_texts_are_found_by_the_plan(evaluate: str, said: str, tmp_path: Path, source: Path) -> None:
    """Nothing is compressed before a bad evaluation text is told."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"ok\n\xff\xfe")
    (tmp_path / "short.txt").write_text("a few words")
    for word, name in (
        ("FOLDER", "folder"),
        ("EMPTY", "empty.txt"),
        ("BINARY", "binary.txt"),
        ("SHORT", "short.txt"),
    ):
        evaluate = evaluate.replace(word, json.dumps(str(tmp_path / name)))
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}", f"evaluate: {evaluate}")
    with pytest.raises(PlanError, match=said):
        compressor.plan(recipe, output=tmp_path / "out" / "a")


def test_short_text_is_told_before_the_weights(tmp_path: Path, source: Path) -> None:
    """Too few tokens for the recipe: known once the text is tokenized, which comes first."""
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    rest = f"evaluate: {{text: {json.dumps(str(text))}, tokens: 100000, context: 64}}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}", rest)
    with pytest.raises(UserError, match="tokens"):
        run(recipe, output=tmp_path / "out" / "a")
    assert not list((tmp_path / "out" / ".compress-workspace").rglob("*.safetensors"))


def test_exported_recipe_runs_from_its_folder(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative sources and texts are rewritten so that the exported recipe finds them."""
    (tmp_path / "text.txt").write_text("Some words to measure on. " * 60)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        Path("model"),
        "{scheme: int8}",
        "evaluate: {text: text.txt, tokens: 128, context: 64}",
    )
    monkeypatch.chdir(tmp_path)
    first = run(recipe, output=tmp_path / "out" / "a").output
    monkeypatch.chdir(first)
    again = run("recipe.yaml", output=tmp_path / "elsewhere" / "b").output
    assert file_sha256(again / "model.safetensors") == file_sha256(first / "model.safetensors")
