"""The command line's frame: help, version, exit codes, lazy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from compressor.cli.main import COMMANDS

HEAVY = {"torch", "transformers", "compressed_tensors", "llmcompressor", "lm_eval", "datasets", "numba"}


def compress(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m compressor`` in a process of its own; ``env`` adds to the environment."""
    return subprocess.run(
        [sys.executable, "-m", "compressor", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )


def _heavy_imports(*arguments: str) -> set[str]:
    code = (
        "import sys\n"
        "from compressor.cli.main import _run\n"
        f"assert _run({list(arguments)!r}) == 0\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()} & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("schema",),
        ("recipes",),
        ("plan", "recipes/scout-nvfp4.yaml"),
        ("plan", "recipes/smollm2-nvfp4.yaml", "--json"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_light_commands_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    """Help, schema and plans answer at once: no torch, no transformers."""
    assert _heavy_imports(*arguments) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    """``compress NAME --help`` says what the command does and exits with 0."""
    done = compress(name, "--help")
    assert done.returncode == 0
    assert f"Usage: compress {name}" in done.stdout
    assert len(done.stdout.splitlines()) > 4


def test_version() -> None:
    """The version is the package's."""
    from importlib.metadata import version

    assert compress("--version").stdout == f"compress {version('compressor')}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "no/such/recipe.yaml"), "no/such/recipe.yaml"),
        (("frobnicate",), "frobnicate"),
        (("plan",), "RECIPE"),
        (("plan", "recipes/smollm2-nvfp4.yaml", "--set", "weights.scheme=nvfp5"), "nvfp5"),
        (("plan", "recipes/smollm2-nvfp4.yaml", "--set", "weights.ignore=['*.nope']"), "*.nope"),
        (("inspect", "no-such-folder"), "no-such-folder: no such folder\n  -> name a checkpoint's folder"),
        (("verify", "no-such-folder", "--tokens", "255"), "--tokens"),
        (("report", "no-such-folder"), "no-such-folder"),
        (("eval", "no-such-folder", "--source", "x/y", "--text", "nope.txt"), "no-such-folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_bad_input_is_one_message_and_exit_2(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """The message names the fault; no traceback, nothing on stdout, nothing left behind."""
    done = compress(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_errors_are_json_where_lines_are(tmp_path: Path) -> None:
    """With --log-json every line of stderr parses, the error too."""
    done = compress("run", "--log-json", "no-such.yaml", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["event"] == "error"
    assert "no-such.yaml" in json.loads(line)["text"]


def test_internal_error_leaves_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the program exits with 3, names the log, and the log holds the traceback."""
    from compressor.cli import main as module

    def broken(*arguments: object, **named: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.cli, "main", broken)
    assert module._run(["plan"]) == 3
    (log,) = tmp_path.rglob("error-*.log")
    assert "RuntimeError: boom" in log.read_text()
    assert log.is_relative_to(tmp_path / "out" / ".compress-workspace")


@pytest.mark.parametrize("options", [(), ("--log-json",)], ids=["plain", "json"])
def test_ctrl_c_while_modules_are_imported(options: tuple[str, ...]) -> None:
    """Ends as it does later: exit 130 and one line, no traceback."""
    code = (
        "import runpy, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'click':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"sys.argv = {['compress', 'recipes', *options]!r}\n"
        "runpy.run_module('compressor', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    (line,) = done.stderr.splitlines()
    text = json.loads(line)["text"] if options else line
    assert text == "interrupted: run the same command again"


@pytest.mark.parametrize("formats", ["", "fp8,", " , "])
def test_kv_formats_without_a_name(formats: str, tmp_path: Path) -> None:
    """Nothing is measured silently without what was asked for."""
    done = compress("eval", str(tmp_path), "--source", "x", "--text", "y", "--kv", formats)
    assert done.returncode == 2
    assert "has a format without a name" in done.stderr
    assert "Traceback" not in done.stderr
