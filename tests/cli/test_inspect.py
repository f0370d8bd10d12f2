"""``compress inspect``: narrow terminals, strangers' names, the Hub, JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from compressor.cli.main import cli
from tests.checkpoint.fake_hub import COMMIT, REPO, serve
from tests.cli.test_main import _heavy_imports, compress
from tests.model.compressed import compress_folder
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in NVFP4."""
    plain = tiny_llama(tmp_path_factory.mktemp("cli") / "plain", hidden=128, intermediate=256)
    compress_folder(plain, plain.parent / "packed", "NVFP4A16")
    return plain.parent / "packed"


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the path, which must survive copying."""
    monkeypatch.setenv("COLUMNS", str(columns))
    told = CliRunner().invoke(cli, ["inspect", "recipes/configs/deepseek-v3"])
    assert told.exit_code == 0, told.output
    assert max(map(len, told.output.splitlines()[1:])) <= columns
    assert "routed experts" in told.output
    assert "FP8_BLOCK" in told.output


def test_json_has_all_of_it(packed: Path) -> None:
    """Documented keys, with values that the terminal rounds."""
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(packed), "--json"]).stdout)
    assert {
        "folder",
        "tensors",
        "bytes",
        "kinds",
        "quantization",
        "scaling",
        "positions",
        "files",
    } <= found.keys()
    assert found["method"] == "compressed-tensors"
    assert 4.5 <= found["bits_per_target_weight"] < 4.51
    (attention,) = (row for row in found["rows"] if row["role"] == "attention")
    assert attention["scheme"] == "NVFP4A16"


def test_names_that_act_on_terminals(tmp_path: Path) -> None:
    """Escapes and marks of direction are shown, not sent."""
    folder = tiny_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["\x1b]0;x\x07A"], "model_type": "\x1b[2Jx"}
    config["quantization_config"] = {"quant_method": "\x1b[1m\nq", "producer": {"name": "\u202ep"}}
    (folder / "config.json").write_text(json.dumps(config))
    told = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert told.exit_code == 0, told.output
    assert not {"\x1b", "\u202e", "\x07"} & set(told.output)


def test_of_the_hub(packed: Path, tmp_path: Path) -> None:
    """Configs and headers travel, nothing else; the commit is told."""
    with serve(Path(shutil.copytree(packed, tmp_path / "hub"))) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        done = compress("inspect", REPO, "--json", cwd=tmp_path, env=os.environ | env)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["form"], found["folder"]) == ("hub", f"{REPO}@{COMMIT}")
        assert found["method"] == "compressed-tensors"
        assert hub.served.keys() <= {"config.json", "model.safetensors", "model.safetensors.index.json"}
        assert hub.served["model.safetensors"] <= 100_000
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.safetensors"))


def test_revision_is_of_the_hub(packed: Path, tmp_path: Path) -> None:
    """Of a folder it is a fault of the user's."""
    done = compress("inspect", str(packed), "--revision", "main", cwd=tmp_path)
    assert done.returncode == 2
    assert "--revision goes with a Hub id" in done.stderr


def test_imports_nothing_heavy() -> None:
    """90,000 tensors are told without torch."""
    assert _heavy_imports("inspect", "recipes/configs/deepseek-v3", "--json") == set()
