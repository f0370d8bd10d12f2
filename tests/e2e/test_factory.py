"""Models that an installed package makes: refused without leave, else streamed, walked and loaded back."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import compressor
from compressor.cli.main import cli
from compressor.errors import CheckpointError, PlanError, UserError
from compressor.model.decode import StoredWeights
from compressor.model.load import load_checkpoint_model
from compressor.progress import Silent

from .decoded import logits, reference
from .made_model import ARGUMENTS, FACTORY, PACKAGE, forget_package, make, write_checkpoint, write_package

TEXT = "Five wizards quickly jump over my boxed vintage. " * 40


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package is installed for one test."""
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "site")))
    yield
    forget_package()


def _recipe(folder: Path, weights: str, rest: str = "evaluate: null", factory: str = FACTORY) -> Path:
    source = folder / "source"
    if not source.exists():
        write_checkpoint(source)
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: job\nmodel: {{source: {json.dumps(str(source))}, factory: '{factory}'}}\n"
        f"weights: {weights}\n{rest}\n"
    )
    return path


def _calibration(folder: Path) -> str:
    (folder / "shown.txt").write_text(TEXT)
    shown = json.dumps(str(folder / "shown.txt"))
    return f"calibration: {{datasets: [{{path: {shown}}}], num_samples: 4, sequence_length: 64}}"


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_logits_are_the_references(solver: str, tmp_path: Path, package: None) -> None:
    """Streamed or calibrated; the reload is the module with our decoded weights; all else is the source's."""
    (tmp_path / "read.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    text = json.dumps(str(tmp_path / "read.txt"))
    rest = f"{_calibration(tmp_path)}\nevaluate: {{text: {text}, tokens: 64, context: 32}}"
    if solver == "rtn":
        rest = rest.partition("\n")[2]
    recipe = _recipe(tmp_path, f"{{scheme: int8, solver: {solver}}}", rest)
    done = compressor.run(recipe, output=tmp_path / "out", progress=Silent(), allow_code=True)
    weights, before = StoredWeights(done.output), load_file(tmp_path / "source" / "model.safetensors")
    assert set(weights.modules) == {f"blocks.{i}.{kind}" for i in range(3) for kind in ("to_keys", "to_out")}
    after = load_file(done.output / "model.safetensors")
    kept = [name for name in before if name.removesuffix(".weight") not in weights.modules]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert done.report.quality is not None
    assert 0 < done.report.quality.kl.mean < 0.1
    assert (done.report.calibration is not None) == (solver == "gptq")
    assert "in the modules of its package" in (done.output / "README.md").read_text()
    assert "does not know the model" in done.report.serve.notes[0]
    config = json.loads((done.output / "config.json").read_text())
    assert config["compressor_factory"] == FACTORY
    assert config.items() >= ARGUMENTS.items()

    expected = make()
    tensors = reference(before, after, weights)
    expected.load_state_dict(tensors | {"to_logits.weight": tensors["token_emb.weight"]})
    loaded = load_checkpoint_model(done.output, torch.float32, factory=FACTORY)
    assert loaded.via == "factory"
    ids = torch.arange(3, 40)[None]
    found = logits(loaded.model, {"input_ids": ids})
    for parameter in expected.parameters():
        parameter.data = parameter.data.bfloat16().float()
    torch.testing.assert_close(found, expected(ids))


def test_without_leave(tmp_path: Path, package: None) -> None:
    """A plan runs no code; a run says what it would run, and stops; a result is not loaded by itself."""
    recipe = _recipe(tmp_path, "{scheme: int8}")
    said = CliRunner().invoke(cli, ["plan", str(recipe), "--output", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    forget_package()
    command = ["run", str(recipe), "--output", str(tmp_path / "out"), "-q"]
    with pytest.raises(PlanError, match=f"this would import and call {FACTORY}.*\n.*--allow-code"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    assert PACKAGE not in sys.modules
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--smoke cannot shrink"):
        CliRunner().invoke(cli, [*command, "--smoke"], catch_exceptions=False)
    assert PACKAGE not in sys.modules
    command = ["run", str(recipe), "--output", str(tmp_path / "out"), "-q", "--allow-code"]
    said = CliRunner().invoke(cli, command)
    assert said.exit_code == 0, said.output
    with pytest.raises(CheckpointError, match="code of a package that is not run here"):
        load_checkpoint_model(tmp_path / "out", torch.float32)


@pytest.mark.parametrize(
    "factory, weights, rest, message",
    [
        (
            "nowhere_at_all:Model",
            "{scheme: int8}",
            "evaluate: null",
            "'nowhere_at_all' of .* is not installed",
        ),
        (
            FACTORY,
            "{scheme: int8, solver: gptq, polish: {}}",
            "evaluate: null",
            "models of transformers only",
        ),
        (
            FACTORY,
            "{scheme: fp8_dynamic}",
            "evaluate: null\nexport: {format: modelopt}",
            "ModelOpt's dialect",
        ),
        (
            FACTORY,
            "{scheme: int8}",
            "evaluate: null\nadapters: {}",
            "which of its parameters is its embedding",
        ),
    ],
)
def test_faults_of_a_plan(
    factory: str, weights: str, rest: str, message: str, tmp_path: Path, package: None
) -> None:
    """Found before anything is run."""
    recipe = _recipe(tmp_path, weights, f"{_calibration(tmp_path)}\n{rest}", factory)
    with pytest.raises(PlanError, match=message):
        compressor.plan(recipe, output=tmp_path / "out")


def test_verify_runs_no_code(tmp_path: Path, package: None) -> None:
    """What can be told without the model is checked, a changed value is found, the rest is skipped."""
    recipe = _recipe(tmp_path, "{scheme: int8}")
    command = ["run", str(recipe), "--output", str(tmp_path / "out"), "-q", "--allow-code"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    forget_package()
    command = ["verify", str(tmp_path / "out"), "--engine", "none", "-q"]
    said = CliRunner().invoke(cli, command)
    assert said.exit_code == 0, said.output
    assert PACKAGE not in sys.modules
    found = json.loads((tmp_path / "out" / "report.json").read_text())["verification"]
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert (status["meaning"], status["transformers"], status["engine"]) == ("passed", "skipped", "skipped")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"dim": 32', '"dim": 16'))
    (tmp_path / "out" / "manifest.json").unlink()
    said = CliRunner().invoke(cli, command)
    assert said.exit_code == 1
    assert "dim is 16 instead of 32" in " ".join(said.output.split())
    assert PACKAGE not in sys.modules


def test_a_module_of_no_package(tmp_path: Path, package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running program itself has no spec to be found by."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(PlanError, match=r"'__main__' of .* is not installed"):
        compressor.plan(_recipe(tmp_path, "{scheme: int8}", factory="__main__:Model"), output=tmp_path)


@pytest.mark.parametrize("named", [FACTORY, [FACTORY]])
def test_a_config_names_the_factory_alone(named: object, tmp_path: Path, package: None) -> None:
    """Found in the plan: its result could not be loaded back."""
    recipe = _recipe(tmp_path, "{scheme: int8}", factory="unused:model")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"compressor_factory": named}))
    recipe.write_text(recipe.read_text().replace(", factory: 'unused:model'", ""))
    forget_package()
    with pytest.raises(PlanError, match="makes the model, which the recipe does not name"):
        compressor.plan(recipe, output=tmp_path / "out")
    assert PACKAGE not in sys.modules


def test_spelling(tmp_path: Path, package: None) -> None:
    """``module:callable`` and nothing else."""
    with pytest.raises(UserError, match="factory"):
        compressor.plan(_recipe(tmp_path, "{scheme: int8}", factory="os.system(x)"))


@pytest.mark.parametrize(
    "factory, message",
    [
        (FACTORY.replace("MemoryModel", "Nothing"), "does not make the model of config.json: AttributeError"),
        (FACTORY.replace("MemoryModel", "no_module"), "makes a dict, not a torch module"),
    ],
)
def test_what_a_factory_may_do_wrong(factory: str, message: str, tmp_path: Path, package: None) -> None:
    """One message, before the weights are compressed where they are calibrated."""
    rest = f"{_calibration(tmp_path)}\nevaluate: null"
    recipe = _recipe(tmp_path, "{scheme: int8, solver: gptq}", rest, factory)
    with pytest.raises(CheckpointError, match=message):
        compressor.run(recipe, output=tmp_path / "out", progress=Silent(), allow_code=True)
