"""``compress eval`` with tasks, continuations, speed and gates on a tiny pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import compressor
from compressor.cli.main import cli
from compressor.errors import GateError, UserError
from tests.tiny import tiny_llama

from .cases import write_recipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its result."""
    root = tmp_path_factory.mktemp("pair")
    source = tiny_llama(root / "source")
    recipe = write_recipe(root / "recipe.yaml", source, "{scheme: nvfp4a16}", "evaluate: null")
    return source, compressor.run(recipe, output=root / "out" / "result").output


def measure(pair: tuple[Path, Path], *more: str) -> Result:
    """On a shipped text."""
    asked = [str(pair[1]), "--source", str(pair[0]), "--tokens", "400", "--context", "64", "-q", *more]
    return CliRunner().invoke(cli, ["eval", *asked])


def _json(text: str) -> Any:
    def constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=constant)


def test_everything_is_measured_and_told(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JSON and as tables; the source's answers are kept beside the default workspace's artefacts."""
    monkeypatch.chdir(tmp_path)
    asked = ("--task", "piqa=3", "--continuations", "2", "--continuation-prompt", "8")
    asked += ("--continuation-tokens", "4", "--speed", "1", "--speed-prompt", "8", "--speed-tokens", "3")
    done = measure(pair, *asked, "--gate", "task:piqa>=0", "--json")
    assert done.exit_code == 0, done.output + str(done.exception)
    found = _json(done.stdout)
    assert found["tasks"]["piqa"]["acc"]["n"] == 3
    assert (found["generation"]["prompts"], found["speed"]["runs"]) == (2, 1)
    assert found["text"] == "calibration/heldout.jsonl"
    assert [document["domain"] for document in found["documents"]] == ["sotu"]
    assert found["gates"][0]["metric"] == "task:piqa"
    kept = list((tmp_path / "out" / ".compress-workspace" / "answers").iterdir())
    assert len(kept) == 1
    shown = measure(pair, *asked, "--gate", "perplexity<=9999%")
    assert shown.exit_code == 0, shown.output + str(shown.exception)
    for words in ("piqa acc (n=3)", "tokens of 4 before", "tokens a second", "9999.0%", "PASS"):
        assert words in shown.stdout.replace(",", ""), words
    assert kept == list((tmp_path / "out" / ".compress-workspace" / "answers").iterdir())


def test_a_failed_gate_is_an_error(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, after the figures are told; gates on what is not measured are the user's fault."""
    monkeypatch.chdir(tmp_path)
    failed = measure(pair, "--gate", "kl<=0@95%", "--json")
    assert _json(failed.stdout)["gates"][0]["verdict"] == "FAIL"
    assert isinstance(failed.exception, GateError)
    for gate in ("task:piqa>=99%", "needle>=99%", "acceptance>=1%", "ppl<=1"):
        assert isinstance(measure(pair, "--gate", gate).exception, UserError), gate
