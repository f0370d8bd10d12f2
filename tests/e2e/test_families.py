"""A mixture of experts like Llama 4 and a hybrid like Qwen3-Next from end to end: walked, killed, resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

import compressor
from compressor.progress import Silent
from tests.model.zoo import FAMILIES

from .cases import content, write_recipe

# Widths of the tiny experts suit these schemes; static ranges make plain rounding walk as well.
WEIGHTS = {"rtn": "{scheme: fp8_static}", "gptq": "{scheme: int8, solver: gptq}"}
TEXT = "Five wizards quickly jump over my boxed vintage. " * 40
SHOWN = "num_samples: 6, sequence_length: 64"
KILLED_IN = "model.layers.1"


class _Killing(Silent):
    """Ends the process without any chance to clean up when block 1 is under way."""

    def advance(self, amount: int, note: str = "") -> None:
        if note == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)


class _Heard(Silent):
    """Keeps the blocks that are worked on."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def advance(self, amount: int, note: str = "") -> None:
        if note.startswith("model.layers.") and note.count(".") == 2:
            self.notes.append(note)


def _run_and_die(recipe: Path, output: Path) -> None:
    compressor.run(recipe, output=output, progress=_Killing())


@pytest.fixture(scope="module", params=["llama4", "qwen3_next"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a few blocks."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.mark.parametrize("solver", WEIGHTS)
def test_killed_inside_a_block(family: Path, tmp_path: Path, solver: str) -> None:
    """The rerun begins at the block in which the first run was killed; its result is that of a whole run."""
    (tmp_path / "shown.txt").write_text(TEXT)
    shown = json.dumps(str(tmp_path / "shown.txt"))
    rest = f"calibration: {{datasets: [{{path: {shown}}}], {SHOWN}}}\nevaluate: null"
    recipe = write_recipe(tmp_path / "recipe.yaml", family, WEIGHTS[solver], rest)
    whole = _Heard()
    expected = compressor.run(recipe, output=tmp_path / "whole" / "out", progress=whole)
    assert {"model.layers.0", KILLED_IN} <= set(whole.notes)

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.preload"])
    output = tmp_path / "part" / "out"
    process = context.Process(target=_run_and_die, args=(recipe, output))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()

    again = _Heard()
    part = compressor.run(recipe, output=output, progress=again)
    assert again.notes[0] == KILLED_IN
    assert set(again.notes) == set(whole.notes) - {"model.layers.0"}
    assert part.report.stages[0].name == "walk"
    assert part.report.stages[0].resumed
    assert content(part.output) == content(expected.output)
    assert part.report.calibration is not None
    used = {matrix.solver for matrix in part.report.calibration.matrices}
    assert ("gptq" in used) == (solver == "gptq")
