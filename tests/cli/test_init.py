"""``compress init``: files are never replaced unasked; what is printed; sources that cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from compressor.cli.main import cli
from tests.cli.test_main import _heavy_imports, compress
from tests.tiny import tiny_llama


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model in it."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "My Model")
    return tmp_path


def test_writes_what_plan_accepts(here: Path) -> None:
    """Under a name of its own; the next commands are printed."""
    done = CliRunner().invoke(cli, ["init", "My Model"])
    assert done.exit_code == 0, done.output
    path = here / "my-model-w4a16-g64.yaml"
    assert done.stdout.splitlines() == [
        path.name,
        f"next: compress plan {path.name}; compress run {path.name} --smoke; compress run {path.name}",
    ]
    assert CliRunner().invoke(cli, ["plan", path.name]).exit_code == 0


def test_never_replaces_unasked(here: Path) -> None:
    """Neither its own file nor another's, nor what a link leads to; with --force it does."""
    path = here / "recipe.yaml"
    path.write_text("mine")
    done = compress("init", "My Model", "--output", "recipe.yaml", cwd=here)
    assert done.returncode == 2
    assert "recipe.yaml: the file is there already" in done.stderr
    assert path.read_text() == "mine"
    assert CliRunner().invoke(cli, ["init", "My Model", "--output", "recipe.yaml", "--force"]).exit_code == 0
    assert path.read_text().startswith("# My Model: W4A16 g64 for h100-80gb")
    (here / "link.yaml").symlink_to(here / "nowhere.yaml")
    assert compress("init", "My Model", "--output", "link.yaml", cwd=here).returncode == 2
    assert not (here / "nowhere.yaml").exists()


def test_to_stdout(here: Path) -> None:
    """The text alone, and no file."""
    done = CliRunner().invoke(cli, ["init", "My Model", "--output", "-", "--gpu", "b200"])
    assert "scheme: nvfp4\n" in done.stdout
    assert [path.name for path in here.iterdir()] == ["My Model"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-model",), "neither a folder"),
        (("My Model", "--gpu", "abacus"), "no GPU is called 'abacus'"),
        (("My Model", "--revision", "main"), "--revision goes with a Hub id"),
        (("My Model", "--output", "no/such/folder/x.yaml"), "no/such/folder"),
    ],
)
def test_faults(here: Path, arguments: tuple[str, ...], said: str) -> None:
    """One message, exit 2, nothing written."""
    done = compress("init", *arguments, cwd=here)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in here.iterdir()] == ["My Model"]


def test_hub_out_of_reach_with_shipped_headers(tmp_path: Path) -> None:
    """A model whose headers are shipped is planned from them."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    name = "meta-llama/Llama-3.3-70B-Instruct"
    done = compress("init", name, "--output", "-", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert f"source: {name}\n  headers: recipes/configs/llama-3.3-70b\n" in done.stdout


def test_imports_nothing_heavy() -> None:
    """Answers from headers, without torch."""
    assert _heavy_imports("init", "recipes/configs/llama-3.3-70b", "--output", "-") == set()


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    """A file and an empty folder, by `init` and by `inspect`: what it is, and what to name."""
    (tmp_path / "a.txt").write_text("hi")
    (tmp_path / "empty").mkdir()
    for command in ("init", "inspect"):
        told = compress(command, "a.txt", cwd=tmp_path)
        assert told.returncode == 2
        assert "a.txt: a file, and no folder\n  -> name a checkpoint's folder" in told.stderr
        assert "  -> " in compress(command, "empty", cwd=tmp_path).stderr
